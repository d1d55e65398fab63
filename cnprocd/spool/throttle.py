"""Hold back matches: `after`, `cooldown` and `rate_limit` of a rule. PURE.

Time is an argument, in nanoseconds of any clock that does not go back. There is one Throttle per rule. A match must
pass all three, and only a match that does counts for cooldown and rate_limit:

after       passes the n-th match within a period, once. Then nothing passes until there was no match at all for
            `resets` (by default as long as `within`).
cooldown    after a match passed, none passes for that long.
rate_limit  at most `count` pass in any period of `per`, by rule or by the value of a field. The window slides: a fixed
            one would pass twice the count around a boundary.

Matches held back by cooldown and rate_limit are counted and reported once per window. Matches below the threshold of
`after` are not reported.

Memory is bounded although processes choose the keys. A sliding window of n needs the last n times of each key, so a
rule has at most MOST_TIMES / n keys, and at most MOST_KEYS. The key used longest ago is discarded first and then has
its full budget again. This gives an attacker nothing new, because each new name has a budget of its own; the spool's
queue limit bounds the hooks. Counts for more keys than that are reported under OTHER_KEYS.
After a restart every budget is full.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Literal

from cnprocd.json_value import JsonObject
from cnprocd.rules.ruleset import After, RateLimit

NS = 1_000_000_000
MOST_KEYS = 4096
MOST_TIMES = 262_144
WHOLE_RULE = ""
OTHER_KEYS = "(others)"

Holder = Literal["after", "cooldown", "rate_limit"]


@dataclass(frozen=True, slots=True)
class HeldBack:
    """The matches that one window held back, for the record `throttled`. `key` is raw text of a process: escape it."""

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
    """A sliding window per key: the times of the last `count` matches that passed."""

    held_by: Holder
    by: str
    count: int
    per_ns: int
    passed: OrderedDict[str, deque[int]] = field(default_factory=OrderedDict)
    held: dict[str, _Held] = field(default_factory=dict)  # in the order of opened_ns

    def key_of(self, record: JsonObject) -> str:
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
        """Return when the oldest window with held back matches closes, or None."""
        oldest = next(iter(self.held.values()), None)
        return None if oldest is None else oldest.opened_ns + self.per_ns


class Throttle:
    """The throttle of one rule. `resets_s` belongs to `after`; None means as long as `within`."""

    def __init__(
        self,
        rule: str,
        *,
        rate_limit: RateLimit | None = None,
        cooldown_s: float | None = None,
        after: After | None = None,
        resets_s: float | None = None,
    ) -> None:
        self.rule = rule
        self._after = after
        self._resets_s = resets_s
        self._matches: deque[int] = deque(maxlen=after.count if after is not None else 1)
        self._last_match_ns: int | None = None
        self._has_passed = False
        self._limits: list[_Sliding] = []
        if cooldown_s is not None:
            self._limits.append(_Sliding("cooldown", "rule", 1, int(cooldown_s * NS)))
        if rate_limit is not None:
            per_ns = int(rate_limit.per_s * NS)
            self._limits.append(_Sliding("rate_limit", rate_limit.by, rate_limit.count, per_ns))

    def admit(self, record: JsonObject, now_ns: int) -> Holder | None:
        """Return None if the match passes, else the limit that held it back."""
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
        """Return the held back matches of all windows that have closed since the last call."""
        return [held for limit in self._limits for held in limit.reports(self.rule, now_ns)]

    def next_report_ns(self) -> int | None:
        """Return when reports() will next return something, or None if nothing is held back."""
        times = [time for limit in self._limits if (time := limit.next_report_ns()) is not None]
        return min(times) if times else None

    def _reaches(self, after: After, now_ns: int) -> bool:
        """Whether this match is the n-th within the period."""
        resets_s = after.within_s if self._resets_s is None else self._resets_s
        if self._last_match_ns is not None and now_ns - self._last_match_ns >= resets_s * NS:
            self._matches.clear()
            self._has_passed = False
        self._last_match_ns = now_ns
        self._matches.append(now_ns)
        enough = len(self._matches) == after.count and now_ns - self._matches[0] <= after.within_s * NS
        passes = enough and not self._has_passed
        self._has_passed = self._has_passed or enough
        return passes
