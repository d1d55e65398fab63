"""The plan for `explain`: what the rules ask of the kernel, what each costs, and how a loss is detected. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cnprocd.connector.filter import connector_program, describe, listing, taskstats_program
from cnprocd.connector.request import Features
from cnprocd.connector.uapi import EVENT_NAMES
from cnprocd.rules.compile import CompiledRule, Matcher
from cnprocd.rules.plan import Plan, identity_of, price_of

_SOURCES = {
    "none": "not needed: no key is about the process",
    "taskstats": "the exit record that the kernel makes of a dying task; it cannot race",
    "procfs": "/proc, read while the process lives",
    "table": "the table of processes, fed by every fork, exec, rename and exit",
}


@dataclass(frozen=True, slots=True)
class RulePlan:
    """The share of one rule in the plan. The names of the fields are those of `explain --json`."""

    rule: str
    kinds: list[str]
    statuses: str | None
    needs: list[str]
    asked_by: dict[str, list[str]]  # need -> lines of the rule
    prices: dict[str, str]  # need -> the cheapest source that has it
    identity: str
    identity_means: str
    cost: int
    cost_means: str


@dataclass(frozen=True, slots=True)
class WholePlan:
    """What is asked of the kernel for all rules together. The names of the fields are those of `explain --json`."""

    features: dict[str, bool]
    mask: str
    mask_events: list[str]
    connector_filter: list[str]
    exit_records: str | None
    taskstats_filter: list[str]
    table: bool
    deaths_detected_by: str
    loss_accounting: str
    costliest_rules: list[str]
    kernel_log: bool  # asked at each exit by SIGKILL that a rule with oom_killed could match
    unwatched: dict[str, str]  # path of a program -> why its exit records do not identify it here


def cost_of(rule: CompiledRule, features: Features, unwatched: frozenset[str]) -> tuple[int, str]:
    """Return the cost class, from 1 (cheapest) to 4, and its meaning."""
    identity = identity_of(rule, features, unwatched)
    if identity == "table":
        return 4, "every fork, exec, rename and exit of the machine is delivered"
    if rule.kinds - {"exit"}:
        often = sorted(rule.kinds - {"exit"})
        return 3, f"every {', '.join(often)} of the machine is delivered"
    if 0 in rule.statuses:
        return 2, "every exit is delivered"
    return 1, "only exits with the wanted statuses are delivered; a success costs nothing"


def rule_plan(rule: CompiledRule, features: Features, unwatched: frozenset[str] = frozenset()) -> RulePlan:
    """Return the share of one rule in the plan."""
    identity = identity_of(rule, features, unwatched)
    cost, meaning = cost_of(rule, features, unwatched)
    return RulePlan(
        rule=rule.name,
        kinds=sorted(rule.kinds),
        statuses=describe(rule.statuses) if "exit" in rule.kinds else None,
        needs=sorted(rule.needs),
        asked_by={need: list(lines) for need, lines in sorted(rule.needs.items())},
        prices={need: price_of(rule, need, features, unwatched) for need in sorted(rule.needs)},
        identity=identity,
        identity_means=_SOURCES[identity],
        cost=cost,
        cost_means=meaning,
    )


def whole_plan(plan: Plan, matcher: Matcher, features: Features, unwatched: Mapping[str, str]) -> WholePlan:
    """Return what is asked of the kernel for all rules together."""
    request, taskstats = plan.request, plan.request.taskstats
    return WholePlan(
        features={
            "event_mask": features.event_mask,
            "taskstats": features.taskstats,
            "socket_filter": features.socket_filter,
        },
        mask=f"{request.mask:#010x}",
        mask_events=[name for bit, name in EVENT_NAMES.items() if request.mask & bit],
        connector_filter=listing(connector_program(request.connector)) if features.socket_filter else [],
        exit_records=describe(taskstats.exits) if taskstats is not None else None,
        taskstats_filter=listing(taskstats_program(taskstats)) if taskstats is not None else [],
        table=plan.tracking.table,
        deaths_detected_by=_deaths(plan),
        loss_accounting=_loss(plan),
        costliest_rules=_most_expensive(matcher, features, frozenset(unwatched)),
        kernel_log=any("oom" in rule.needs for rule in matcher.rules),
        unwatched=dict(unwatched),
    )


def _deaths(plan: Plan) -> str:
    if plan.request.taskstats is not None:
        return "exit records"
    return "nothing" if plan.tracking.records else "counting threads"


def _loss(plan: Plan) -> str:
    if plan.request.sequence:
        return "exact: the socket's Drops column, and gaps in the per-CPU sequence for events that were not queued"
    return (
        "exact for a full buffer (ENOBUFS and the socket's Drops column); while a mask or filter is used, events that "
        "the kernel cannot allocate are not detected"
    )


def _most_expensive(matcher: Matcher, features: Features, unwatched: frozenset[str]) -> list[str]:
    """Return the rules of the highest cost class: without them the plan would cost less."""
    costs = {rule.name: cost_of(rule, features, unwatched)[0] for rule in matcher.rules}
    most = max(costs.values(), default=0)
    return [name for name, cost in costs.items() if cost == most and most > 1]
