"""A round trip through this kernel: subscribe, let a child exit with a known code, and wait for its event.

The configuration of a kernel only promises events, and namespaces can prevent them; the round trip proves that they
arrive. It is bounded in time, and ends its subscription with IGNORE.
"""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass

from cnprocd.connector.event import Exit, named
from cnprocd.connector.filter import ConnectorFilter, TaskstatsFilter
from cnprocd.connector.listener import Listener
from cnprocd.connector.request import Features, Request
from cnprocd.connector.source import Source
from cnprocd.connector.status import FAILURES
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.connector.uapi import PROC_EVENT_ALL

CODE = 42
TIMEOUT_S = 2.0
BUFFER_BYTES = 8 << 20


@dataclass(slots=True)
class RoundTrip:
    """The result: the event and the exit record of the child, where they arrived."""

    features: Features
    no_taskstats_because: str
    buffer_bytes: int
    event: Exit | None = None
    record: TaskRecord | None = None
    after_s: float | None = None


def round_trip() -> RoundTrip:
    """Return what arrived. Raises CnprocdError if the kernel refuses the subscription."""
    source = Source(Listener.open(BUFFER_BYTES), BUFFER_BYTES)
    try:
        features = source.subscribe()
        found = RoundTrip(features, source.no_taskstats_because, source.granted_buffer_bytes)
        source.ask(_wanted(features))
        _listen(source, _die(), found)
        return found
    finally:
        source.close()


def _wanted(features: Features) -> Request:
    return Request(
        mask=PROC_EVENT_ALL,
        connector=ConnectorFilter(PROC_EVENT_ALL, exits=FAILURES),
        taskstats=TaskstatsFilter(FAILURES) if features.taskstats else None,
        sequence=False,
    )


def _die() -> int:
    """Return the PID of a child that exited with CODE. It is reaped first, as a quick parent would do."""
    pid = os.fork()
    if pid == 0:
        os._exit(CODE)
    os.waitpid(pid, 0)
    return pid


def _listen(source: Source, pid: int, found: RoundTrip) -> None:
    poller = select.poll()
    for fd in source.filenos():
        poller.register(fd, select.POLLIN)
    began = time.monotonic()
    while found.event is None and (left := began + TIMEOUT_S - time.monotonic()) > 0:
        poller.poll(left * 1000)
        batch = source.drain()
        for event in map(named, batch.events):
            if isinstance(event, Exit) and event.process_tgid == pid:
                found.event, found.after_s = event, time.monotonic() - began
        found.record = next((record for record in batch.records.records if record.pid == pid), found.record)
