"""The event loop under load: it waits for windows in place, and serves whatever else wants it."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from cnprocd import event_loop
from cnprocd.connector.gathering import LOAD_EVENTS, PATIENCE, PATIENCE_OF_LOGS
from cnprocd.event_loop import EventLoop, Ticker
from cnprocd.pipeline import Turn
from cnprocd.stalls import Stalls

LONG_S = 30.0


class Load:
    """A pipeline that finds a full batch at every turn, and matches if told so."""

    def __init__(self, ready: socket.socket) -> None:
        self.turns = 0
        self.matches_each = 0
        self.counts = SimpleNamespace(matches=0)
        self.source = SimpleNamespace(filenos=lambda: (ready.fileno(),), looked_ahead=False)
        self.recovery = SimpleNamespace(active=False)
        self.has_pending_counts = False
        self.again_s = None
        self.flood = SimpleNamespace(active=False)
        tracking = SimpleNamespace(looks_up=True)
        self.tracker = SimpleNamespace(tracking=tracking, deaths=SimpleNamespace(has_held=False))

    def turn(self) -> Turn:
        self.turns += 1
        self.counts.matches += self.matches_each
        return Turn(LOAD_EVENTS, False)

    def drain(self) -> bool:
        return False

    def tick(self) -> None:
        pass


class CountedStalls(Stalls):
    """Counts how often asyncio's loop turned, and the waits within a callback."""

    def __init__(self) -> None:
        super().__init__(lambda level, event, **fields: None)
        self.turns_of_loop = self.pauses = 0

    def begin(self) -> None:
        super().begin()
        self.turns_of_loop += 1

    def pause(self, seconds: float) -> bool:
        self.pauses += 1
        self.turns_of_loop -= 1  # `begin` at its end is not of the loop
        return super().pause(seconds)


@pytest.fixture
def scene():
    """Run a coroutine function beside a loaded event loop."""

    def run(work, matches_each: int = 0) -> None:
        stalls = CountedStalls()

        async def main() -> None:
            inner, outer = socket.socketpair()
            outer.send(b"x")  # events are ready at any time
            load = Load(inner)
            load.matches_each = matches_each
            loop, stopping = asyncio.get_running_loop(), asyncio.Event()
            settings = SimpleNamespace(gather_s=0.001)
            rules: Any = SimpleNamespace(
                loaded=SimpleNamespace(settings=settings, runs_hooks=True),
                state=SimpleNamespace(check_if_due=lambda: None),
                status_line=str,
            )
            dispatcher: Any = SimpleNamespace(tick=lambda: None, busy=False, holds_back=False)
            follower: Any = SimpleNamespace(following=False, stop_if_over=lambda busy: None)
            manager: Any = SimpleNamespace(watchdog_interval_s=None, status=lambda text: None)
            pipeline: Any = load
            event_loop = EventLoop(
                loop, Ticker(loop, stalls), rules, pipeline, SimpleNamespace(count=0), dispatcher, follower, manager,
                lambda level, event, **fields: None, stopping, stalls,
            )  # fmt: skip
            event_loop.start()
            try:
                await asyncio.wait_for(work(load, stalls), LONG_S)
            finally:
                stopping.set()
                inner.close()
                outer.close()

        with asyncio.Runner(loop_factory=stalls.make_loop) as runner:
            runner.run(main())

    return run


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.2)


def test_windows_follow_each_other_without_turns_of_the_loop(scene):
    async def work(load, stalls):
        await until(lambda: load.turns - stalls.turns_of_loop > 50)

    scene(work)


def test_another_descriptor_is_served_under_load(scene):
    async def work(load, stalls):
        asked, asking = socket.socketpair()
        served = asyncio.Event()
        asyncio.get_running_loop().add_reader(asked.fileno(), served.set)
        await until(lambda: load.turns > 50)
        asking.send(b"x")
        await served.wait()
        asyncio.get_running_loop().remove_reader(asked.fileno())
        asked.close()
        asking.close()

    scene(work)


def test_a_match_gives_the_loop_a_turn(scene):
    """It may have made a hook start: what the loop has to do is done before the next window."""

    async def work(load, stalls):
        await until(lambda: load.turns > 50)
        assert stalls.pauses == 0

    scene(work, matches_each=1)


@pytest.mark.parametrize(("is_watched", "times"), [(True, PATIENCE), (False, PATIENCE_OF_LOGS)])
def test_a_client_that_watches_waits_less_for_a_match(is_watched, times):
    """Of rules that only log and look nothing up. Without a client a record may come up to 50 ms later, under load."""
    part: Any = SimpleNamespace
    rules = part(loaded=part(runs_hooks=False))
    pipeline = part(tracker=part(tracking=part(looks_up=False)))
    event_loop = EventLoop(
        part(), part(handlers=[]), rules, pipeline, part(count=0), part(), part(), part(), part(), part(), part(),
        lambda: is_watched,
    )  # fmt: skip
    assert event_loop._patience() == times


@pytest.mark.parametrize(("is_flood", "turns"), [(False, 10), (True, 20)])
def test_in_a_flood_events_get_more_of_the_loop(monkeypatch, is_flood, turns):
    """Else starting the hooks of a user's flood would take most of it, and deaths of others would wait."""
    part: Any = SimpleNamespace
    taken: list[float] = []
    monkeypatch.setattr(event_loop, "time", part(monotonic=lambda: len(taken) / 1000))

    def turn() -> Turn:
        taken.append(0.001)
        return Turn(LOAD_EVENTS, True)

    source = part(filenos=tuple, looked_ahead=False)
    pipeline = part(turn=turn, flood=part(active=is_flood), source=source, again_s=None)
    ticker = part(handlers=[], arm=lambda: None)
    tested = EventLoop(
        part(), ticker, part(), pipeline, part(count=0), part(), part(), part(), part(), part(is_set=lambda: False),
        part(), lambda: False,
    )  # fmt: skip
    assert tested._turn_for_a_while() == 0.0
    assert abs(len(taken) - turns) <= 1


def test_what_a_start_has_deferred_goes_on_without_an_event():
    """A backlog at the start is a flood. Its deferred matches waited for the next event, or a minute."""
    soon: list[Any] = []
    part: Any = SimpleNamespace
    loop = part(call_soon=lambda call: soon.append(call) or part(), call_later=lambda *_: None)
    pipeline = part(drain=lambda: False, again_s=0.002, source=part(looked_ahead=False))
    rules = part(state=part(check_if_due=lambda: None))
    manager = part(watchdog_interval_s=None)
    tested = EventLoop(
        loop, part(handlers=[]), rules, pipeline, part(count=0), part(), part(), manager, Stalls(lambda *_, **__: None),
        part(is_set=lambda: False), part(), lambda: False,
    )  # fmt: skip
    tested._watch()
    assert soon == [tested._drain]


def test_events_that_were_looked_at_wait_for_no_other():
    """When the budget is spent, events can have been read from the sockets already: nothing else wakes the loop."""
    soon: list[Any] = []
    part: Any = SimpleNamespace
    loop = part(
        call_soon=lambda call: soon.append(call) or part(), call_later=lambda *_: None, add_reader=lambda *_: None
    )
    pipeline = part(
        turn=lambda: Turn(LOAD_EVENTS, True), again_s=None, flood=part(active=False),
        source=part(filenos=lambda: (), looked_ahead=True),
    )  # fmt: skip
    tested = EventLoop(
        loop, part(handlers=[], arm=lambda: None), part(), pipeline, part(count=0), part(), part(), part(),
        Stalls(lambda *_, **__: None), part(is_set=lambda: False), part(), lambda: False,
    )  # fmt: skip
    assert tested._turn_for_a_while() == 0.0
    assert soon == [tested._drain]
