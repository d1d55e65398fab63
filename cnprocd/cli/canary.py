"""A round trip through this kernel: subscribe, let a child end in a known way, and see whether we are told.

What the configuration of a kernel promises and what namespaces forbid is one thing; this is the proof. Everything is
bounded in time and closed again, the subscription with IGNORE.
"""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass

from cnprocd.connector.event import Exit
from cnprocd.connector.filter import ConnectorFilter, TaskstatsFilter
from cnprocd.connector.listener import Listener
from cnprocd.connector.request import Features, Request
from cnprocd.connector.source import Source
from cnprocd.connector.status import FAILURES
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.connector.uapi import PROC_EVENT_ALL

CODE = 42
PATIENCE_S = 2.0
BUFFER_BYTES = 8 << 20


@dataclass(slots=True)
class Heard:
    """What came of the canary's death."""

    features: Features
    no_taskstats_because: str
    buffer_bytes: int
    event: Exit | None = None
    record: TaskRecord | None = None
    after_s: float | None = None


def round_trip() -> Heard:
    """Raises CnprocdError if the kernel does not take the subscription."""
    source = Source(Listener.open(BUFFER_BYTES), BUFFER_BYTES)
    try:
        features = source.subscribe()
        heard = Heard(features, source.no_taskstats_because, source.granted_buffer_bytes)
        source.ask(_wanted(features))
        _listen(source, _die(), heard)
        return heard
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
    """A child that ended with CODE; it is reaped before we listen, as a parent in a hurry would."""
    pid = os.fork()
    if pid == 0:
        os._exit(CODE)
    os.waitpid(pid, 0)
    return pid


def _listen(source: Source, pid: int, heard: Heard) -> None:
    poller = select.poll()
    for fd in source.filenos():
        poller.register(fd, select.POLLIN)
    began = time.monotonic()
    while heard.event is None and (left := began + PATIENCE_S - time.monotonic()) > 0:
        poller.poll(left * 1000)
        batch = source.drain()
        for event in batch.events:
            if isinstance(event, Exit) and event.process_tgid == pid:
                heard.event, heard.after_s = event, time.monotonic() - began
        heard.record = next((record for record in batch.records if record.pid == pid), heard.record)
