"""The end of a process, as joined of its exit record and its exit event (deaths.py). PURE."""

from __future__ import annotations

from typing import NamedTuple

from cnprocd.connector.event import Exit
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.doubt import sure
from cnprocd.process.model import Process


class Death(NamedTuple):
    """The end of a process. At least one of `event` and `record` is not None."""

    tgid: int
    status: int
    event: Exit | None  # of the last thread
    record: TaskRecord | None  # of the last thread: usage of the whole process
    leader: TaskRecord | None  # identity of the process

    @property
    def tid(self) -> int:
        """The thread whose end was the end of the process, as far as that is known."""
        return self.event.process_pid if self.event else self.record.pid if self.record else self.tgid

    @property
    def at_ns(self) -> int | None:
        """Return the time of the event (CLOCK_MONOTONIC)."""
        return self.event.timestamp_ns if self.event else None

    @property
    def cpu(self) -> int | None:
        """Return the CPU of the event."""
        return self.event.cpu if self.event else None

    @property
    def is_passed_over(self) -> bool:
        """Whether no rule asks for the process; its event was lost."""
        return self.record is PASSED_OVER


Waiting = dict[int, tuple[TaskRecord, ...]]
"""Thread id -> records whose exit event has not come yet."""

PASSED_OVER = TaskRecord(0, 0, 0, 0, True, False, "", *[0] * 12)
PASSED = (PASSED_OVER,)
"""In Waiting: the record of a single-threaded process that no rule asks for."""
COUNTED = (PASSED_OVER,)  # another object than PASSED
"""The same of a process whose matches are counted already, so that other rules do not ask for it either."""


def thread_of(known: Process | None, event: Exit, record: TaskRecord | None) -> Process:
    """Return the process of a thread that ended, with the thread's own comm and ids. `known`: the table's entry."""
    process = Process(event.process_tgid, event.parent_tgid or None)
    if known is not None:
        process.take_identity(sure(known))
        process.start_ns = known.start_ns
        if event.process_pid != event.process_tgid:
            process.comm, process.comm_source = None, "unknown"  # the table holds the leader's
        if known.unconfirmed and record is not None:
            process.confirm(record.uid)
    if record is not None:
        process.take_comm(record, "taskstats")
        process.take_ids(record, "taskstats")
    return process
