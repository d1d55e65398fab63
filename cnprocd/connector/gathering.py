"""Decide when to let events gather, so that one wake-up brings many. PURE.

A wake-up costs as much as a dozen events, and in a storm each event could cause one. So under load the sockets are not
polled for a window. An isolated event is always handled at once. Load is many events in one batch, or wake-ups that
follow each other without a pause. A window lasts longer if the rules need nothing from /proc, where a process may soon
be gone: exit records wait in the socket.
"""

from __future__ import annotations

LOAD_EVENTS = 32  # a batch with this number of events and records means load
LOAD_WAKEUPS = 8  # this number of wake-ups in a row, each within a window of the last, means load
LOAD_GATHERED = 4  # a window with fewer events and records ends the load
PATIENCE = 5  # factor for the window if nothing is looked up in /proc


class Gathering:
    """Detects load from the recent wake-ups."""

    def __init__(self) -> None:
        self._hurried = 0
        self._gathering = False

    def window_s(self, most: int, quiet_s: float, gather_s: float, looks_up: bool) -> float:
        """Return for how long not to poll the sockets after a wake-up; 0: poll at once.

        `most`: events and records in the largest batch of this wake-up. `quiet_s`: time since the wake-up before.
        `gather_s`: the setting. `looks_up`: the rules need attributes that only /proc has.
        """
        window_s = gather_s if looks_up else gather_s * PATIENCE
        if self._gathering:
            self._gathering = most >= LOAD_GATHERED
        else:
            self._hurried = self._hurried + 1 if quiet_s < window_s else 0
            self._gathering = window_s > 0 and (most >= LOAD_EVENTS or self._hurried >= LOAD_WAKEUPS)
        return window_s if self._gathering else 0.0
