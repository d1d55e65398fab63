"""The clock of the spool: wall clock as of the daemon's start, continued by CLOCK_BOOTTIME.

So no clock step delays a retry. The file has the offset of the two. A pause goes on exactly in the next daemon of the
same boot, and after a boot with what was left of it (rows.due_again_ns).
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A clock in nanoseconds: CLOCK_BOOTTIME plus an offset that never changes."""

    @property
    def offset_ns(self) -> int: ...
    def __call__(self) -> int: ...


class SteadyClock:
    """Wall clock nanoseconds without clock steps: the wall clock at creation plus CLOCK_BOOTTIME since then."""

    def __init__(self) -> None:
        self.offset_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def __call__(self) -> int:
        return self.offset_ns + time.clock_gettime_ns(time.CLOCK_BOOTTIME)
