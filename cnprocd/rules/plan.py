"""Derive the plan from the rules: the least to ask of the kernel that gives the same matches. PURE.

These are the sources of identity, cheapest first. The cheapest one that has every attribute of the rules serves them:

  none         no rule needs an attribute: neither its match nor its message nor its hook names one
  taskstats    exit rules that need comm, ids, usage, lifetime, or whether it was one of the programs that they name
               literally: exit records of the wanted statuses only. A successful exit costs nothing, and no fork or exec
               events are requested
  procfs       exec and coredump rules that need only attributes of a running process
  table        all other rules: a table of processes, from fork, exec, comm, uid, gid and exit events

The end of a process is known from taskstats (the exit record of its last thread is marked), or, without taskstats, by
counting threads, which needs every fork and exit of threads. ENOBUFS reports loss and `Drops` counts it. Gaps in the
sequence also show silent loss, but only if all events are requested and no filter is attached.

Running hooks widen the plan: fork events identify their descendants.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal, get_args

from cnprocd.connector import uapi
from cnprocd.connector.filter import ConnectorFilter, TaskstatsFilter, connector_program
from cnprocd.connector.request import Features, Request
from cnprocd.connector.status import EVERY_STATUS, NO_STATUS, StatusSet
from cnprocd.process.model import KINDS_OF_LASTING_COMM, Kind, Wanted
from cnprocd.process.tracking import Tracking
from cnprocd.rules.compile import CompiledRule, Matcher
from cnprocd.rules.needs import Need

_KIND_BITS: dict[Kind, int] = {
    "fork": uapi.PROC_EVENT_FORK,
    "exec": uapi.PROC_EVENT_EXEC,
    "uid": uapi.PROC_EVENT_UID,
    "gid": uapi.PROC_EVENT_GID,
    "sid": uapi.PROC_EVENT_SID,
    "ptrace": uapi.PROC_EVENT_PTRACE,
    "comm": uapi.PROC_EVENT_COMM,
    "coredump": uapi.PROC_EVENT_COREDUMP,
    "exit": uapi.PROC_EVENT_EXIT,
}
_TABLE_BITS = (
    uapi.PROC_EVENT_FORK
    | uapi.PROC_EVENT_EXEC
    | uapi.PROC_EVENT_COMM
    | uapi.PROC_EVENT_UID
    | uapi.PROC_EVENT_GID
    | uapi.PROC_EVENT_EXIT
)
_EVERY_BIT = uapi.PROC_EVENT_ALL & ~uapi.PROC_EVENT_NONZERO_EXIT
_IN_RECORDS: frozenset[Need] = frozenset({"comm", "ids", "usage", "lifetime", "exe_file"})
_IN_PROC: frozenset[Need] = frozenset(
    {"comm", "ids", "euid", "loginuid", "exe", "exe_file", "exe_claimed", "cmdline", "cgroup"}
)
_IN_EVENT: Mapping[Kind, frozenset[Need]] = {"uid": frozenset({"euid"}), "comm": frozenset({"comm"})}
_KNOWN_ANYWAY: frozenset[Need] = frozenset({"oom"})  # read at the exit, whatever the plan is
_EXE_NEEDS: frozenset[Need] = frozenset({"exe", "exe_file", "exe_claimed"})
_NOT_NAMED: frozenset[str] = frozenset()
_MAX_RANGES = 16  # more tests per message than this cost more than the message that they save

Deaths = Literal["none", "records", "threads"]
Identity = Literal["none", "taskstats", "procfs", "table"]
_LADDER: tuple[Identity, ...] = get_args(Identity)  # cheapest first


@dataclass(frozen=True, slots=True)
class Plan:
    """The request to the kernel, and how the tracker interprets the events."""

    request: Request
    tracking: Tracking


def make_plan(
    matcher: Matcher, features: Features, follow_hooks: bool = False, unwatched: frozenset[str] = _NOT_NAMED
) -> Plan:
    """Return the least to ask of a kernel with these features for these rules.

    `follow_hooks`: hooks may be running, so fork events and the exits of leaders are needed to know their descendants.
    `unwatched`: paths whose files exit records do not identify (see process/watched_files.py).
    """
    kinds = frozenset(kind for kind in _KIND_BITS if matcher.wants(kind, threads=False))
    thread_kinds = frozenset(kind for kind in _KIND_BITS if matcher.wants(kind, threads=True))
    exits = "exit" in kinds or "exit" in thread_kinds
    needs = frozenset(need for rule in matcher.rules for need in rule.needs)
    sources = [(rule, identity_of(rule, features, unwatched)) for rule in matcher.rules]
    table = any(source == "table" for _, source in sources)
    deaths: Deaths = "none" if not exits else "records" if features.taskstats else "threads"
    statuses = _union(matcher) if exits else NO_STATUS
    leader_exits = follow_hooks or (table and deaths != "threads")
    thread_forks = deaths == "threads" or "fork" in thread_kinds

    bits = _EVERY_BIT & sum(_KIND_BITS[kind] for kind in kinds | thread_kinds)
    if table:
        bits |= _TABLE_BITS
    if follow_hooks:
        bits |= uapi.PROC_EVENT_FORK | uapi.PROC_EVENT_EXIT
    connector = ConnectorFilter(
        events=bits,
        thread_forks=thread_forks,
        exits=EVERY_STATUS if deaths == "threads" else statuses,
        leader_exits=leader_exits,
    )
    if not features.socket_filter:
        connector = ConnectorFilter(events=_EVERY_BIT)
    return Plan(
        Request(
            mask=_mask(bits, connector, features),
            connector=connector,
            taskstats=TaskstatsFilter(statuses) if deaths == "records" else None,
            sequence=bits == _EVERY_BIT and not connector_program(connector),
        ),
        Tracking(
            table=table,
            records=deaths != "threads",
            wanted=Wanted(
                exe=any(source in ("procfs", "table") and rule.needs.keys() & _EXE_NEEDS for rule, source in sources),
                cmdline="cmdline" in needs,
                cgroup="cgroup" in needs,
                loginuid="loginuid" in needs,
            ),
            exe_files=bool(needs & {"exe", "exe_file"}),
            kinds=kinds,
            thread_kinds=thread_kinds,
            statuses=statuses,
            # A record may bring the comm that a parent had at its end, if its exec came too late to be read.
            passes_over=deaths == "records" and "exit" not in thread_kinds and "ancestors" not in needs,
        ),
    )


def identity_of(rule: CompiledRule, features: Features, unwatched: frozenset[str] = _NOT_NAMED) -> Identity:
    """Return the cheapest source that has every attribute that the rule needs, at each of its events."""
    needs: Set[Need] = rule.needs.keys() - _KNOWN_ANYWAY
    if "exe_file" in needs and not unwatched.isdisjoint(rule.exe_paths):
        needs = needs | {"exe"}
    return max((_identity_at(kind, needs, features) for kind in rule.kinds), key=_LADDER.index)


def price_of(rule: CompiledRule, need: Need, features: Features, unwatched: frozenset[str] = _NOT_NAMED) -> Identity:
    """Return the cheapest source that has one attribute, at each event of the rule."""
    needs: Set[Need] = {need} - _KNOWN_ANYWAY
    if need == "exe_file" and not unwatched.isdisjoint(rule.exe_paths):
        needs = {"exe"}
    return max((_identity_at(kind, needs, features) for kind in rule.kinds), key=_LADDER.index)


def _identity_at(kind: Kind, needs: Set[Need], features: Features) -> Identity:
    if kind == "exit":
        if not features.taskstats:
            return "table"  # threads are counted there
        return "none" if not needs else "taskstats" if needs <= _IN_RECORDS else "table"
    needs = needs - _IN_EVENT.get(kind, frozenset())
    if not needs:
        return "none"
    return "procfs" if kind in KINDS_OF_LASTING_COMM and needs <= _IN_PROC else "table"


def _union(matcher: Matcher) -> StatusSet:
    """Return every status that some rule can match, as one range if it has too many ranges to test in the kernel."""
    statuses = NO_STATUS
    for rule in matcher.rules:
        statuses |= rule.statuses
    if len(statuses.codes) <= _MAX_RANGES:
        return statuses
    return StatusSet(((statuses.codes[0][0], statuses.codes[-1][1]),), statuses.signals)


def _mask(bits: int, connector: ConnectorFilter, features: Features) -> int:
    """Return the event mask for LISTEN. Failed exits alone have their own bit. The mask 0 means all events."""
    if not features.event_mask or bits == _EVERY_BIT:
        return uapi.PROC_EVENT_ALL
    if bits & uapi.PROC_EVENT_EXIT and not connector.leader_exits and 0 not in connector.exits:
        bits = bits & ~uapi.PROC_EVENT_EXIT | uapi.PROC_EVENT_NONZERO_EXIT
    # No rules at all: ask for the rarest event, which the filter then drops.
    return bits or uapi.PROC_EVENT_COREDUMP
