"""The way to the spool's file: a process that may wait for the disk (ChildDisk), or the calling process (DirectDisk).

A write to a frozen or dying disk waits in the kernel where no signal ends it, and wait(2) waits for every thread of a
process. So the file belongs to a child process. The daemon never waits for it longer than it wants to, and ends without
it. The child then does what it was asked for as soon as the disk answers, and ends at EOF.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

from cnprocd.edge import Counters, Edge, Limits, Missed
from cnprocd.spool.disk_messages import Answer, Failed, Request
from cnprocd.spool.disk_worker import DiskWorker
from cnprocd.spool.spool_file import SpoolFile

_LIMITS = Limits(deadline_s=math.inf, inbox=4)  # copy_on_disk.py hands over one request at a time


class Disk(Protocol):
    """Carries out requests, one after the other. The answer comes to `done`, at once or from the loop."""

    def send(self, request: Request, done: Callable[[Answer], None]) -> None: ...

    def wait(self, within_s: float) -> bool:
        """Wait until a request has been answered, at most so long. Return whether one has."""

    def leave(self, request: Request) -> None:
        """Leave a last request behind: nothing waits for its answer any more."""

    def close(self) -> None:
        """Wait for nothing. What was sent is still carried out."""

    @property
    def stalled_s(self) -> float:
        """For how long the request that is being carried out has taken."""


class DirectDisk:
    """The file in this process, for commands and tests: every call waits for the disk."""

    stalled_s = 0.0

    def __init__(self) -> None:
        self.file = SpoolFile()

    def send(self, request: Request, done: Callable[[Answer], None]) -> None:
        answer = self.file.handle(request)
        self.file.upkeep()
        done(answer)

    def wait(self, within_s: float) -> bool:
        return True

    def leave(self, request: Request) -> None:
        self.file.handle(request)

    def close(self) -> None:
        """Nothing is left to be done."""


class ChildDisk:
    """The file in a process of its own."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        blame: Callable[[str, float], None] | None = None,
        first: DiskWorker | None = None,
    ) -> None:
        """`first`: the process, if it was started before."""
        self._first = first
        self._worker: DiskWorker | None = None
        self.edge: Edge[Request, Answer] = Edge("disk", self._start, _LIMITS, loop, blame=blame)

    @property
    def counters(self) -> Counters:
        return self.edge.counters

    @property
    def stalled_s(self) -> float:
        return self.edge.stalled_s

    def send(self, request: Request, done: Callable[[Answer], None]) -> None:
        def answered(answer: Answer | Missed) -> None:
            done(Failed("the process of the spool has ended") if isinstance(answer, Missed) else answer)

        if not self.edge.submit(request, answered):
            done(Failed("cannot start the process of the spool"))

    def wait(self, within_s: float) -> bool:
        return self.edge.wait(within_s)

    def leave(self, request: Request) -> None:
        if self._worker is not None:
            self._worker.leave(request)

    def close(self) -> None:
        self.edge.close()

    def _start(self) -> DiskWorker:
        self._worker, self._first = self._first or DiskWorker(), None
        return self._worker
