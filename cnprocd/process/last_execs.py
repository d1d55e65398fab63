"""Which exec of a process is its last one in a batch: the only one whose program /proc can still show. PURE."""

from __future__ import annotations

from contextlib import suppress
from operator import itemgetter

from cnprocd.connector.event import Row
from cnprocd.connector.uapi import PROC_EVENT_EXEC

_what = itemgetter(0)


class LastExecs:
    """The execs of one batch of events, ordered by time. They are looked for when a rule asks for the first time."""

    def __init__(self, batch: list[Row]) -> None:
        self._batch = batch
        self._times: dict[int, int] | None = None  # tgid -> time of its last exec

    def is_last(self, tgid: int, at_ns: int) -> bool:
        """Whether no exec of this process follows the one at this time."""
        if self._times is None:
            self._times = {}
            whats, at = list(map(_what, self._batch)), -1
            with suppress(ValueError):
                while True:
                    at = whats.index(PROC_EVENT_EXEC, at + 1)
                    self._times[self._batch[at][4]] = self._batch[at][2]
        return at_ns >= self._times.get(tgid, 0)
