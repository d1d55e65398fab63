"""Processes whose exit records look alike, and the rules that cannot tell them apart. PURE.

See crowd.py, which keeps what was found of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cnprocd.connector.event import Exit
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.json_value import JsonDict
from cnprocd.output.record import comm_fields
from cnprocd.rules.compile import CompiledRule, Match
from cnprocd.rules.needs import Need
from cnprocd.rules.ruleset import After, Coalesce, Condition, Cooldown, EventName, RateLimit, Rule

SHOWN: frozenset[Need] = frozenset({"comm", "ids", "exe_file"})  # by a record, as the status is
_THROTTLED_BY = frozenset({"rule", "comm", "uid", "gid", "ppid"})  # other fields are not known by a look


@dataclass(frozen=True, slots=True)
class Part:
    """A rule that such processes match, by which event. `fields`: those that its throttle asks for, if it is asked."""

    compiled: CompiledRule
    event: EventName
    fields: JsonDict | None

    @property
    def name(self) -> str:
        return self.compiled.rule.name

    @property
    def can_wait(self) -> bool:
        """Whether a match needs nothing but its record: no hook, and no throttle that lets it pass."""
        rule = self.compiled.rule
        return rule.run is None and not _is_throttled(rule)


@dataclass(slots=True)
class Alike:
    """Processes that match the same rules. `left`: of these rules, those whose throttle may let a match pass."""

    parts: tuple[Part, ...]
    naming: tuple[Part, ...]  # of other rules, whose `after` counts each name: the names of these processes differ
    uid: int
    until_s: float  # when to match one of them again
    is_old: bool = False  # one of them is to be matched
    batch: int = -1  # for which `left` was found
    left: list[Part] = field(default_factory=list)
    is_shed: bool = False  # in the rest of this batch


Key = tuple[int, bytes, bytes, bytes, int]
"""Wait status, and what a look shows: name, user and group, file, and the parent if throttles count by it."""


@dataclass(frozen=True, slots=True)
class Later:
    """A match of a process that was only looked at, to be reported later."""

    rule: CompiledRule
    event: EventName
    exit: Exit
    record: TaskRecord


def is_known(rule: Rule) -> bool:
    """Return whether all that the throttle of a rule asks for is known by a look."""
    return all(one.by in _THROTTLED_BY for one in throttles_of(rule))


def throttles_of(rule: Rule) -> list[After | Cooldown | RateLimit | Coalesce]:
    return [one for one in (rule.after, rule.cooldown, rule.rate_limit, rule.coalesce) if one is not None]


def without_name(key: Key) -> Key:
    status, _, ids, file, ppid = key
    return status, b"", ids, file, ppid


def is_by_index(rule: CompiledRule) -> bool:
    """Return whether the name of a process only decides whether the rule is asked, and what its throttle holds back."""
    condition = rule.rule.match
    return condition is None or not any(map(_names, (*condition.all, *condition.any, *condition.not_)))


def _names(condition: Condition) -> bool:
    """Return whether a condition asks for the name."""
    return condition.comm is not None or any(map(_names, (*condition.all, *condition.any, *condition.not_)))


def part_of(match: Match, fields: JsonDict) -> Part:
    rule = match.rule.rule
    return Part(match.rule, match.event, fields if _is_throttled(rule) else None)


def _is_throttled(rule: Rule) -> bool:
    return not (rule.after is None and rule.cooldown is None and rule.rate_limit is None)


def name_of(comm: bytes) -> str:
    """Return the name in the bytes of a record."""
    return comm.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def named_fields(comm: bytes) -> JsonDict:
    return comm_fields(name_of(comm))


def counts_names(part: Part) -> bool:
    after = part.compiled.rule.after
    return after is not None and after.by == "comm"


def nameless(part: Part) -> Part:
    """Return the part of processes with other names: a throttle that counts by name is asked with the name, or not."""
    rule = part.compiled.rule
    limits = (rule.cooldown, rule.rate_limit)
    if part.fields is None or (not counts_names(part) and any(one is not None and one.by == "comm" for one in limits)):
        return replace(part, fields=None)
    return replace(part, fields={key: value for key, value in part.fields.items() if not key.startswith("comm")})
