"""A subscription of a command's own: everything the kernel tells, for as long as somebody looks.

It asks for the full mask without filters, so it is dear on a busy machine and ends with the command; the daemon's own
subscription is another socket, with a mask of its own, and does not notice. Whatever ends the command (Ctrl-C, TERM, a
closed pipe, the end of its time) passes through `with`, so that the kernel is told IGNORE: a count of listeners that
leaks would keep it making events for nobody.
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
from cnprocd.process.tracker import Tracker, Tracking

BUFFER_BYTES = 32 << 20
EVERY_KIND: frozenset[Kind] = frozenset({"fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "coredump", "exit"})


def everything(taskstats: bool) -> Request:
    """All there is."""
    return Request(
        mask=uapi.PROC_EVENT_ALL,
        connector=ConnectorFilter(uapi.PROC_EVENT_ALL),
        taskstats=TaskstatsFilter(EVERY_STATUS) if taskstats else None,
        sequence=True,
    )


class Listening:
    """Occurrences from the kernel. Use it with `with`; raises as Listener.subscribe."""

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
        """What happens, in batches, for ever; an empty one when nothing did for `wait_s`. Read each to its end."""
        poller = select.poll()
        for fd in self.source.filenos():
            poller.register(fd, select.POLLIN)
        while True:
            poller.poll(2 if self.tracker.deaths.has_held else wait_s * 1000)
            batch = self.source.drain()
            yield self.tracker.take(batch.events, batch.records)

    def lost(self) -> int:
        """Events that the kernel could not deliver to us."""
        self.source.count_losses()
        return self.source.losses.total()
