"""Decide when to let events gather, so that one wake-up brings many. PURE.

A wake-up costs as much as a dozen events, and in a storm each event could cause one. So under load the sockets are not
polled for a window. An isolated event is always handled at once. Load is many events in one batch, or wake-ups that
follow each other without a pause.

A window is short only where time counts: while attributes are read from /proc, where a process may soon be gone. Exit
records wait in the socket. If no rule runs a hook and no client watches, a log record may come later.
"""

from __future__ import annotations

LOAD_EVENTS = 32  # a batch with this number of events and records means load
LOAD_WAKEUPS = 8  # this number of wake-ups in a row, each within a window of the last, means load
LOAD_GATHERED = 4  # a window with fewer events and records ends the load
PATIENCE = 5  # factor for the window if nothing was looked up in /proc since the last one
PATIENCE_OF_LOGS = 25  # factor if the rules look up nothing at all, and only log


def patience(looked_up: bool, looks_up: bool, is_awaited: bool) -> int:
    """Return the factor for the window.

    `looked_up`: attributes were read from /proc since the last window. `looks_up`: the rules may need such attributes.
    `is_awaited`: a rule runs a hook, or a client is subscribed to matches.
    """
    if looked_up:
        return 1
    return PATIENCE if looks_up or is_awaited else PATIENCE_OF_LOGS


class Gathering:
    """Detects load from the recent wake-ups."""

    def __init__(self) -> None:
        self._hurried = 0
        self._gathering = False

    def window_s(self, most: int, quiet_s: float, gather_s: float, patience: int) -> float:
        """Return for how long not to poll the sockets after a wake-up; 0: poll at once.

        `most`: events and records in the largest batch of this wake-up. `quiet_s`: time since the wake-up before.
        `gather_s`: the setting.
        """
        window_s = gather_s * patience
        if self._gathering:
            self._gathering = most >= LOAD_GATHERED
        else:
            self._hurried = self._hurried + 1 if quiet_s < window_s else 0
            self._gathering = window_s > 0 and (most >= LOAD_EVENTS or self._hurried >= LOAD_WAKEUPS)
        return window_s if self._gathering else 0.0
