"""The clock of the spool."""

from __future__ import annotations

import time


class SteadyClock:
    """Wall clock nanoseconds without clock steps: the wall clock at creation plus CLOCK_BOOTTIME since then."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def __call__(self) -> int:
        return self._offset_ns + time.clock_gettime_ns(time.CLOCK_BOOTTIME)
