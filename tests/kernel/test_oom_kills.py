"""Real kills for want of memory, in a cgroup with a limit, against kills by hand."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnprocd.connector.decode import decode
from cnprocd.connector.event import Exit
from cnprocd.connector.listener import Listener
from cnprocd.process.kernel_log import KernelLog

GREEDY = "a = []\nwhile True: a.append(bytearray(1 << 20))"
THREADED = f"import threading\nfor _ in range(20): threading.Thread(target=threading.Event().wait).start()\n{GREEDY}"
PATIENT = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture
def group():
    """A memory cgroup of 24 MiB without swap."""
    v1 = Path("/sys/fs/cgroup/memory")
    parent = v1 if v1.exists() else Path("/sys/fs/cgroup")
    made = parent / "cnptest-oom"
    made.mkdir()
    with contextlib.suppress(OSError):  # no account of swap
        (made / "memory.swap.max").write_text("0")
    (made / ("memory.limit_in_bytes" if v1.exists() else "memory.max")).write_text(str(24 << 20))
    yield made
    for pid in (made / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    while (made / "cgroup.procs").read_text():
        pass
    made.rmdir()


def in_group(group, code):
    def join():
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.Popen(
        [sys.executable, "-IS", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=join
    )


def end_of(pid, listener):
    """The exit event of the process's leader, as soon as it can be read."""
    while True:
        select.select([listener.fileno()], [], [])
        while (slots := listener.receive()) is not None:
            for event in decode(slots, listener.rejects):
                if isinstance(event, Exit) and event.process_pid == pid:
                    return event


@pytest.mark.parametrize("code", [GREEDY, THREADED], ids=["one-thread", "many-threads"])
def test_the_line_is_there_when_the_exit_event_is_read(group, code):
    listener = Listener.open(8 << 20)
    listener.subscribe(0.5)
    log = KernelLog()
    try:
        for _ in range(20):
            process = in_group(group, code)
            end = end_of(process.pid, listener)
            assert log.was_oom_victim(process.pid, end.exit_code, None, end.timestamp_ns) is True
            assert process.wait() == -signal.SIGKILL
    finally:
        listener.unsubscribe()
        log.close()


def test_a_kill_by_hand_in_the_same_group_is_none(group):
    log = KernelLog()
    try:
        patient = in_group(group, PATIENT)
        patient.stdout.readline()
        greedy = in_group(group, GREEDY)
        greedy.wait()
        assert patient.poll() is None
        patient.kill()
        status = -patient.wait()
        assert log.was_oom_victim(patient.pid, status, None, time.monotonic_ns()) is False
        assert log.was_oom_victim(greedy.pid, signal.SIGKILL, None, time.monotonic_ns()) is True
    finally:
        log.close()
