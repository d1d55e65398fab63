"""While the daemon is behind, count the matches of rules that flood it instead of reporting each. PURE.

An unprivileged user can make 16,000 processes fail in a second, and each match costs ten times what an event costs. If
events wait for longer than BEHIND_S, and for no shorter time after PATIENCE_S, a rule may have MOST_A_SECOND matches a
second reported, and as many of root's processes; further ones are counted by rule. So one rule's flood delays no other
rule's matches, and the sum is exact. It ends when events wait for less than CAUGHT_UP_S.

A backlog that becomes shorter is no flood: after a standstill (a restart, SIGSTOP) everything is reported. A match that
runs a hook is always reported, so the caller does not ask about it.

The caller passes the clock.
"""

from __future__ import annotations

from collections import Counter

BEHIND_S = 0.25
CAUGHT_UP_S = 0.05
PATIENCE_S = 0.5
MOST_A_SECOND = 100


class Flood:
    """Decides which matches are reported, and counts the others."""

    def __init__(self) -> None:
        self.behind = False
        self._late_since: tuple[float, float] | None = None  # the time, and the lag then
        self.counted: Counter[str] = Counter()  # matches that were not reported, by rule, since start
        self._unreported: Counter[str] = Counter()
        self._passed: Counter[tuple[str, bool]] = Counter()  # in this second
        self._second = 0

    def note_lag(self, lag_s: float, now_s: float) -> None:
        """Note for how long the events of a batch have waited."""
        if lag_s <= (BEHIND_S if self._late_since is None else CAUGHT_UP_S):
            self._late_since, self.behind = None, False
        elif self._late_since is None:
            self._late_since = now_s, lag_s
        elif now_s - self._late_since[0] >= PATIENCE_S:
            self.behind = self.behind or lag_s >= self._late_since[1]
            self._late_since = now_s, lag_s
        if int(now_s) != self._second:
            self._second = int(now_s)
            self._passed.clear()

    def admits(self, rule: str, uid: int | None) -> bool:
        """Return whether to report a match of a process of this user. If not, it is counted."""
        if not self.behind:
            return True
        key = rule, uid == 0
        self._passed[key] += 1
        if self._passed[key] <= MOST_A_SECOND:
            return True
        self.counted[rule] += 1
        self._unreported[rule] += 1
        return False

    def take_unreported(self) -> Counter[str]:
        """Return the matches that were counted since the last call, by rule."""
        taken, self._unreported = self._unreported, Counter()
        return taken
