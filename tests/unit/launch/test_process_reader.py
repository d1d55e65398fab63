"""Reading /proc for hooks with a real worker process: one that is stopped or killed costs only what it was asked."""

import asyncio
import contextlib
import os
import signal
import subprocess

import pytest
from unit.hookkit import aio, edges_gone
from unit.launch.test_group import MARK, tree

from cnprocd.edge import Limits
from cnprocd.launch.process_reader import ProcessReader, unread
from cnprocd.launch.starter import start_ticks


@contextlib.asynccontextmanager
async def reader():
    one = ProcessReader()
    try:
        yield one
    finally:
        one.close()
        await edges_gone([one.edge])


@pytest.fixture
def sleeper():
    leader, _ = tree("pass", 1)
    yield leader.pid
    leader.kill()
    leader.wait()


@aio
async def test_a_process_is_read_with_its_mark(sleeper):
    async with reader() as one:
        found = (await one.all(f"CNPROCD_ATTEMPT_ID={MARK}"))[sleeper]
        assert (found.alive, found.ppid, found.pgrp, found.session) == (True, os.getpid(), sleeper, sleeper)
        assert (found.start_ticks, found.marked) == (start_ticks(sleeper), True)
        later = await one.some([sleeper], f"CNPROCD_ATTEMPT_ID={MARK}", found.start_ticks + 1)
        assert [seen.marked for seen in later] == [False]


@aio
async def test_of_a_process_that_hangs_its_status_is_known(sleeper):
    (found,) = unread(sleeper)
    assert (found.alive, found.ppid, found.pgrp, found.session) == (True, os.getpid(), sleeper, sleeper)
    assert (found.start_ticks, found.marked) == (None, False)


@aio
async def test_what_hangs_is_set_aside_until_it_ends(sleeper, monkeypatch):
    """The worker is stopped, as while a read does not return."""
    async with reader() as one:
        one.edge.limits = Limits(deadline_s=0.05, replacements=4)
        await one.some([os.getpid()])
        (pid,) = workers()
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(one.edge, "_start", lambda: (_ for _ in ()).throw(OSError()))
        assert [seen.start_ticks for seen in await one.some([sleeper])] == [None]
        monkeypatch.undo()
        one._put_aside(sleeper)
        assert [seen.start_ticks for seen in await one.some([sleeper])] == [None]
        os.kill(sleeper, signal.SIGKILL)
        os.waitid(os.P_PID, sleeper, os.WEXITED | os.WNOWAIT)
        assert not one._is_set_aside(sleeper)


@aio
async def test_a_worker_that_was_killed_is_replaced(sleeper):
    async with reader() as one:
        await one.some([sleeper])
        (pid,) = workers()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        async with asyncio.timeout(30):
            while [seen.start_ticks for seen in await one.some([sleeper])] != [start_ticks(sleeper)]:
                await asyncio.sleep(0.01)


def workers() -> list[int]:
    """The worker processes of this test."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "process_child"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]
