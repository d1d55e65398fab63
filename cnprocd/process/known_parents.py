"""Parents that were read from /proc before: few programs start most of the processes that match.

The start of a process is in its `stat`, which can make a reader wait, so a worker process reads it (see lookups.py).
Its two wake-ups cost 0.2 to 0.3 ms on a machine that sleeps. A pidfd shows that the process which was read still has
its PID. Then its `comm` alone is read, which cannot wait. Its own parent is the one of the first read.
"""

from __future__ import annotations

import os
import select
from dataclasses import replace

from cnprocd.process import procfs
from cnprocd.process.model import Process

MOST_PARENTS = 32  # each takes a descriptor


class KnownParents:
    """The parents that were read last, with what does not change in their lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Process, int]] = {}  # PID -> the process, its pidfd; the oldest first

    def __len__(self) -> int:
        return len(self._known)

    def read(self, tgid: int) -> Process | None:
        """Return a known process with its name of now; None if it is not known or has ended."""
        if tgid not in self._known:
            return None
        process, pidfd = self._known[tgid]
        comm = procfs.read_comm(tgid)
        if comm is None or has_ended(pidfd):  # in this order: what was read was the process of the pidfd
            self.forget(tgid)
            return None
        return replace(process, comm=comm)

    def open(self, tgid: int) -> int | None:
        """Return a pidfd for a process that is to be read and added; None if there is none to be had."""
        try:
            return os.pidfd_open(tgid)
        except OSError:
            return None

    def add(self, process: Process | None, pidfd: int) -> None:
        """Remember what was read after the pidfd was opened: it is of the same process if that has not ended."""
        if process is None or process.comm is None or has_ended(pidfd):
            os.close(pidfd)
            return
        while len(self._known) >= MOST_PARENTS:
            self.forget(next(iter(self._known)))
        self._known[process.tgid] = process, pidfd

    def forget(self, tgid: int) -> None:
        """Forget a known process."""
        os.close(self._known.pop(tgid)[1])

    def close(self) -> None:
        """Forget all."""
        for tgid in list(self._known):
            self.forget(tgid)


def has_ended(pidfd: int) -> bool:
    """Return whether all threads of the process have ended (pidfd_open(2): it is readable then)."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
