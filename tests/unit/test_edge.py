"""An edge with real workers that really block: threads that read pipes, children that sleep or die.

Nothing here waits for time to pass: a test blocks a worker on a pipe, and lets it go by writing to it.
"""

from __future__ import annotations

import asyncio
import math
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.reaping import children_reaped  # noqa: F401 (a fixture)

from cnprocd.edge import Edge, Limits, Missed
from cnprocd.patience import Patience
from cnprocd.worker import ChildWorker, ThreadWorker

CHILD = Path(__file__).with_name("edge_child.py")
SHORT_S = 0.05
LONG_S = 30.0  # never reached: how long a test waits for what must come


class Gate:
    """A pipe: a read from it waits until the test writes."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def open(self, count: int = 1) -> None:
        os.write(self.writer, b"x" * count)

    def close(self) -> None:
        os.close(self.writer)
        os.close(self.reader)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open(100)
    # Not closed: a thread that is still at its way out must not read another file under this number.


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def run_for(gate):
    """Work that returns its name, after a byte from the gate if the name begins with `slow`."""

    def run(name):
        if name.startswith("slow"):
            os.read(gate.reader, 1)
        if name == "raise":
            raise ValueError(name)
        return name.upper()

    return run


NOT_IN_TIME = (Missed.LATE, Missed.STARVED)  # a test machine may be busy


def threads(loop, gate, **limits):
    return Edge("test", lambda: ThreadWorker("test", run_for(gate)), Limits(**limits), loop)


def children(loop, **limits):
    edge = Edge("test", lambda: ChildWorker(CHILD), Limits(**limits), loop)
    assert edge.prepare(LONG_S)
    return edge


class Answers:
    """Callbacks, and a way to run the loop until so many were called."""

    def __init__(self, loop):
        self.loop = loop
        self.all = []

    def to(self, name):
        return lambda answer: self.all.append((name, answer))

    def until(self, count):
        async def enough():
            while len(self.all) < count:
                await asyncio.sleep(0.001)

        self.loop.run_until_complete(asyncio.wait_for(enough(), LONG_S))
        return self.all


# -- threads -----------------------------------------------------------------------------------------------------


def test_ask_returns_the_answer_of_a_thread(loop, gate):
    edge = threads(loop, gate, deadline_s=LONG_S)
    assert [edge.ask("a"), edge.ask("b")] == ["A", "B"]
    assert edge.counters.done == 2 and edge.counters.submitted == 2
    edge.close()


def test_submit_calls_back_in_order_from_the_loop(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=LONG_S), Answers(loop)
    for name in "abc":
        assert edge.submit(name, answers.to(name))
    assert answers.all == []  # never before submit() has returned
    assert answers.until(3) == [("a", "A"), ("b", "B"), ("c", "C")]
    edge.close()


def test_wait_takes_the_answers_of_submitted_pieces(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=LONG_S), Answers(loop)
    for name in "ab":
        edge.submit(name, answers.to(name))
    assert edge.wait(LONG_S) and edge.wait(LONG_S)
    assert answers.all == [("a", "A"), ("b", "B")]
    assert not edge.wait(LONG_S)  # nothing is at work
    edge.submit("slow", answers.to("slow"))
    assert not edge.wait(SHORT_S)
    gate.open()
    assert edge.wait(LONG_S)
    edge.close()


def test_an_answer_that_the_loop_saw_first_may_be_waited_for(loop):
    """The loop calls back for a descriptor that was readable; meanwhile another callback has taken the answer."""
    edge, answers = children(loop, deadline_s=LONG_S), Answers(loop)

    def first():
        assert edge.wait(LONG_S)

    async def both():
        edge.submit(b"a", answers.to("a"))
        seat = next(iter(edge._busy))
        assert seat.poller.poll(LONG_S * 1000)
        asyncio.get_running_loop().call_soon(first)
        asyncio.get_running_loop().call_soon(edge._on_readable, seat)
        await asyncio.sleep(0.01)

    loop.run_until_complete(both())
    assert len(answers.all) == 1 and edge.counters.ended == 0
    assert edge.ready == 1
    edge.close()


def test_ask_gives_up_a_late_piece_and_is_answered_by_another(loop, gate):
    edge = threads(loop, gate, deadline_s=LONG_S, replacements=1)
    assert edge.ask("slow", SHORT_S) is Missed.LATE
    assert edge.ask("b") == "B"
    assert (edge.counters.late, edge.counters.stuck, edge.counters.replaced) == (1, 1, 1)
    edge.close()


def test_stuck_workers_are_replaced_within_the_bound(loop, gate):
    edge = threads(loop, gate, deadline_s=LONG_S, replacements=2)
    assert [edge.ask("slow", SHORT_S) for _ in range(5)] == [Missed.LATE] * 3 + [Missed.REFUSED] * 2
    assert edge.counters.stuck == 3 and edge.counters.refused == 2
    edge.close()


def test_a_stuck_worker_that_comes_back_works_again(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=SHORT_S), Answers(loop)
    edge.submit("slow", answers.to("slow"))
    assert answers.until(1) == [("slow", Missed.LATE)]
    assert edge.ask("b") is Missed.REFUSED
    gate.open()

    async def until_back():
        while edge.counters.stuck:
            await asyncio.sleep(0.001)

    loop.run_until_complete(asyncio.wait_for(until_back(), LONG_S))
    assert edge.ask("b", LONG_S) == "B"
    assert len(answers.all) == 1  # the late answer went nowhere
    edge.close()


def test_a_replaced_worker_that_comes_back_is_let_go(loop, gate):
    edge = threads(loop, gate, deadline_s=LONG_S, replacements=1)
    before = threading.active_count()
    assert edge.ask("slow", SHORT_S) is Missed.LATE
    assert edge.ask("b") == "B"
    gate.open()

    async def until_one():
        while threading.active_count() > before + 1 or edge.counters.stuck:
            await asyncio.sleep(0.001)

    loop.run_until_complete(asyncio.wait_for(until_one(), LONG_S))
    assert edge.counters.stuck == 0 and edge.ask("c") == "C"
    edge.close()


def test_the_inbox_is_bounded_and_says_so(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=LONG_S, inbox=2), Answers(loop)
    taken = [edge.submit(name, answers.to(name)) for name in ("slow1", "a", "b", "c")]
    assert taken == [True, True, True, False]
    assert edge.counters.refused == 1 and edge.waiting == 2
    gate.open()
    assert answers.until(3) == [("slow1", "SLOW1"), ("a", "A"), ("b", "B")]
    edge.close()


def test_a_piece_that_waits_beyond_its_deadline_is_late(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=SHORT_S), Answers(loop)
    edge.submit("slow", answers.to("slow"))
    edge.submit("a", answers.to("a"))
    assert answers.until(2) == [("slow", Missed.LATE), ("a", Missed.LATE)]
    assert edge.waiting == 0
    edge.close()


def test_late_pieces_are_reported_by_name(loop, gate):
    late = []
    edge = Edge(
        "test", lambda: ThreadWorker("test", run_for(gate)), Limits(LONG_S, replacements=1), loop, on_late=late.append
    )
    edge.ask("slow", SHORT_S)
    edge.ask("fast")
    assert late == ["slow"]
    edge.close()


def test_work_that_raises_costs_that_piece_only(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=LONG_S), Answers(loop)
    edge.submit("raise", answers.to("raise"))
    edge.submit("a", answers.to("a"))
    assert answers.until(2) == [("raise", Missed.FAILED), ("a", "A")]
    assert edge.ask("raise") is Missed.FAILED
    assert edge.counters.failed == 2
    edge.close()


def test_several_workers_work_at_the_same_time(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=LONG_S, workers=2), Answers(loop)
    edge.submit("slow", answers.to("slow"))
    edge.submit("a", answers.to("a"))
    assert answers.until(1) == [("a", "A")]
    gate.open()
    assert answers.until(2)[1] == ("slow", "SLOW")
    edge.close()


def test_stalled_time_is_that_of_the_slowest_worker(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=math.inf), Answers(loop)
    assert edge.stalled_s == 0
    edge.submit("slow", answers.to("slow"))
    assert edge.stalled_s > 0
    gate.open()
    answers.until(1)
    assert edge.stalled_s == 0
    edge.close()


def test_no_thread_to_be_had_is_a_refusal(loop):
    def none():
        raise RuntimeError("can't start new thread")

    edge = Edge("test", none, Limits(LONG_S, inbox=0), loop)
    assert edge.ask("a") is Missed.REFUSED
    assert not edge.submit("a")


# -- children ----------------------------------------------------------------------------------------------------


def test_ask_returns_the_answer_of_a_child(loop):
    edge = children(loop, deadline_s=LONG_S)
    assert [edge.ask(b"a"), edge.ask(b"b" * 100_000)] == [b"<a>", b"<" + b"b" * 100_000 + b">"]
    edge.close()


def test_a_stuck_child_is_killed_and_replaced_for_ever(loop):
    """More often than there may be stuck workers: a killed one does not count any more."""
    edge = children(loop, deadline_s=LONG_S, replacements=2)
    for _ in range(8):
        assert edge.ask(b"hang", SHORT_S) in NOT_IN_TIME
        while not edge.prepare(LONG_S):  # SIGKILL takes its moment
            pass
        assert edge.ask(b"a", LONG_S) == b"<a>"
    assert edge.counters.late == 8
    edge.close()


def test_a_stopped_child_is_replaced_and_blames_no_work(loop):
    started = []

    def start():
        started.append(ChildWorker(CHILD))
        return started[-1]

    edge = Edge("test", start, Limits(deadline_s=LONG_S, replacements=2), loop)
    assert edge.prepare(LONG_S)
    os.kill(started[0]._pid, signal.SIGSTOP)
    assert edge.ask(b"a", SHORT_S) is Missed.STARVED
    while not edge.prepare(LONG_S):
        pass
    assert edge.ask(b"a", LONG_S) == b"<a>"
    assert edge.counters.late == 1
    edge.close()


def test_a_child_that_had_no_processor_works_again_later(loop):
    """It is not killed: a new one would need more of what is short."""
    edge = children(loop, deadline_s=LONG_S)
    (seat,) = edge._idle
    child: Any = seat.worker
    child.state = lambda: "R"
    os.kill(child._pid, signal.SIGSTOP)
    assert edge.ask(b"a", SHORT_S) is Missed.STARVED
    os.kill(child._pid, signal.SIGCONT)
    assert seat.poller.poll(LONG_S * 1000)
    assert edge.prepare(LONG_S)
    assert edge.ask(b"b", LONG_S) == b"<b>"
    assert (edge.counters.stuck, edge.counters.ended) == (0, 0)
    edge.close()


def test_a_spare_child_takes_over_at_once(loop):
    edge = children(loop, deadline_s=LONG_S, replacements=2, spares=1)

    async def until_both_are_ready():
        while edge.ready < 2:
            await asyncio.sleep(0.001)

    for _ in range(4):
        loop.run_until_complete(asyncio.wait_for(until_both_are_ready(), LONG_S))
        assert edge.ask(b"hang", SHORT_S) in NOT_IN_TIME
        assert edge.ask(b"a") == b"<a>"
    edge.close()


def test_a_child_that_is_not_ready_yet_is_no_reason_to_wait(loop):
    """ask() is refused, submit() is done when the child is ready."""
    edge, answers = Edge("test", lambda: ChildWorker(CHILD), Limits(LONG_S), loop), Answers(loop)
    assert edge.ask(b"a") is Missed.REFUSED
    edge.submit(b"b", answers.to("b"))
    assert answers.until(1) == [("b", b"<b>")]
    edge.close()


def test_a_child_that_ends_costs_one_piece(loop):
    edge, answers = children(loop, deadline_s=LONG_S), Answers(loop)
    edge.submit(b"exit", answers.to("exit"))
    edge.submit(b"a", answers.to("a"))
    assert answers.until(2) == [("exit", Missed.FAILED), ("a", b"<a>")]
    edge.close()


def test_an_idle_child_that_was_killed_is_replaced(loop):
    workers = []

    def start():
        workers.append(ChildWorker(CHILD))
        return workers[-1]

    edge = Edge("test", start, Limits(LONG_S), loop)
    assert edge.prepare(LONG_S)
    workers[0].abandon()

    async def until_noticed():
        while not edge.counters.ended:
            await asyncio.sleep(0.001)

    loop.run_until_complete(asyncio.wait_for(until_noticed(), LONG_S))
    assert edge.prepare(LONG_S) and edge.ask(b"b") == b"<b>"
    assert len(workers) == 2
    edge.close()


def test_children_are_reaped(loop):
    workers = [ChildWorker(CHILD) for _ in range(3)]
    for worker in workers:
        worker.begin(b"hang")
        worker.abandon()
        worker.close()
    while not all(worker.is_gone() for worker in workers):
        os.sched_yield()


def test_a_child_ends_with_its_parent(tmp_path):
    """EOF on its socket: nothing of a daemon that was killed stays behind."""
    program = (
        "import os, sys; from pathlib import Path; from cnprocd.worker import ChildWorker;"
        "worker = ChildWorker(Path(sys.argv[1])); worker.begin(b'a');"
        "import select; select.select([worker], [], []); print(worker._pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(CHILD)], capture_output=True, text=True)
    pid = int(done.stdout)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(LONG_S * 1000)
    os.close(pidfd)


# -- stopping ----------------------------------------------------------------------------------------------------


def test_stop_does_what_was_handed_over(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=LONG_S), Answers(loop)
    for name in "abc":
        edge.submit(name, answers.to(name))
    assert loop.run_until_complete(edge.stop(LONG_S)) == 0
    assert answers.all == [("a", "A"), ("b", "B"), ("c", "C")]
    assert not edge.submit("d")
    assert edge.ask("d") is Missed.REFUSED


def test_stop_gives_up_at_its_bound_and_counts_what_is_left(loop, gate):
    edge, answers = threads(loop, gate, deadline_s=LONG_S), Answers(loop)
    edge.submit("slow", answers.to("slow"))
    edge.submit("a", answers.to("a"))
    assert loop.run_until_complete(edge.stop(SHORT_S)) == 2
    assert answers.all == [("slow", Missed.STOPPED), ("a", Missed.STOPPED)]
    assert edge.counters.stopped == 2


def test_stop_does_not_wait_for_a_stuck_worker(loop, gate):
    edge = threads(loop, gate, deadline_s=LONG_S)
    assert edge.ask("slow", SHORT_S) is Missed.LATE
    assert loop.run_until_complete(edge.stop(math.inf)) == 0


@pytest.mark.parametrize("how", ["read", "open"])
def test_a_stuck_thread_does_not_keep_the_interpreter_alive(tmp_path, how):
    """The read of a pipe that is never written, and the open of a FIFO that is never opened for writing."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program = f"""
import asyncio, os
from cnprocd.edge import Edge, Limits, Missed
from cnprocd.patience import Patience
from cnprocd.worker import ThreadWorker

def block(work):
    os.read(os.pipe()[0], 1) if {how!r} == "read" else os.open({str(fifo)!r}, os.O_RDONLY)

async def main():
    edge = Edge("test", lambda: ThreadWorker("test", block), Limits(30.0), asyncio.get_running_loop())
    assert edge.ask("x", 0.01) is Missed.LATE
    await edge.stop(30.0)
    print("stopped", flush=True)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LONG_S)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


# -- patience ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=200))
def test_late_reads_take_a_tenth_of_the_time_at_most(pauses):
    """Whatever the rhythm: but for what was saved up, and the shortest deadline that every read has."""
    patience, now_s, waited_s = Patience(0.05, 0.002), 0.0, 0.0
    for pause_s in pauses:
        now_s += pause_s
        deadline_s = patience.wait_s(now_s)
        assert 0.002 <= deadline_s <= 0.05
        now_s += deadline_s
        patience.spend(deadline_s)
        waited_s += deadline_s
    assert waited_s <= Patience.LONGEST_S + Patience.SHARE * now_s + 0.002 * len(pauses) + 1e-9


def test_reads_in_time_keep_the_full_deadline():
    patience = Patience(0.05, 0.0)
    assert all(patience.wait_s(now_s / 1000) == 0.05 for now_s in range(1000))
