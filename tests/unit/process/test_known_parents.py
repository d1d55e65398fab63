"""Parents that were read before are read by the loop, and are never another process that got their PID."""

from __future__ import annotations

import os
import subprocess

import pytest

from cnprocd.process import known_parents
from cnprocd.process.known_parents import MOST_PARENTS, KnownParents
from cnprocd.process.model import Wanted
from cnprocd.process.pidfd_watch import PidfdWatch
from cnprocd.process.procfs import read_parent, read_process


@pytest.fixture
def parents():
    known = KnownParents()
    yield known
    known.close()


@pytest.fixture
def started():
    """Start programs that wait; end and reap all of them at the end."""
    processes = []

    def start(*argv: str) -> subprocess.Popen:
        processes.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def learn(parents: KnownParents, pid: int) -> None:
    watch = PidfdWatch(pid)
    parents.add(read_parent(pid), watch)


def test_a_known_parent_has_its_name_of_now(parents, started):
    process = started("/bin/sh", "-c", "echo; read line; exec cat")
    process.stdout.readline()
    learn(parents, process.pid)
    before = parents.read(process.pid)
    assert (before.comm, before.ppid) == ("sh", os.getpid())
    process.stdin.write(b"go\nhere\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"here\n"  # cat runs
    now = parents.read(process.pid)
    assert (now.comm, now.start_ns) == ("cat", before.start_ns)


def test_a_process_that_is_not_known_is_none(parents, started):
    assert parents.read(started("/bin/cat").pid) is None


def test_a_parent_that_ended_is_forgotten(parents, started):
    process = started("/bin/cat")
    learn(parents, process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert parents.read(process.pid) is None, "a zombie keeps its status file"
    assert len(parents) == 0


def test_what_ended_before_it_was_added_is_not_known(parents, started):
    process = started("/bin/cat")
    watch, found = PidfdWatch(process.pid), read_process(process.pid, Wanted())
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    parents.add(found, watch)
    assert len(parents) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="writing /proc/sys/kernel/ns_last_pid needs root")
def test_the_next_owner_of_the_pid_is_not_the_parent(parents, started):
    process = started("/bin/cat")
    learn(parents, process.pid)
    process.kill()
    process.communicate()
    for _ in range(500):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(process.pid - 1))
        other = started("/bin/cat")
        if other.pid == process.pid:
            break
        other.kill()
        other.communicate()
    else:
        pytest.skip("other programs took the PID each time")
    assert parents.read(process.pid) is None


def test_known_parents_are_bounded_and_closed(started, monkeypatch):
    monkeypatch.setattr(known_parents, "MOST_PARENTS", 2)
    parents = KnownParents()
    processes = [started("/bin/cat") for _ in range(4)]
    held = len(os.listdir("/proc/self/fd"))
    for process in processes:
        learn(parents, process.pid)
    assert len(parents) == 2 < MOST_PARENTS
    assert len(os.listdir("/proc/self/fd")) - held == 2
    assert [parents.read(process.pid) is None for process in processes] == [True, True, False, False]
    parents.close()
    assert len(os.listdir("/proc/self/fd")) == held
