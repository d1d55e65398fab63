"""What holds matches back: `after`, `cooldown` and `rate_limit` of a rule. PURE: time is an argument, in nanoseconds of
any clock that does not go back (the kernel's timestamps will do).

Strategy: one Throttle per rule. A match must get past all three; only one that does counts as passed:

after       fires at the n-th match within a period, once; the same flapping then stays quiet until there was no match
            at all for `resets` (as long as `within`, unless said otherwise).
cooldown    after a match passed, none passes for so long.
rate_limit  at most `count` pass in any period of `per` (a sliding window, not a fixed one: never twice the count
            around a boundary), by rule, or by the value of a field.

What cooldown and rate_limit held back is counted and given out once per window (reports), so that the log says how much
it does not show. What `after` keeps quiet is not reported: it is below the threshold, not held back.

Memory is bounded although the keys are chosen by anyone who can name a process: a sliding window of n needs the last n
times of each key, so the keys of a rule are limited to MOST_TIMES / n, MOST_KEYS at most, and the one used longest ago
is forgotten first. A forgotten key has its full budget again. That is no way round the limit that an attacker did not
have before (each new name has a budget of its own); what then bounds hooks is the spool's queue limit. What is held
back for more keys than that is reported under OTHER_KEYS. All is lost on restart: every budget is fresh then.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NS = 1_000_000_000
MOST_KEYS = 4096
MOST_TIMES = 262_144
WHOLE_RULE = ""
OTHER_KEYS = "(others)"

Holder = Literal["after", "cooldown", "rate_limit"]


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `count` in any `per_s`, for each value of the field `by` ("rule": all together)."""

    count: int
    per_s: float
    by: str = "rule"


@dataclass(frozen=True, slots=True)
class After:
    """Fire at the match number `count` within `within_s`; count anew after `resets_s` without a match."""

    count: int
    within_s: float
    resets_s: float | None = None


@dataclass(frozen=True, slots=True)
class HeldBack:
    """What one window held back: for the record `throttled`. `key` is raw text of a process: escape it."""

    rule: str
    held_by: Holder
    by: str
    key: str
    count: int
    window_s: float


@dataclass(slots=True)
class _Held:
    opened_ns: int
    count: int = 0


@dataclass(slots=True)
class _Sliding:
    """A sliding window per key, of the last `count` passes."""

    held_by: Holder
    by: str
    count: int
    per_ns: int
    passed: OrderedDict[str, deque[int]] = field(default_factory=OrderedDict)
    held: dict[str, _Held] = field(default_factory=dict)  # in the order of opened_ns

    def key_of(self, record: Mapping[str, object]) -> str:
        return WHOLE_RULE if self.by == "rule" else str(record.get(self.by))

    def allows(self, key: str, now_ns: int) -> bool:
        passed = self.passed.get(key)
        return passed is None or len(passed) < self.count or now_ns - passed[0] >= self.per_ns

    def note_pass(self, key: str, now_ns: int) -> None:
        passed = self.passed.get(key)
        if passed is None:
            passed = self.passed[key] = deque(maxlen=self.count)
            if len(self.passed) > max(1, min(MOST_KEYS, MOST_TIMES // self.count)):
                self.passed.popitem(last=False)
        self.passed.move_to_end(key)
        passed.append(now_ns)

    def note_held(self, key: str, now_ns: int) -> None:
        if key not in self.held and len(self.held) >= MOST_KEYS:
            key = OTHER_KEYS
        self.held.setdefault(key, _Held(now_ns)).count += 1

    def reports(self, rule: str, now_ns: int) -> list[HeldBack]:
        ripe = [(key, held) for key, held in self.held.items() if now_ns - held.opened_ns >= self.per_ns]
        for key, _ in ripe:
            del self.held[key]
        return [HeldBack(rule, self.held_by, self.by, key, held.count, self.per_ns / NS) for key, held in ripe]

    def next_report_ns(self) -> int | None:
        """When the oldest window with something held back closes."""
        oldest = next(iter(self.held.values()), None)
        return None if oldest is None else oldest.opened_ns + self.per_ns


class Throttle:
    """One rule's throttle. Not given is not limited."""

    def __init__(
        self,
        rule: str,
        *,
        rate_limit: RateLimit | None = None,
        cooldown_s: float | None = None,
        after: After | None = None,
    ) -> None:
        self.rule = rule
        self._after = after
        self._matches: deque[int] = deque(maxlen=after.count if after is not None else 1)
        self._last_match_ns: int | None = None
        self._fired = False
        self._limits: list[_Sliding] = []
        if cooldown_s is not None:
            self._limits.append(_Sliding("cooldown", "rule", 1, int(cooldown_s * NS)))
        if rate_limit is not None:
            per_ns = int(rate_limit.per_s * NS)
            self._limits.append(_Sliding("rate_limit", rate_limit.by, rate_limit.count, per_ns))

    def admit(self, record: Mapping[str, object], now_ns: int) -> Holder | None:
        """None when the match passes, else what held it back."""
        if self._after is not None and not self._reaches(self._after, now_ns):
            return "after"
        keys = [limit.key_of(record) for limit in self._limits]
        for limit, key in zip(self._limits, keys, strict=True):
            if not limit.allows(key, now_ns):
                limit.note_held(key, now_ns)
                return limit.held_by
        for limit, key in zip(self._limits, keys, strict=True):
            limit.note_pass(key, now_ns)
        return None

    def reports(self, now_ns: int) -> list[HeldBack]:
        """What was held back in windows that have closed, each told once."""
        return [held for limit in self._limits for held in limit.reports(self.rule, now_ns)]

    def next_report_ns(self) -> int | None:
        """When reports() will next have something to tell; None: nothing is held back."""
        times = [time for limit in self._limits if (time := limit.next_report_ns()) is not None]
        return min(times) if times else None

    def _reaches(self, after: After, now_ns: int) -> bool:
        """Whether this match is the one to fire at."""
        resets_s = after.within_s if after.resets_s is None else after.resets_s
        if self._last_match_ns is not None and now_ns - self._last_match_ns >= resets_s * NS:
            self._matches.clear()
            self._fired = False
        self._last_match_ns = now_ns
        self._matches.append(now_ns)
        enough = len(self._matches) == after.count and now_ns - self._matches[0] <= after.within_s * NS
        fires = enough and not self._fired
        self._fired = self._fired or enough
        return fires
