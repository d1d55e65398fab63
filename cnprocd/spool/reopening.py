"""When a spool file that has failed is opened again. PURE."""

from __future__ import annotations


class Reopening:
    """Tries at once, and then after pauses that double."""

    def __init__(self) -> None:
        self._next_s = self._pause_s = 0.0

    def is_due(self, now_s: float, durable: bool, first_s: float, most_s: float) -> bool:
        """Return whether to try now. `first_s` and `most_s` bound the pause."""
        if durable:
            self._pause_s = 0.0
        if durable or now_s < self._next_s:
            return False
        self._pause_s = min(max(first_s, 2 * self._pause_s), most_s)
        self._next_s = now_s + self._pause_s
        return True
