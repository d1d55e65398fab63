"""Parents that were read from /proc before: few programs start most of the processes that match.

The start of a process is in its `stat`, which can make a reader wait, so a worker process reads it (see lookups.py).
Its two wake-ups cost 0.2 to 0.3 ms on a machine that sleeps. A pidfd shows that the process which was read still has
its PID. Then its `comm` alone is read, which cannot wait. Its own parent is the one of the first read.
"""

from __future__ import annotations

from dataclasses import replace

from cnprocd.process import procfs
from cnprocd.process.model import Process
from cnprocd.process.pidfd_watch import PidfdWatch

MOST_PARENTS = 32  # each takes a descriptor


class KnownParents:
    """The parents that were read last, with what does not change in their lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Process, PidfdWatch]] = {}  # PID -> the process, its pidfd; the oldest first

    def __len__(self) -> int:
        return len(self._known)

    def read(self, tgid: int) -> Process | None:
        """Return a known process with its name of now; None if it is not known or has ended."""
        if tgid not in self._known:
            return None
        process, watch = self._known[tgid]
        comm = procfs.read_comm(tgid)
        if comm is None or not watch.is_alive():  # in this order: what was read was the process of the pidfd
            del self._known[tgid]
            return None
        return replace(process, comm=comm)

    def add(self, process: Process | None, watch: PidfdWatch) -> None:
        """Remember what was read after the watch was made: it is of the same process if that has not ended."""
        if process is None or process.comm is None or not watch.is_alive():
            return
        while len(self._known) >= MOST_PARENTS:
            del self._known[next(iter(self._known))]
        self._known[process.tgid] = process, watch

    def close(self) -> None:
        """Forget all."""
        self._known.clear()
