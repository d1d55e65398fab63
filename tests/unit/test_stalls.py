"""The event loop is measured without a timer, and a long stall is logged with what ran."""

from __future__ import annotations

import asyncio

from cnprocd.stall_meter import LOOP
from cnprocd.stalls import Stalls


class Clock:
    """A clock that only `pass_s` moves."""

    def __init__(self) -> None:
        self.now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


def play(scene) -> tuple[Stalls, list[dict[str, object]]]:
    """Run a scene on a measured loop whose clock stands still unless the scene moves it."""
    records: list[dict[str, object]] = []
    clock = Clock()
    stalls = Stalls(lambda level, event, **fields: records.append({"event": event, **fields}), clock)
    stalls.count()
    with asyncio.Runner(loop_factory=stalls.make_loop) as runner:
        runner.run(scene(stalls, clock))
    return stalls, records


def test_a_long_callback_is_logged_with_what_ran():
    async def scene(stalls, clock):
        def tick():
            with stalls.running("tick"):
                clock.now_s += 0.3

        asyncio.get_running_loop().call_soon(tick)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    stalls, records = play(scene)
    assert [(one["event"], one["cause"], one["stall_s"]) for one in records] == [("loop_stalled", "tick", 0.3)]
    assert stalls.figures().worst_cause == "tick"


def test_a_callback_without_a_name_is_the_event_loops():
    async def scene(stalls, clock):
        clock.now_s += 0.3

    assert [one["cause"] for one in play(scene)[1]] == [LOOP]


def test_waiting_for_events_is_no_stall():
    clock = Clock()
    stalls = Stalls(lambda level, event, **fields: None, clock)
    stalls.count()
    for _ in range(2):
        stalls.begin()
        clock.now_s += 0.01
        stalls.end()
        clock.now_s += 60.0
    assert abs(stalls.figures().worst_s - 0.01) < 1e-9


def test_each_step_of_a_coroutine_counts_and_its_waits_do_not():
    async def verb(clock):
        clock.now_s += 0.2
        await asyncio.sleep(0)
        clock.now_s += 0.4
        return "answer"

    async def scene(stalls, clock):
        assert await stalls.steps("control: status", verb(clock)) == "answer"
        await asyncio.sleep(0)

    stalls, records = play(scene)
    assert abs(stalls.figures().worst_s - 0.4) < 1e-9
    assert stalls.figures().worst_cause == "control: status"
    assert records[0]["cause"] == "control: status"


def test_a_cancelled_coroutine_is_cancelled_inside():
    async def scene(stalls, clock):
        ended = []

        async def verb():
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        task = asyncio.ensure_future(stalls.steps("control: status", verb()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert ended == [True]

    play(scene)


def test_nothing_counts_before_the_daemon_is_ready():
    clock = Clock()
    stalls = Stalls(lambda level, event, **fields: None, clock)

    async def scene():
        clock.now_s += 9.0
        await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=stalls.make_loop) as runner:
        runner.run(scene())
    assert stalls.figures().worst_s == 0.0


def test_a_block_within_a_block_has_its_own_time():
    """A drain that starts a hook: the scheduler accounts for what it took, and an edge for what it waited."""

    async def scene(stalls, clock):
        with stalls.running("drain"):
            clock.now_s += 0.1
            with stalls.running("scheduler"):
                clock.now_s += 0.2
                stalls.blame("disk", 0.05)
            clock.now_s += 0.01
        await asyncio.sleep(0)

    assert [one["cause"] for one in play(scene)[1]] == ["scheduler"]


def test_an_edge_that_the_loop_waited_for_is_the_cause():
    async def scene(stalls, clock):
        with stalls.running("drain"):
            clock.now_s += 0.3
            stalls.blame("disk", 0.25)
        await asyncio.sleep(0)

    assert [one["cause"] for one in play(scene)[1]] == ["disk"]


def paused(before=lambda loop: None, within=lambda loop: None) -> list[bool]:
    """Return what two pauses in one callback return. The callback is the only one of its turn of the loop."""
    found: list[bool] = []

    async def scene(stalls, clock):
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def callback():
            found.append(stalls.pause(0.001))
            within(loop)
            found.append(stalls.pause(0.001))
            done.set()

        before(loop)
        loop.call_later(0.01, callback)
        await done.wait()

    play(scene)
    return found


def test_a_pause_lasts_while_nothing_else_wants_the_loop():
    assert paused() == [True, True]


def test_an_event_ends_a_pause():
    assert paused(within=lambda loop: loop.call_soon_threadsafe(lambda: None)) == [True, False]


def test_there_is_no_pause_while_another_callback_waits():
    async def scene(stalls, clock):
        loop = asyncio.get_running_loop()
        found = loop.create_future()

        def first():
            loop.call_soon(lambda: found.set_result(stalls.pause(10)))
            loop.call_soon(lambda: None)

        loop.call_soon(first)
        assert await found is False

    play(scene)


def test_a_pause_is_no_stall():
    clock = Clock()
    stalls = Stalls(lambda level, event, **fields: None, clock)
    stalls.count()

    async def scene():
        loop = asyncio.get_running_loop()
        found = loop.create_future()

        def callback():
            clock.now_s += 0.02
            stalls.pause(0.001)
            clock.now_s += 0.03
            found.set_result(None)

        loop.call_later(0.01, callback)
        await found

    with asyncio.Runner(loop_factory=stalls.make_loop) as runner:
        runner.run(scene())
    assert 0.03 <= stalls.figures().worst_s < 0.05
