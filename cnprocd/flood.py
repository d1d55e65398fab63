"""During a flood, report the matches within a budget at once, and the others later or not at all. PURE.

An unprivileged user can make 30,000 processes fail in a second, and to report a match costs ten times what its event
costs. A flood begins when many events have waited for longer than BEHIND_S. (Few wait after a stall, or at a start.)
During it these matches are reported at once:

    of each rule                          SHARE a second
    of root's processes, of each rule     SHARE a second
    of all rules together, beyond these   COMMON a second; half of it after each PATIENCE_S in which this was too many
    of each rule with a hook              JOBS a second, and JOBS_AT_ONCE at once
    into the backlog, of each rule        REQUESTS a second, and REQUESTS_AT_ONCE at once, if events wait for BACKLOG_S
    of each rule that gathers its hooks   HOOKS a second, and HOOKS_AT_ONCE at once; the others are counted

The others are reported when no events wait (deferred.py), as far as there is room for them, and are counted by rule
beyond that. So a burst is reported whole, a flood of one rule delays no other rule's matches, and the sum is exact.
Those that run a hook are put into the backlog (spool/backlog.py), as long as it and the spool have room (dispatch.py),
and as long as that does not delay all others: to make a request costs as much as to report a match.

The budgets are of the kernel's time of the events. So a backlog is not a flood: after a standstill (a restart, SIGSTOP)
everything is reported, unless more happened in each second than could be reported. For the same reason the flood ends
only after CALM_S in which each match was reported at once: without these reports no events wait, however many come.

The caller passes the clock.
"""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

from cnprocd.log import Log

BEHIND_S = 0.1
MANY = 64  # events of one batch
LATE_S = 0.1
CAUGHT_UP_S = 0.05
PATIENCE_S = 0.25
CALM_S = 1.0
SHARE = 100.0
COMMON = 2000.0
LEAST_COMMON = 100.0
COMMON_BURST_S = 0.25  # of the common budget may be used at once
HOOKS, HOOKS_AT_ONCE = 500.0, 5000.0
JOBS, JOBS_AT_ONCE = 100.0, 200.0
REQUESTS, REQUESTS_AT_ONCE, BACKLOG_S = 500.0, 1000.0, 0.7

K = TypeVar("K")


class _Budget:
    """So many matches a second, and at most `burst` at once."""

    __slots__ = ("_at_s", "_left")

    def __init__(self, burst: float) -> None:
        self._left = burst
        self._at_s: float | None = None

    def left(self, now_s: float, a_second: float, burst: float) -> int:
        """Return how many more matches are within the budget."""
        return int(min(burst, self._left + max(0.0, now_s - (self._at_s or now_s)) * a_second))

    def take(self, now_s: float, a_second: float, burst: float) -> bool:
        """Return whether one more match is within the budget. The times of two CPUs may be out of order."""
        if self._at_s is None:
            self._at_s = now_s
        elif now_s > self._at_s:
            self._left = min(burst, self._left + (now_s - self._at_s) * a_second)
            self._at_s = now_s
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def _take(budgets: dict[K, _Budget], key: K, now_s: float, a_second: float, burst: float) -> bool:
    """Return whether one more match of this key is within its budget. A new key has all of it."""
    budget = budgets.get(key)
    if budget is None:
        budget = budgets[key] = _Budget(burst)
    return budget.take(now_s, a_second, burst)


def _left(budgets: dict[K, _Budget], key: K, now_s: float, a_second: float, burst: float) -> int:
    return int(burst) if key not in budgets else budgets[key].left(now_s, a_second, burst)


class Flood:
    """Decides which matches are reported at once, and counts those that are not reported."""

    def __init__(self) -> None:
        self.active = False
        self.lag_s = 0.0  # of the last batch
        self._noted_s = 0.0  # when it was read
        self.counted: Counter[str] = Counter()  # matches that were not reported, by rule, since start
        self._unreported: Counter[str] = Counter()
        self._hooks: dict[str, _Budget] = {}
        self._jobs: dict[str, _Budget] = {}
        self._requests: dict[str, _Budget] = {}
        self._shares: dict[tuple[str, bool], _Budget] = {}
        self._common = _Budget(COMMON * COMMON_BURST_S)
        self._common_a_second = COMMON
        self._exceeded_at_s = 0.0
        self._exceeded = False  # since the last batch
        self._compared = (0.0, 0.0)  # when the lag was last compared, and the lag then
        self.seen_s = 0.0  # the kernel's time of the latest event

    def note_batch(self, first_s: float, last_s: float, now_s: float, count: int = MANY) -> None:
        """Note the times of the first and the last event of a batch, when it was read, and how many events it has."""
        self._noted_s = now_s
        self.seen_s = max(self.seen_s, last_s)
        lag_s = self.lag_s = now_s - first_s
        if not self.active:
            if lag_s > BEHIND_S and count >= MANY:
                self._begin(lag_s, now_s)
            return
        if self._exceeded:
            self._exceeded, self._exceeded_at_s = False, now_s
        if now_s - self._compared[0] >= PATIENCE_S:
            self._adapt(lag_s, now_s)
        if lag_s <= CAUGHT_UP_S and now_s - self._exceeded_at_s >= CALM_S:
            self.active = False

    def note_silence(self, now_s: float) -> None:
        """Note that no event has come since the last batch. After CALM_S the flood is over."""
        if self.active and now_s - self._noted_s >= CALM_S:
            self.active = False

    def admits(self, rule: str, uid: int | None, at_s: float | None, has_room: bool = True) -> bool:
        """Return whether to report a match of a process of this user at once.

        `at_s`: the time of the event; None if it was lost. `has_room`: whether the log takes more than the shares now.
        After a standstill of seconds the budgets of all of them are there at once.
        """
        if not self.active:
            return True
        at_s = self.seen_s if at_s is None else at_s
        if _take(self._shares, (rule, uid == 0), at_s, SHARE, SHARE):
            return True
        if has_room and self._common.take(at_s, self._common_a_second, self._common_a_second * COMMON_BURST_S):
            return True
        self._exceeded = True
        return False

    def admits_hook(self, rule: str, at_s: float | None) -> bool:
        """Return whether to report a match whose hook needs no room in the spool. If not, it is counted."""
        if self.admits_request(rule, at_s) and _take(
            self._hooks, rule, self.seen_s if at_s is None else at_s, HOOKS, HOOKS_AT_ONCE
        ):
            return True
        self.count(rule)
        return False

    def admits_job(self, rule: str, at_s: float | None) -> bool:
        """Return whether to make the job of a match at once. If not, its request waits in the backlog."""
        if not self.active:
            return True
        if _take(self._jobs, rule, self.seen_s if at_s is None else at_s, JOBS, JOBS_AT_ONCE):
            return True
        self._exceeded = True
        return False

    def admits_request(self, rule: str, at_s: float | None) -> bool:
        """Return whether a match with a hook is reported or put into the backlog. If not, its job is dropped."""
        within = _take(self._requests, rule, self.seen_s if at_s is None else at_s, REQUESTS, REQUESTS_AT_ONCE)
        return within or self.lag_s < BACKLOG_S

    def room_for_requests(self, rule: str) -> int | None:
        """Return how many more matches `admits_request` would admit, if they were of now. None: any number."""
        if self.lag_s < BACKLOG_S:
            return None
        return _left(self._requests, rule, self.seen_s, REQUESTS, REQUESTS_AT_ONCE)

    def room(self, rule: str, uid: int, has_room: bool) -> int:
        """Return how many more matches `admits` would admit, if they were of now."""
        shares = _left(self._shares, (rule, uid == 0), self.seen_s, SHARE, SHARE)
        if not has_room:
            return shares
        return shares + self._common.left(self.seen_s, self._common_a_second, self._common_a_second * COMMON_BURST_S)

    def room_for_hooks(self, rule: str) -> int:
        """Return how many more matches `admits_hook` would admit, if they were of now."""
        hooks, requests = _left(self._hooks, rule, self.seen_s, HOOKS, HOOKS_AT_ONCE), self.room_for_requests(rule)
        return hooks if requests is None else min(hooks, requests)

    def note_held(self) -> None:
        """Note that throttles hold back so many matches that the flood is not over."""
        self._exceeded = True

    def count(self, rule: str, count: int = 1) -> None:
        """Count matches that are not reported."""
        self._exceeded = True
        self.note_dropped(rule, count)

    def note_dropped(self, rule: str, count: int) -> None:
        """Count matches that are not reported because their deferred jobs were dropped."""
        self.counted[rule] += count
        self._unreported[rule] += count

    def take_unreported(self) -> Counter[str]:
        """Return the matches that were counted since the last call, by rule."""
        taken, self._unreported = self._unreported, Counter()
        return taken

    def report(self, log: Log) -> None:
        """Log these matches."""
        for rule, count in self.take_unreported().items():
            message = f"{rule}: {count} matches of a flood were counted and not reported"
            log("warning", "matches_counted", rule=rule, count=count, message=message)

    def _begin(self, lag_s: float, now_s: float) -> None:
        self.active = True
        self._exceeded = False
        self._exceeded_at_s = now_s
        self._compared = now_s, lag_s
        self._common_a_second = COMMON
        self._common = _Budget(COMMON * COMMON_BURST_S)
        self._shares.clear()
        self._hooks.clear()
        self._jobs.clear()
        self._requests.clear()

    def _adapt(self, lag_s: float, now_s: float) -> None:
        """Report less if events wait no shorter time than before, and more if they do not wait."""
        if lag_s > LATE_S and lag_s >= self._compared[1]:
            self._common_a_second = max(LEAST_COMMON, self._common_a_second / 2)
        elif lag_s <= CAUGHT_UP_S:
            self._common_a_second = min(COMMON, self._common_a_second + LEAST_COMMON)
        self._compared = now_s, lag_s
