"""A disk that does not answer at a start, a file that is locked, and the process of the spool that is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from kernel.blocking import Endurance, FrozenDisk
from kernel.harness import PATIENCE_S, running

READY_WITHIN_S = 9.0  # the daemon waits 2 s for the spool, and then no longer for the snapshot of the rules


@pytest.fixture
def endurance(tmp_path):
    os.chmod(tmp_path, 0o755)
    return Endurance(tmp_path)


def killed_within_a_hook(tmp_path, endurance, *options):
    """Kill a daemon while its first hook runs. Return the hook's event PID."""
    hook = tmp_path / "hook"
    script = hook.read_text()
    hook.write_text("#!/bin/sh\nexec sleep 1000\n")
    with running(tmp_path, endurance.rules, *options) as daemon:
        pid = endurance.fail()
        daemon.wait_for("hook_started", pid=pid)
        daemon.mark()  # both halves of that death are handled, and not in flight any more
        daemon.kill()
    hook.write_text(script)
    return pid


def test_a_disk_that_is_frozen_at_the_start_stops_nothing(tmp_path, endurance):
    """The interrupted job of the last daemon is taken up after the thaw, and nothing runs twice."""
    disk = FrozenDisk(tmp_path)
    options = ("--state-dir", str(disk.directory / "state"))
    try:
        interrupted = killed_within_a_hook(tmp_path, endurance, *options)
        with disk.blocked():
            began = time.monotonic()
            with running(tmp_path, endurance.rules, *options) as daemon:
                assert time.monotonic() - began < READY_WITHIN_S
                daemon.wait_for("spool_not_durable")
                new = [endurance.fail() for _ in range(3)]
                for pid in new:
                    daemon.wait_for("hook_finished", pid=pid)
                assert interrupted not in endurance.hooks_ran()
                os.close(thawed(disk))
                daemon.wait_for("spool_durable")
                daemon.wait_for("hook_finished", pid=interrupted)
                assert daemon.stop() == 0
        with running(tmp_path, endurance.rules, *options) as daemon:
            daemon.mark()
            assert daemon.stop() == 0
        assert sorted(endurance.hooks_ran()) == sorted([interrupted, *new])
        endurance.assert_nothing_doubled()
    finally:
        disk.close()


def thawed(disk):
    """Thaw the disk before its block ends. Return a descriptor of it."""
    import fcntl

    from kernel.blocking import FITHAW

    fd = os.open(disk.directory, os.O_RDONLY)
    fcntl.ioctl(fd, FITHAW, 0)
    return fd


def test_an_interrupted_job_of_a_locked_file_is_taken_up(tmp_path, endurance):
    interrupted = killed_within_a_hook(tmp_path, endurance)
    holder = sqlite3.connect(tmp_path / "state" / "spool.sqlite3", isolation_level=None, timeout=PATIENCE_S)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    with running(tmp_path, endurance.rules) as daemon:
        daemon.wait_for("spool_not_durable")
        holder.close()
        daemon.wait_for("hook_finished", pid=interrupted)
        assert daemon.stop() == 0
    endurance.assert_nothing_doubled()


def test_the_process_of_the_spool_may_be_killed(tmp_path, endurance):
    """Matches and hooks go on, the jobs are on the disk again soon, and nothing runs twice."""
    with running(tmp_path, endurance.rules) as daemon:
        first = endurance.fail()
        daemon.wait_for("hook_finished", pid=first)
        os.kill(disk_process(daemon.process.pid), signal.SIGKILL)
        for _ in range(5):
            pid = endurance.fail()
            daemon.wait_for("hook_finished", pid=pid)
        daemon.wait_for("spool_durable")
        assert daemon.stop() == 0
    with running(tmp_path, endurance.rules) as daemon:
        daemon.mark()
        assert daemon.stop() == 0
    endurance.assert_hooks_ran(0)
    endurance.assert_nothing_doubled()


def disk_process(parent):
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"disk_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    raise AssertionError("no process of the spool")
