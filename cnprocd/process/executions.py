"""What processes execute: read from /proc early, and taken only if /proc can have shown no other program. PURE.

An event says that a program was executed, and /proc shows which one runs now. That is the same one only if the process
has not called execve(2) again before it was read. So all execs of a batch are read before the batch is taken, and after
that the queue is looked at for events that came meanwhile. An exec that another one follows was read too late. (An exec
that is under way, and whose event is not sent yet, is detected by stat.py.)

A comm may be a later one as well, if the process changed it between the exec and the read. The event shows that. The
child of a thread has the comm of that thread, which no event names. It is read in the same way.

If more is queued than a look can show, a program is taken, and is in doubt at the events that came before it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import compress
from operator import itemgetter, ne

from cnprocd.connector.ahead import Ahead, nothing_ahead
from cnprocd.connector.event import Row
from cnprocd.connector.uapi import PROC_EVENT_COMM, PROC_EVENT_EXEC, PROC_EVENT_FORK, PROC_EVENT_UID
from cnprocd.process.model import MoreIds, Process, ProcLookup, Wanted
from cnprocd.process.table import START_TOLERANCE_NS
from cnprocd.process.tracking import Tracking

_what, _tid, _tgid = map(itemgetter, (0, 3, 4))
_MOST_DOUBTS = 4096


class Executions:
    """The execs of one batch after the other."""

    def __init__(self, procfs: ProcLookup) -> None:
        self._procfs = procfs
        self._batch: list[Row] = []
        self._look_ahead: Callable[[], Ahead] = nothing_ahead
        self._last: dict[int, int] = {}  # tgid -> time of its last exec, or of its fork by a thread
        self._renamed: dict[int, list[int]] = {}  # tgid -> times of its new comms
        self._with_new_ids: dict[int, list[int]] = {}  # tgid -> times of its new user ids
        self._read: dict[int, Process | None] | None = None  # None: nothing was read yet
        self._is_certain = True
        self._doubts: dict[int, int] = {}  # tgid -> when its program was read

    def begin(self, batch: list[Row], tracking: Tracking, look_ahead: Callable[[], Ahead]) -> None:
        """Read what the processes of this batch execute, as far as the plan needs it."""
        wanted = tracking.wanted_at_exec
        if wanted is None:
            return
        self._batch, self._look_ahead = batch, look_ahead
        self._last, self._renamed, self._with_new_ids, self._read = {}, {}, {}, None
        self._note(batch)
        if self._last:
            self._read_all(wanted)

    def program(self, tgid: int, at_ns: int) -> Process | None:
        """Return what the process executed at this time; None if it was gone.

        If it has executed another program before it was read, only its ids, cgroup and login session are known. If it
        has changed its comm or its user ids before, all but these.
        """
        if self._doubts:
            self._doubts.pop(tgid, None)
        found = self._read[tgid] if self._read else None
        if found is None or (found.start_ns or 0) > at_ns + START_TOLERANCE_NS:
            return None
        has_new_ids = _is_between(at_ns, self._with_new_ids.get(tgid), found.counted_ns)
        if at_ns < self._last[tgid]:
            known = Process(tgid, start_ns=found.start_ns, cgroup=found.cgroup, cgroup_source=found.cgroup_source)
            known.more_ids = found.more_ids
            if not has_new_ids:
                known.take_ids(found, found.ids_source)
            elif found.loginuid is not None:
                known.more_ids = MoreIds(loginuid=found.loginuid)
            return known
        if has_new_ids:
            found.uid = found.gid = None
            found.ids_source, found.more_ids = "unknown", MoreIds(loginuid=found.loginuid)
        if not self._is_certain:
            self._doubts[tgid] = found.counted_ns
        if _is_between(at_ns, self._renamed.get(tgid), found.counted_ns):
            found.comm, found.comm_source = None, "unknown"
        return found

    def born(self, tgid: int, at_ns: int, wanted: Wanted) -> Process | None:
        """Return the process that was forked at this time, if its comm is not that of a known process."""
        if self._read is None:
            self._read_all(wanted)
        assert self._read is not None
        if tgid in self._read:
            return self.program(tgid, at_ns)
        found = self._procfs.read(tgid, wanted, "procfs")
        if found is not None:
            self._doubts[tgid] = found.counted_ns
        return found

    def is_in_doubt(self, tgid: int, at_ns: int) -> bool:
        """Return whether the process may have run another program than the known one at this time."""
        return bool(self._doubts) and at_ns < self._doubts.get(tgid, 0)

    def _read_all(self, wanted: Wanted) -> None:
        read = self._procfs.read
        self._read = {tgid: read(tgid, wanted, "exec") for tgid in self._last}
        by_threads = compress(self._batch, map(ne, map(_tid, self._batch), map(_tgid, self._batch)))
        for row in by_threads:
            if row[0] == PROC_EVENT_FORK and row[5] == row[6] and row[6] not in self._read:
                self._last[row[6]], self._read[row[6]] = row[2], read(row[6], wanted, "procfs")
        ahead, self._is_certain = self._look_ahead()
        self._note(ahead)
        if len(self._doubts) > _MOST_DOUBTS:
            self._doubts.clear()

    def _note(self, events: list[Row]) -> None:
        if not events:
            return
        whats, last = list(map(_what, events)), self._last
        for at in _places(PROC_EVENT_EXEC, whats):
            _, _, at_ns, _, tgid = events[at][:5]
            if tgid not in last or last[tgid] < at_ns:
                last[tgid] = at_ns
        for at in _places(PROC_EVENT_COMM, whats):
            _, _, at_ns, tid, tgid = events[at][:5]
            if tid == tgid:
                self._renamed.setdefault(tgid, []).append(at_ns)
        for at in _places(PROC_EVENT_UID, whats):
            _, _, at_ns, tid, tgid = events[at][:5]
            if tid == tgid:
                self._with_new_ids.setdefault(tgid, []).append(at_ns)


def _is_between(at_ns: int, times_ns: list[int] | None, read_ns: int) -> bool:
    """Return whether something happened after an event and before the read that followed it."""
    return times_ns is not None and any(at_ns < one <= read_ns for one in times_ns)


def _places(what: int, whats: list[int]) -> Iterator[int]:
    """Yield where `what` is in a list that mostly lacks it."""
    at = -1
    with suppress(ValueError):
        while True:
            at = whats.index(what, at + 1)
            yield at
