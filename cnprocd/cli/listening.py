"""A subscription to all events of the kernel, for the duration of one command.

It asks for the full mask without filters, so it is expensive on a busy machine. The daemon's subscription is another
socket with its own mask and is not affected. Every end of the command (Ctrl-C, TERM, a closed pipe, the end of its
time) passes through `with`, which sends IGNORE: the kernel counts listeners globally, and with a leaked count it would
go on to make events without a listener (drivers/connector/cn_proc.c).
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from types import TracebackType

from cnprocd.connector import uapi
from cnprocd.connector.filter import ConnectorFilter, TaskstatsFilter
from cnprocd.connector.listener import Listener
from cnprocd.connector.request import Request
from cnprocd.connector.source import Source
from cnprocd.connector.status import EVERY_STATUS
from cnprocd.process.model import Kind, Occurrence, Wanted
from cnprocd.process.procfs import ProcFs
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking

BUFFER_BYTES = 32 << 20
EVERY_KIND: frozenset[Kind] = frozenset({"fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "coredump", "exit"})


def everything(taskstats: bool) -> Request:
    """Return the request for every event, and every exit record if `taskstats`."""
    return Request(
        mask=uapi.PROC_EVENT_ALL,
        connector=ConnectorFilter(uapi.PROC_EVENT_ALL),
        taskstats=TaskstatsFilter(EVERY_STATUS) if taskstats else None,
        sequence=True,
    )


class Listening:
    """Occurrences from the kernel. A context manager. Raises as Listener.subscribe does."""

    def __init__(self, wanted: Wanted, kinds: frozenset[Kind] = EVERY_KIND) -> None:
        self.source = Source(Listener.open(BUFFER_BYTES), BUFFER_BYTES)
        self.features = self.source.subscribe()
        self.source.ask(everything(self.features.taskstats))
        tracking = Tracking(
            table=True, records=self.features.taskstats, wanted=wanted, kinds=kinds, thread_kinds=frozenset()
        )
        self.tracker = Tracker(tracking, ProcFs(), os.getpid())
        self._wanted = wanted

    def __enter__(self) -> Listening:
        self.tracker.adopt(list(ProcFs.scan(self._wanted)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.close()

    def batches(self, wait_s: float = 0.5) -> Iterator[Iterator[Occurrence]]:
        """Yield batches of occurrences, an empty one after `wait_s` without events. Read each batch to its end."""
        poller = select.poll()
        for fd in self.source.filenos():
            poller.register(fd, select.POLLIN)
        while True:
            poller.poll(2 if self.tracker.deaths.has_held else wait_s * 1000)
            batch = self.source.drain()
            yield self.tracker.take(batch.events, batch.records.records)

    def lost(self) -> int:
        """Return the number of events that the kernel dropped for this socket."""
        self.source.count_losses()
        return self.source.losses.total()
