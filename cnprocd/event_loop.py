"""When the pipeline turns: waking, batching windows, the budget, ticks, and the watchdog.

An event wakes `_drain`, which turns the pipeline until nothing is left or BUDGET_S is spent. Then the loop serves
hooks, control and the watchdog. Under load the sockets are left alone for a while, so that the next wake-up brings many
events (connector/gathering.py). An isolated event never waits. As long as nothing else wants the loop, it waits for the
end of the window in place: a turn of asyncio's loop costs as much as dozens of events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cnprocd.connector.canary import kernel_sends_events, raise_listener_count
from cnprocd.connector.gathering import Gathering, patience
from cnprocd.dispatch import Dispatcher
from cnprocd.log import Log
from cnprocd.pipeline import Pipeline
from cnprocd.process.counted_lookup import CountedLookup
from cnprocd.reload import RulesInForce
from cnprocd.service import ServiceManager
from cnprocd.stalls import Stalls
from cnprocd.subscription import HookFollower

BUDGET_S = 0.01  # of draining before the loop serves the others
FLOOD_BUDGET_S = 0.02  # the same in a flood: starting the hooks of its matches takes time that other events need
IN_PLACE_S = 0.05  # of windows, one after the other, before the loop runs its timers
TICK_S = 1.0
LAST_EVENTS_S = 4.0  # of reading what is queued at a stop
LAST_DEATHS_S = 0.1  # record and event of one death are microseconds apart
CANARY_AFTER_S = 60.0  # of silence, then ask the kernel whether it still sends events
MOST_REVIVALS = 100  # how far below zero the kernel's count of listeners may have been brought


class Ticker:
    """Runs the housekeeping once, TICK_S after it was asked for. An idle daemon does not tick."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stalls: Stalls) -> None:
        self._loop = loop
        self._stalls = stalls
        self._timer: asyncio.TimerHandle | None = None
        self.handlers: list[Callable[[], None]] = []

    def arm(self) -> None:
        """Make sure that a tick will come."""
        if self._timer is None:
            self._timer = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        with self._stalls.running("tick"):
            for handler in self.handlers:
                handler()


class EventLoop:
    """Turns the pipeline as events come, on asyncio's loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ticker: Ticker,
        rules: RulesInForce,
        pipeline: Pipeline,
        lookups: CountedLookup,
        dispatcher: Dispatcher,
        follower: HookFollower,
        manager: ServiceManager,
        log: Log,
        stopping: asyncio.Event,
        stalls: Stalls,
        is_watched: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_watched`: whether a client is subscribed to matches."""
        self._loop = loop
        self._is_watched = is_watched
        self._ticker = ticker
        self._rules = rules
        self._pipeline = pipeline
        self._lookups = lookups
        self._dispatcher = dispatcher
        self._follower = follower
        self._manager = manager
        self._log = log
        self._stopping = stopping
        self._stalls = stalls
        self._gathering = Gathering()
        self._active_at_s = time.monotonic()
        self._looked_up = 0  # reads of /proc when the last window began
        self._listening = False
        self._timer: asyncio.Handle | None = None  # when to drain without being woken
        ticker.handlers.append(self._tick)

    def start(self) -> None:
        """Be woken by events from now on, and watch over the kernel and the watchdog."""
        self._listen()
        self._watch_measured()

    async def stop(self, kept: bool) -> int:
        """Read the last events: until no half of a death is in hand that a later daemon could not join.

        `kept`: a later daemon reads the sockets. Else read everything that happened before, for at most LAST_EVENTS_S,
        and return how many events were not evaluated after that.
        """
        self._stop_listening()
        if not kept:
            self._pipeline.source.refuse_events()
            deadline_s = time.monotonic() + LAST_EVENTS_S
            while self._pipeline.drain() and time.monotonic() < deadline_s:
                await asyncio.sleep(0)
        deaths, deadline_s = self._pipeline.tracker.deaths, time.monotonic() + LAST_DEATHS_S
        while (deaths.has_held or deaths.has_waiting) and time.monotonic() < deadline_s:
            await asyncio.sleep(0.001)
            self._pipeline.drain()
        return 0 if kept else self._pipeline.source.discard()

    def _listen(self) -> None:
        if self._listening or self._stopping.is_set():
            return
        self._listening = True
        for fd in self._pipeline.source.filenos():
            self._loop.add_reader(fd, self._drain)

    def _stop_listening(self) -> None:
        if not self._listening:
            return
        self._listening = False
        for fd in self._pipeline.source.filenos():
            self._loop.remove_reader(fd)

    def _drain(self) -> None:
        if self._stopping.is_set():
            return  # `stop` reads what is queued; after that the sockets are closed
        try:
            self._drain_and_gather()
        except BaseException:
            self._listen()  # asyncio logs the error; keep listening after it
            raise

    def _drain_and_gather(self) -> None:
        """Drain within the budget; under load let events gather, and drain again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline_s = time.monotonic() + IN_PLACE_S
        while True:
            matches = self._pipeline.counts.matches
            with self._stalls.running("drain"):
                window_s = self._turn_for_a_while()
            if not window_s:
                return
            self._stop_listening()  # while window follows window only the time wakes us
            now_s = time.monotonic()
            # A match may have given the loop something to do, such as a hook to start.
            is_idle = self._pipeline.counts.matches == matches and now_s + window_s <= deadline_s
            if not (is_idle and self._stalls.pause(window_s)):
                self._timer = self._loop.call_later(max(0.0, now_s + window_s - time.monotonic()), self._drain)
                return

    def _turn_for_a_while(self) -> float:
        """Turn the pipeline within the budget. Return how long to let events gather; 0: listen to the sockets."""
        began_s = time.monotonic()
        budget_s = FLOOD_BUDGET_S if self._pipeline.flood.active else BUDGET_S
        deadline_s, quiet_s = began_s + budget_s, began_s - self._active_at_s
        seen, more = self._pipeline.turn()
        most = seen
        while more and time.monotonic() < deadline_s:
            seen, more = self._pipeline.turn()
            most = max(most, seen)
        self._active_at_s = time.monotonic()
        self._ticker.arm()
        if more:
            self._listen()  # the budget is spent: the others are served, and the sockets wake us at once
            self._continue()  # what was read from them already does not
            return 0.0
        window_s = self._gathering.window_s(most, quiet_s, self._rules.loaded.settings.gather_s, self._patience())
        if not window_s:
            self._listen()
            again_s = self._pipeline.again_s
            if again_s is not None:
                self._timer = self._loop.call_later(again_s, self._drain)
        return window_s

    def _patience(self) -> int:
        """Return the factor for the window, by what the rules have needed since the last one."""
        before, self._looked_up = self._looked_up, self._lookups.count
        looks_up = self._pipeline.tracker.tracking.looks_up
        return patience(self._looked_up != before, looks_up, self._rules.loaded.runs_hooks or self._is_watched())

    def _tick(self) -> None:
        """Do the housekeeping, and go on ticking while there is activity or something waits for a tick."""
        if self._stopping.is_set():
            return
        self._pipeline.tick()
        self._continue()
        self._dispatcher.tick()
        self._follower.stop_if_over(self._dispatcher.busy)
        self._manager.status(self._rules.status_line())
        if (
            time.monotonic() - self._active_at_s < 3 * TICK_S
            or self._follower.following
            or self._dispatcher.busy
            or self._dispatcher.holds_back
            or self._pipeline.has_pending_counts
        ):
            self._ticker.arm()

    def _continue(self) -> None:
        """Turn again for what is under way, or was read from the sockets already: nothing else would wake the loop."""
        is_left = self._pipeline.source.looked_ahead or self._pipeline.again_s is not None
        if is_left and self._timer is None:
            self._timer = self._loop.call_soon(self._drain)

    def _watch_measured(self) -> None:
        with self._stalls.running("watch"):
            self._watch()

    def _watch(self) -> None:
        """Ping the watchdog from the loop that drains: if that hangs, so does this. Check canary and rule files.

        Exit records whose event was not asked for come without waking the loop: here they are read at the latest.
        """
        if not self._stopping.is_set():
            self._pipeline.drain()
            self._continue()
            self._rules.state.check_if_due()
        interval_s = self._manager.watchdog_interval_s
        if interval_s is not None:
            self._manager.watchdog()
        if time.monotonic() - self._active_at_s >= CANARY_AFTER_S:
            self._active_at_s = time.monotonic()
            self._check_canary()
        self._loop.call_later(interval_s or CANARY_AFTER_S, self._watch_measured)

    def _check_canary(self) -> None:
        """After a long silence, check that the kernel still sends events, and make it send them (see canary.py)."""
        for _ in range(MOST_REVIVALS):
            if kernel_sends_events():
                return
            raise_listener_count()
            self._log("warning", "muted", message="the kernel had stopped sending events: subscribed again")
        self._log("critical", "muted", message="the kernel sends no events: see `cnprocctl doctor`")
