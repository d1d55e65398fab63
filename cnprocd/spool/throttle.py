"""Hold back matches: `after`, `cooldown` and `rate_limit` of a rule. PURE.

There is one Throttle per rule. A match must pass all three, and only a match that does counts for cooldown and
rate_limit. Each of the three counts for the whole rule, or for each value of the field that its `by:` names:

after       passes the n-th match within a period, once. Then nothing passes until there was no match at all for
            `resets` (by default as long as `within`).
cooldown    after a match passed, none passes for that long.
rate_limit  at most `count` pass in any period of `per`. The window slides: a fixed one would pass twice the count
            around a boundary.

Time is an argument: the kernel's time of the event (CLOCK_MONOTONIC), so a stall of the daemon does not bring events
closer together. A recovered match has no such time; the daemon's time of its detection is used instead. Events of two
CPUs may arrive slightly out of order.

An unknown value of `by` is not equal to another unknown value: `after` counts such a match alone, and cooldown lets it
pass. Only rate_limit, which protects from too many matches, counts all of them together.

Matches held back by cooldown and rate_limit are counted and reported once per window, and when the throttle ends.
Matches below the threshold of `after` are not reported.

Memory is bounded although processes choose the keys. A limit of n needs the last n times of each key, so it has at most
MOST_TIMES / n keys, and at most MOST_KEYS. Of the user with the most keys, the one used longest ago is discarded first:
its count begins again, and its budget is full again. Thousands of names of one user discard counts of processes of that
user, and none of others. Discarded keys that still counted are reported (Discarded). Refusing new keys instead would
let the first process that makes many names disable the rule for all others. Counts for more keys than that, and for
more than MOST_SHOWN at the same time, are reported under OTHER_KEYS. After a restart every budget is full.
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Literal

from cnprocd.json_value import JsonObject
from cnprocd.rules.ruleset import After, ByField, Cooldown, RateLimit

NS = 1_000_000_000
MOST_KEYS = 4096
MOST_TIMES = 262_144
MOST_SHOWN = 100  # keys that are reported one by one at the same time: 4,096 records would stop the loop for 0.2 s
DISCARDS_EVERY_NS = 60 * NS
WHOLE_RULE = ""
UNKNOWN = "(unknown)"
OTHER_KEYS = "(others)"

Holder = Literal["after", "cooldown", "rate_limit"]


@dataclass(frozen=True, slots=True)
class HeldBack:
    """The matches that one window held back, for the record `throttled`. `key` is text of a process: escape it."""

    rule: str
    held_by: Holder
    by: ByField
    key: str
    count: int
    window_s: float


@dataclass(frozen=True, slots=True)
class Discarded:
    """How many keys lost their count because there were too many, for the record `throttle_keys_discarded`."""

    rule: str
    held_by: Holder
    by: ByField
    count: int
    limit: int


def key_of(by: ByField, record: JsonObject) -> str | None:
    """Return the key of a record for `by`, or None if the field is unknown. Different bytes give different keys."""
    if by == "rule":
        return WHOLE_RULE
    value = record.get(by)
    if value is None:
        return None
    exact = record.get(f"{by}_hex")  # escaping changed the text
    return str(value) if exact is None else f"{value}\0{exact}"


def owner_of(record: JsonObject) -> int | None:
    """Return the user of the process that a record is about."""
    uid = record.get("uid")
    return uid if isinstance(uid, int) else None


@dataclass(slots=True)
class _Times:
    """The times of the latest matches of one key, in order."""

    times: deque[int]
    owner: int | None  # the user of the process that made the key
    fired: bool = False

    def add(self, now_ns: int) -> None:
        """Add a time. One that is out of order is put in its place."""
        if not self.times or now_ns >= self.times[-1]:
            self.times.append(now_ns)
        elif len(self.times) < (self.times.maxlen or 0):
            bisect.insort(self.times, now_ns)
        elif now_ns > self.times[0]:
            self.times.popleft()
            bisect.insort(self.times, now_ns)

    @property
    def full(self) -> bool:
        return len(self.times) == self.times.maxlen


class _Keys:
    """The times of each key, bounded. A key counts until `window_ns` after its last time."""

    def __init__(self, count: int, window_ns: int) -> None:
        self.most = max(1, min(MOST_KEYS, MOST_TIMES // count))
        self.discarded = 0
        self._count = count
        self._window_ns = window_ns
        self._first_discard_ns: int | None = None
        self._times: OrderedDict[str, _Times] = OrderedDict()
        self._owned: dict[int | None, OrderedDict[str, None]] = {}  # the keys of each user, that used last at the end
        self._with: list[dict[int | None, None]] = [{}]  # the users by their number of keys; the last is not empty

    def __len__(self) -> int:
        return len(self._times)

    def find(self, key: str) -> _Times | None:
        return self._times.get(key)

    def use(self, key: str, now_ns: int, owner: int | None) -> _Times:
        """Return the times of a key, which becomes the one used last. `owner`: the user of the process."""
        found = self._times.get(key)
        if found is None:
            if len(self._times) >= self.most:
                self._discard(now_ns)
            found = self._times[key] = _Times(deque(maxlen=self._count), owner)
            self._own(key, owner)
        self._times.move_to_end(key)
        self._owned[found.owner].move_to_end(key)
        return found

    def _discard(self, now_ns: int) -> None:
        one_each = len(self._owned) == len(self._times)
        key = next(iter(self._times if one_each else self._owned[next(iter(self._with[-1]))]))
        oldest = self._times.pop(key)
        self._disown(key, oldest.owner)
        if oldest.times and now_ns - oldest.times[-1] < self._window_ns:
            self.discarded += 1
            self._first_discard_ns = now_ns if self._first_discard_ns is None else self._first_discard_ns

    def _own(self, key: str, owner: int | None) -> None:
        of_owner = self._owned.setdefault(owner, OrderedDict())
        self._with[len(of_owner)].pop(owner, None)
        of_owner[key] = None
        if len(of_owner) == len(self._with):
            self._with.append({})
        self._with[len(of_owner)][owner] = None

    def _disown(self, key: str, owner: int | None) -> None:
        of_owner = self._owned[owner]
        del self._with[len(of_owner)][owner], of_owner[key]
        if of_owner:
            self._with[len(of_owner)][owner] = None
        else:
            del self._owned[owner]
        if len(self._with) > 1 and not self._with[-1]:
            self._with.pop()  # the one before has this user, or other users of fewer keys come next

    def next_report_ns(self) -> int | None:
        return None if self._first_discard_ns is None else self._first_discard_ns + DISCARDS_EVERY_NS

    def take_discarded(self, now_ns: int) -> int:
        """Return the number of discarded keys once a minute, else 0."""
        due_ns = self.next_report_ns()
        if due_ns is None or now_ns < due_ns:
            return 0
        count, self.discarded, self._first_discard_ns = self.discarded, 0, None
        return count


class _Escalation:
    """The state of `after`. `resets_s` None means as long as `within`."""

    held_by: Holder = "after"

    def __init__(self, after: After, resets_s: float | None) -> None:
        self.by = after.by
        self._after = after
        self._within_ns = int(after.within_s * NS)
        self._resets_ns = self._within_ns if resets_s is None else int(resets_s * NS)
        self.keys = _Keys(after.count, max(self._within_ns, self._resets_ns))

    def reaches(self, record: JsonObject, now_ns: int) -> bool:
        """Count a match. Return whether it is the n-th of its key within the period."""
        key = key_of(self.by, record)
        if key is None:
            return self._after.count == 1
        seen = self.keys.use(key, now_ns, owner_of(record))
        if seen.times and now_ns - seen.times[-1] >= self._resets_ns:
            seen.times.clear()
            seen.fired = False
        seen.add(now_ns)
        enough = seen.full and seen.times[-1] - seen.times[0] <= self._within_ns
        passes = enough and not seen.fired
        seen.fired = seen.fired or enough
        return passes

    def is_below(self, record: JsonObject, more: int) -> bool:
        """Return whether a match of this key certainly does not pass, even after so many more."""
        key = key_of(self.by, record)
        seen = None if key is None else self.keys.find(key)
        return (0 if seen is None else len(seen.times)) + more + 1 < self._after.count

    def is_spent(self, record: JsonObject, now_ns: int) -> bool:
        """Return whether a match of this key certainly does not pass: one has, and the count has not begun anew."""
        key = key_of(self.by, record)
        seen = None if key is None else self.keys.find(key)
        return seen is not None and seen.fired and bool(seen.times) and now_ns - seen.times[-1] < self._resets_ns


@dataclass(slots=True)
class _Held:
    opened_ns: int
    count: int = 0


@dataclass(slots=True)
class _Sliding:
    """A sliding window per key: the times of the last `count` matches that passed."""

    held_by: Holder
    by: ByField
    keys: _Keys
    per_ns: int
    held: dict[str, _Held] = field(default_factory=dict)  # in the order of opened_ns

    def key_of(self, record: JsonObject) -> str | None:
        """Return the key of a record, or None if this limit does not apply to it."""
        key = key_of(self.by, record)
        return UNKNOWN if key is None and self.held_by == "rate_limit" else key

    def allows(self, key: str, now_ns: int) -> bool:
        passed = self.keys.find(key)
        return passed is None or not passed.full or now_ns - passed.times[0] >= self.per_ns

    def note_held(self, key: str, now_ns: int, count: int = 1) -> None:
        if key not in self.held and len(self.held) >= MOST_KEYS:
            key = OTHER_KEYS
        self.held.setdefault(key, _Held(now_ns)).count += count

    def reports(self, rule: str, now_ns: int) -> list[HeldBack]:
        """Return what the windows that have closed have held back: the largest counts by key, the others together."""
        ripe = {key: held.count for key, held in self.held.items() if now_ns - held.opened_ns >= self.per_ns}
        for key in ripe:
            del self.held[key]
        return self._shown(rule, ripe)

    def take_open(self, rule: str) -> list[HeldBack]:
        """Return the same of all windows, open or not."""
        held, self.held = self.held, {}
        return self._shown(rule, {key: one.count for key, one in held.items()})

    def _shown(self, rule: str, counts: dict[str, int]) -> list[HeldBack]:
        if len(counts) > MOST_SHOWN:
            total = sum(counts.values())
            counts = dict(Counter(counts).most_common(MOST_SHOWN))
            counts[OTHER_KEYS] = counts.get(OTHER_KEYS, 0) + total - sum(counts.values())
        shown = ((key.partition("\0")[0], count) for key, count in counts.items())
        return [HeldBack(rule, self.held_by, self.by, key, count, self.per_ns / NS) for key, count in shown]

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
        cooldown: Cooldown | None = None,
        after: After | None = None,
        resets_s: float | None = None,
    ) -> None:
        self.rule = rule
        self._after = _Escalation(after, resets_s) if after is not None else None
        self._limits: list[_Sliding] = []
        if cooldown is not None:
            per_ns = int(cooldown.for_s * NS)
            self._limits.append(_Sliding("cooldown", cooldown.by, _Keys(1, per_ns), per_ns))
        if rate_limit is not None:
            per_ns = int(rate_limit.per_s * NS)
            keys = _Keys(rate_limit.count, per_ns)
            self._limits.append(_Sliding("rate_limit", rate_limit.by, keys, per_ns))

    @property
    def by(self) -> frozenset[ByField]:
        """The fields of a record that admit() needs."""
        after = () if self._after is None else (self._after.by,)
        return frozenset((*after, *(limit.by for limit in self._limits))) - {"rule"}

    def admit(self, record: JsonObject, now_ns: int) -> Holder | None:
        """Return None if the match passes, else the limit that held it back. `now_ns` is the time of the event."""
        if self._after is not None and not self._after.reaches(record, now_ns):
            return "after"
        keyed = [(limit, key) for limit in self._limits if (key := limit.key_of(record)) is not None]
        held = self._holding(record, now_ns)
        if held is not None:
            held[0].note_held(held[1], now_ns)
            return held[0].held_by
        for limit, key in keyed:
            limit.keys.use(key, now_ns, owner_of(record)).add(now_ns)
        return None

    def holds(self, record: JsonObject, now_ns: int) -> bool:
        """Return whether matches like this one are certainly held back now. Nothing is counted."""
        if self._after is not None:
            return self._after.is_spent(record, now_ns)
        return self._holding(record, now_ns) is not None

    def is_below(self, record: JsonObject, more: int) -> bool:
        """Return whether `after` certainly holds back a match like this one, after so many more are counted."""
        return self._after is not None and self._after.is_below(record, more)

    def hold(self, record: JsonObject, now_ns: int, count: int) -> None:
        """Count matches like this one, for which `holds` or `is_below` has returned True."""
        if self._after is not None:
            self._after.reaches(record, now_ns)
            return
        keyed = [(limit, key) for limit in self._limits if (key := limit.key_of(record)) is not None]
        limit, key = self._holding(record, now_ns) or keyed[0]
        limit.note_held(key, now_ns, count)

    def _holding(self, record: JsonObject, now_ns: int) -> tuple[_Sliding, str] | None:
        """Return the limit that holds back such a match, and its key."""
        for limit in self._limits:
            key = limit.key_of(record)
            if key is not None and not limit.allows(key, now_ns):
                return limit, key
        return None

    def reports(self, now_ns: int) -> list[HeldBack]:
        """Return the held back matches of all windows that have closed since the last call."""
        return [held for limit in self._limits for held in limit.reports(self.rule, now_ns)]

    def take_open(self) -> list[HeldBack]:
        """Return the held back matches of all windows, because this throttle is used no longer."""
        return [held for limit in self._limits for held in limit.take_open(self.rule)]

    def discarded(self, now_ns: int) -> list[Discarded]:
        """Return the keys that were discarded while they still counted: of each limit once a minute."""
        parts: list[_Sliding | _Escalation] = [*self._limits]
        parts += [self._after] if self._after is not None else []
        counted = [(part, part.keys.take_discarded(now_ns)) for part in parts]
        return [Discarded(self.rule, part.held_by, part.by, count, part.keys.most) for part, count in counted if count]

    def next_report_ns(self) -> int | None:
        """Return when reports() or discarded() will next return something, or None if nothing is to be reported."""
        keys = [limit.keys for limit in self._limits] + ([self._after.keys] if self._after is not None else [])
        times = [*(limit.next_report_ns() for limit in self._limits), *(one.next_report_ns() for one in keys)]
        return min((time for time in times if time is not None), default=None)
