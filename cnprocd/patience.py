"""How long the event loop waits for an edge. PURE."""

from __future__ import annotations


class Patience:
    """How long the loop may wait for answers that turn out to be late: SHARE of the time, saved up to LONGEST_S.

    An answer that comes in time costs nothing. The caller passes the clock.
    """

    SHARE = 0.1
    LONGEST_S = 0.2

    def __init__(self, deadline_s: float, shortest_s: float) -> None:
        """`shortest_s`: what every piece gets, however many were late."""
        self._deadline_s = deadline_s
        self._shortest_s = shortest_s
        self._left_s = self.LONGEST_S
        self._at_s: float | None = None

    def wait_s(self, now_s: float) -> float:
        """Return the deadline of a piece that begins now."""
        if self._at_s is not None:
            self._left_s = min(self.LONGEST_S, self._left_s + (now_s - self._at_s) * self.SHARE)
        self._at_s = now_s
        return min(self._deadline_s, max(self._shortest_s, self._left_s))

    def spend(self, seconds: float) -> None:
        """Note that a piece was late after so long."""
        self._left_s = max(0.0, self._left_s - seconds)
