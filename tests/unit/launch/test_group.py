"""group.py on real process trees: all processes of a hook are found and ended, and no others."""

import asyncio
import functools
import os
import secrets
import signal
import subprocess
import sys

import pytest
from unit.hookkit import aio, alive, edges_gone

from cnprocd.launch import group
from cnprocd.launch.group import Root
from cnprocd.launch.process_reader import ProcessReader
from cnprocd.launch.starter import start_ticks

MARK = secrets.token_hex(16)  # of this run alone: the same tests may run beside it
OTHER_MARK = secrets.token_hex(16)
FORKER = """
import os, sys, time
def report(): print(os.getpid(), flush=True)
def stay():
    report()
    while True: time.sleep(1000)
def child(work):
    if os.fork() == 0:
        work(); os._exit(0)
exec(sys.argv[1])
stay()
"""


def tree(script, count, *, mark=MARK):
    """Start a leader like a hook that runs `script`. Return (Popen, the PIDs of all `count` processes)."""
    leader = subprocess.Popen(
        [sys.executable, "-c", FORKER, script],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={"CNPROCD_ATTEMPT_ID": mark, "PATH": "/usr/bin:/bin"},
    )
    return leader, [int(leader.stdout.readline()) for _ in range(count)]


READERS: list[ProcessReader] = []


def reader():
    """The reader of this test."""
    if not READERS:
        READERS.append(ProcessReader())
    return READERS[0]


def in_loop(test):
    """Run a coroutine test, and close its reader in its event loop."""

    @functools.wraps(test)
    async def run(*args, **kwargs):
        try:
            await test(*args, **kwargs)
        finally:
            while READERS:
                one = READERS.pop()
                one.close()
                await edges_gone([one.edge])

    return aio(run)


def root_of(leader):
    return Root(leader.pid, None, MARK)


SHAPES = {
    "a child": ("child(stay)", 2),
    "a grandchild": ("child(lambda: (child(stay), stay()))", 3),
    "an orphan of the session": ("child(lambda: child(stay))", 2),
    "its own process group": ("child(lambda: (os.setpgid(0, 0), stay()))", 2),
    "a daemon, by setsid and double fork": (
        "child(lambda: (os.setsid(), child(lambda: (os.setsid(), child(stay)))))",
        2,
    ),
    "a child without the mark": (
        "child(lambda: os.execve('/bin/sh', ['sh', '-c', 'echo $$; while :; do sleep 1000; done'], {}))",
        2,
    ),
    "one that ignores TERM": ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); child(stay)", 2),
}


@pytest.mark.parametrize("shape", SHAPES)
@in_loop
async def test_all_processes_of_a_hook_are_found_and_ended(shape):
    leader, pids = tree(*SHAPES[shape])
    bystander, _ = tree("pass", 1, mark=OTHER_MARK)
    try:
        found = {member.pid for member in await group.members(root_of(leader), reader())}
        assert set(pids) <= found
        assert bystander.pid not in found
        assert os.getpid() not in found
        assert await group.end(root_of(leader), reader=reader(), grace_s=0.2) == 0
        assert not [pid for pid in pids if alive(pid)]
        assert alive(bystander.pid)
    finally:
        for one in (leader, bystander):
            one.kill()
            one.wait()


@in_loop
async def test_one_that_obeys_term_is_not_killed():
    leader, _ = tree("pass", 1)
    assert await group.end(root_of(leader), reader=reader(), grace_s=60) == 0
    assert leader.wait() == -signal.SIGTERM


@in_loop
async def test_a_fork_bomb_is_ended():
    bomb = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "for generation in range(5):\n"
        "    if os.fork() == 0 and generation % 2: os.setpgid(0, 0)\n"
    )
    leader, pids = tree(bomb, 32)
    assert await group.end(root_of(leader), reader=reader(), grace_s=0.05) == 0
    assert not [pid for pid in pids if alive(pid)]
    leader.wait()


@in_loop
async def test_a_pid_that_was_reused_is_not_taken_for_the_hook():
    other, _ = tree("pass", 1, mark=OTHER_MARK)
    try:
        ticks = start_ticks(other.pid)
        assert await group.members(Root(other.pid, ticks - 1, MARK), reader()) == []
        assert [m.pid for m in await group.members(Root(other.pid, ticks, MARK), reader())] == [other.pid]
        assert await group.end(Root(other.pid, ticks - 1, MARK), 0, reader()) == 0
        assert alive(other.pid)
    finally:
        other.kill()
        other.wait()


@in_loop
async def test_a_group_member_with_a_reused_pid_is_not_signalled():
    other, _ = tree("pass", 1)
    ticks = start_ticks(other.pid)
    with await group._signalled([group.Member(other.pid, ticks + 1)], signal.SIGKILL, reader()) as signalled:
        assert not signalled.pidfds
    assert alive(other.pid)
    with await group._signalled([group.Member(other.pid, ticks)], signal.SIGKILL, reader()):
        pass
    assert other.wait() == -signal.SIGKILL


@in_loop
async def test_a_hook_that_is_gone_already():
    leader, _ = tree("os._exit(0)", 0)
    leader.wait()
    assert await group.end(Root(None, None, MARK), 1, reader()) == 0
    assert start_ticks(leader.pid) is None


@in_loop
async def test_an_exit_is_seen_through_its_pidfd_and_not_reaped():
    pid = os.fork()
    if pid == 0:
        os._exit(5)
    pidfd = os.pidfd_open(pid)
    async with asyncio.timeout(60):
        await group.exited(pidfd)
    assert os.waitid(os.P_PIDFD, pidfd, os.WEXITED).si_status == 5
    os.close(pidfd)
