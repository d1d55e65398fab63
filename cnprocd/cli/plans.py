"""The plan in words: what the rules ask of the kernel, what each costs, and how a loss would be known. PURE."""

from __future__ import annotations

from cnprocd.connector.filter import connector_program, describe, listing, taskstats_program
from cnprocd.connector.request import Features
from cnprocd.connector.uapi import EVENT_NAMES
from cnprocd.rules.compile import CompiledRule, Matcher
from cnprocd.rules.plan import Plan, identity_of

_SOURCES = {
    "none": "nothing: no key asks who it was",
    "taskstats": "the exit record that the kernel makes of a dying task; it cannot race",
    "procfs": "/proc, read while the process lives",
    "table": "the table of processes, fed by every fork, exec, rename and exit",
}


def cost_of(rule: CompiledRule, features: Features) -> tuple[int, str]:
    """The cost class, from 1 (cheapest) to 4, and what it means."""
    identity = identity_of(rule, features)
    if identity == "table":
        return 4, "every fork, exec, rename and exit of the machine is delivered"
    if rule.kinds - {"exit"}:
        often = sorted(rule.kinds - {"exit"})
        return 3, f"every {', '.join(often)} of the machine is delivered"
    if 0 in rule.statuses:
        return 2, "every exit is delivered"
    return 1, "only exits with the wanted statuses are delivered; a success costs nothing"


def rule_plan(rule: CompiledRule, features: Features) -> dict[str, object]:
    """One rule's share of the plan."""
    identity = identity_of(rule, features)
    cost, meaning = cost_of(rule, features)
    return {
        "rule": rule.name,
        "kinds": sorted(rule.kinds),
        "statuses": describe(rule.statuses) if "exit" in rule.kinds else None,
        "needs": sorted(rule.needs),
        "identity": identity,
        "identity_means": _SOURCES[identity],
        "cost": cost,
        "cost_means": meaning,
    }


def whole_plan(plan: Plan, matcher: Matcher, features: Features) -> dict[str, object]:
    """What is asked of the kernel for all rules together."""
    request, tracking = plan.request, plan.tracking
    taskstats = request.taskstats
    return {
        "features": {
            "event_mask": features.event_mask,
            "taskstats": features.taskstats,
            "socket_filter": features.socket_filter,
        },
        "mask": f"{request.mask:#010x}",
        "mask_events": [name for bit, name in EVENT_NAMES.items() if request.mask & bit],
        "connector_filter": listing(connector_program(request.connector)) if features.socket_filter else [],
        "exit_records": describe(taskstats.exits) if taskstats is not None else None,
        "taskstats_filter": listing(taskstats_program(taskstats)) if taskstats is not None else [],
        "table": tracking.table,
        "deaths_told_by": "exit records"
        if taskstats is not None
        else "nothing"
        if tracking.records
        else "counting threads",
        "loss_accounting": _loss(plan),
        "dearest_rules": _dearest(matcher, features),
    }


def _loss(plan: Plan) -> str:
    if plan.request.sequence:
        return "exact: the socket's Drops, and gaps in the per-CPU sequence for what the kernel could not even queue"
    return (
        "exact for what the buffer could not hold (ENOBUFS and the socket's Drops); events that the kernel could not "
        "even make for want of memory leave no trace while a mask or filter is in force"
    )


def _dearest(matcher: Matcher, features: Features) -> list[str]:
    """The rules that make the plan as dear as it is: without them it would be cheaper."""
    costs = {rule.name: cost_of(rule, features)[0] for rule in matcher.rules}
    most = max(costs.values(), default=0)
    return [name for name, cost in costs.items() if cost == most and most > 1]
