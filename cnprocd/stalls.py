"""Measure the event loop's stalls where they happen, and report long ones.

The selector of the loop takes the time from each return of epoll_wait(2) to the next call. So every callback counts, no
timer is needed, and an idle daemon sleeps. What a callback does is named by `running`.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import selectors
import time
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, TypeVar

from cnprocd.log import Log, ThrottledLog
from cnprocd.stall_meter import Figures, StallMeter

REPORT_EVERY_S = 10.0
_T = TypeVar("_T")


class Stalls:
    """The stalls of one event loop. Create it before the loop, and the loop with `make_loop`."""

    def __init__(self, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self._meter = StallMeter()
        self._throttled = ThrottledLog(log, REPORT_EVERY_S)
        self._clock = clock
        self._began_s: float | None = None  # when the loop last had events
        self._selector = _MeasuredSelector(self.end, self.begin)
        self._counts = False
        self._inner_s = 0.0  # of the block that runs: what blocks and edges within it account for

    def make_loop(self) -> asyncio.AbstractEventLoop:
        """Return a new event loop that is measured."""
        return asyncio.SelectorEventLoop(self._selector)

    def pause(self, seconds: float) -> bool:
        """Wait within a callback as the loop would, if nothing else waits to run. Return whether no event came.

        A turn of the loop costs as much as dozens of process events. Timers may be late by this.
        """
        if not self._selector.runs_one:
            return False
        self.end()
        try:
            return not self._selector.has_events(seconds)
        finally:
            self.begin()

    def count(self) -> None:
        """Count from now on. What the start of the daemon takes is not a stall: it is not ready yet."""
        self._counts = True
        self._began_s = None

    def begin(self) -> None:
        """Note that the loop has events."""
        self._began_s = self._clock()

    def end(self) -> None:
        """Note that the loop waits for events again. Count the stall, and log it if it was long."""
        if self._began_s is None or not self._counts:
            return
        now_s = self._clock()
        stall = self._meter.note(now_s, now_s - self._began_s)
        if stall is not None:
            text = f"the event loop did not wait for events for {stall.seconds:.3f} s; it ran: {stall.cause}"
            stall_s = round(stall.seconds, 3)
            self._throttled.add(
                "warning", "loop_stalled", now_s, {"count": 1}, text, cause=stall.cause, stall_s=stall_s
            )
        elif self._throttled.pending:
            self._throttled.flush_due(now_s)

    @contextlib.contextmanager
    def running(self, edge: str) -> Iterator[None]:
        """Add the time of the block, without that of blocks and edges within it, to what `edge` has of the stall."""
        outer_s, self._inner_s, began_s = self._inner_s, 0.0, self._clock()
        try:
            yield
        finally:
            took_s = self._clock() - began_s
            self._meter.blame(edge, took_s - self._inner_s)
            self._inner_s = outer_s + took_s

    def blame(self, edge: str, seconds: float) -> None:
        """Add a time for which the loop has just waited for `edge`."""
        self._meter.blame(edge, seconds)
        self._inner_s += seconds

    async def steps(self, edge: str, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine, and add the time of each of its steps to what `edge` has of the stall."""
        return await self._steps(edge, work)

    @types.coroutine
    def _steps(self, edge: str, work: Coroutine[Any, Any, _T]) -> Generator[Any, Any, _T]:
        step: Callable[[Any], Any] = work.send
        value: Any = None
        while True:
            with self.running(edge):
                try:
                    awaited = step(value)
                except StopIteration as end:
                    result: _T = end.value
                    return result
            try:
                step, value = work.send, (yield awaited)
            except BaseException as error:  # cancelled: `work` decides what follows
                step, value = work.throw, error

    def figures(self) -> Figures:
        """Return the figures for `status` and metrics."""
        return self._meter.figures(self._clock())

    def flush(self) -> None:
        """Log the counts that wait."""
        self._throttled.flush(self._clock())


class _MeasuredSelector(selectors.EpollSelector):
    """Calls `on_wait` before it waits, and `on_events` after it."""

    def __init__(self, on_wait: Callable[[], None], on_events: Callable[[], None]) -> None:
        super().__init__()
        self._on_wait = on_wait
        self._on_events = on_events
        self._poll = select.poll()
        self._poll.register(self.fileno(), select.POLLIN)
        self.runs_one = False  # the loop runs one callback: it had none when it began to wait, and one event came

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._on_wait()
        try:
            found = super().select(timeout)
        finally:
            self._on_events()
        self.runs_one = timeout != 0 and len(found) <= 1  # asyncio does not wait while it has callbacks to run
        return found

    def has_events(self, within_s: float) -> bool:
        """Return whether a registered descriptor is ready, or becomes so within this time."""
        return bool(self._poll.poll(within_s * 1000))
