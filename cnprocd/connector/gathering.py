"""When to let events gather, so that one wake-up brings many. PURE.

A wake-up costs as much as a dozen events, and in a storm each event could be one. So under load the sockets are left
alone for a window; an isolated event is always handled at once. Load is many events in one batch, or wake-ups that
follow each other without a pause. A window lasts longer where nobody has to look into /proc before it is too late:
what an exit record tells waits in the socket.
"""

from __future__ import annotations

LOAD_EVENTS = 32  # a batch of so many events and records means load
LOAD_WAKEUPS = 8  # and so do so many wake-ups, each sooner after the last than events would be gathered for
LOAD_GATHERED = 4  # events and records in a window: with fewer they are no longer waited for
PATIENCE = 5  # a window where nothing is looked up in /proc, in windows


class Gathering:
    """Remembers how the last wake-ups went."""

    def __init__(self) -> None:
        self._hurried = 0
        self._gathering = False

    def window_s(self, most: int, quiet_s: float, gather_s: float, looks_up: bool) -> float:
        """For how long to leave the sockets alone after a wake-up; 0 is not at all.

        `most`: events and records in the largest batch it brought. `quiet_s`: from the wake-up before to this one.
        `gather_s`: the setting. `looks_up`: the rules need what only /proc tells.
        """
        window_s = gather_s if looks_up else gather_s * PATIENCE
        if self._gathering:
            self._gathering = most >= LOAD_GATHERED
        else:
            self._hurried = self._hurried + 1 if quiet_s < window_s else 0
            self._gathering = window_s > 0 and (most >= LOAD_EVENTS or self._hurried >= LOAD_WAKEUPS)
        return window_s if self._gathering else 0.0
