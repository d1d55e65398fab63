"""The end of a process, as joined of its exit record and its exit event (deaths.py). PURE."""

from __future__ import annotations

from typing import NamedTuple

from cnprocd.connector.event import Exit
from cnprocd.connector.taskrecord import TaskRecord


class Death(NamedTuple):
    """The end of a process. At least one of `event` and `record` is not None."""

    tgid: int
    status: int
    event: Exit | None  # of the last thread
    record: TaskRecord | None  # of the last thread: usage of the whole process
    leader: TaskRecord | None  # identity of the process

    @property
    def is_passed_over(self) -> bool:
        """Whether no rule asks for the process; its event was lost."""
        return self.record is PASSED_OVER


Waiting = dict[int, tuple[TaskRecord, ...]]
"""Thread id -> records whose exit event has not come yet."""

PASSED_OVER = TaskRecord(0, 0, 0, 0, True, False, "", *[0] * 12)
PASSED = (PASSED_OVER,)
"""In Waiting: the record of a single-threaded process that no rule asks for."""
