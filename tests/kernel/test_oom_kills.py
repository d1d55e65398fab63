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
from typing import Any

import pytest
from kernel.harness import PATIENCE_S, running

from cnprocd.connector.decode import decode
from cnprocd.connector.event import Exit
from cnprocd.connector.listener import Listener
from cnprocd.control.client import Client
from cnprocd.process.kernel_log import KernelLog
from cnprocd.process.model import Occurrence, Process

RULES = """
rules:
  - name: starved
    events: [nonzero_exit]
    match: {comm: cnptest-oom, oom_killed: true}
    log: {message: "{comm} oom_killed {oom_killed}"}
  - name: by-hand
    events: [nonzero_exit]
    match: {comm: cnptest-oom, signal: SIGKILL, oom_killed: false}
  - {name: any, events: [exit, nonzero_exit], match: {comm: cnptest-oom}}
$MARKER
"""
GREEDY = "a = []\nwhile True: a.append(bytearray(1 << 20))"
THREADED = f"import threading\nfor _ in range(20): threading.Thread(target=threading.Event().wait).start()\n{GREEDY}"
PATIENT = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture
def group():
    """A memory cgroup of 48 MiB without swap."""
    v1 = Path("/sys/fs/cgroup/memory")
    parent = v1 if v1.exists() else Path("/sys/fs/cgroup")
    made = parent / "cnptest-oom"
    made.mkdir()
    with contextlib.suppress(OSError):  # no account of swap
        (made / "memory.swap.max").write_text("0")
    (made / ("memory.limit_in_bytes" if v1.exists() else "memory.max")).write_text(str(48 << 20))
    yield made
    for pid in (made / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    while (made / "cgroup.procs").read_text():
        pass
    made.rmdir()


def in_group(group, code):
    def join():
        (group / "cgroup.procs").write_text(str(os.getpid()))

    named = f"import ctypes; ctypes.CDLL(None).prctl(15, b'cnptest-oom', 0, 0, 0)\n{code}"
    return subprocess.Popen(
        [sys.executable, "-IS", "-c", named], stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=join
    )


def end_of(pid, listener):
    """The exit event of the process's leader, as soon as it can be read; None if a storm of others has displaced it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        poll = select.poll()
        poll.register(listener.fileno(), select.POLLIN)
        poll.poll(500)
        while (slots := listener.receive()) is not None:
            for event in decode(slots, listener.rejects):
                if isinstance(event, Exit) and event.process_pid == pid:
                    return event
        if listener.overruns:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            listener.overruns = 0
            return None
    raise AssertionError(f"no exit event of {pid}")


def verdict(log, pid, status, end_ns):
    occurrence = Occurrence("exit", Process(pid), pid, status, end_ns)
    log.explain(occurrence, time.monotonic_ns())
    return occurrence.oom_killed


@pytest.mark.parametrize("code", [GREEDY, THREADED], ids=["one-thread", "many-threads"])
def test_the_line_is_there_when_the_exit_event_is_read(group, code):
    listener = Listener.open(64 << 20)
    listener.subscribe(0.5)
    log = KernelLog.open()
    try:
        ends = 0
        for _ in range(60):
            if ends == 20:
                break
            process = in_group(group, code)
            end = end_of(process.pid, listener)
            if end is None:
                process.wait()
                continue
            ends += 1
            assert verdict(log, process.pid, end.exit_code, end.timestamp_ns) is True
            assert process.wait() == -signal.SIGKILL
        assert ends
    finally:
        listener.unsubscribe()
        log.close()


def test_a_kill_by_hand_in_the_same_group_is_none(group):
    log = KernelLog.open()
    try:
        patient = in_group(group, PATIENT)
        patient.stdout.readline()
        greedy = in_group(group, GREEDY)
        greedy.wait()
        assert patient.poll() is None
        patient.kill()
        status = -patient.wait()
        assert verdict(log, patient.pid, status, time.monotonic_ns()) is False
        assert verdict(log, greedy.pid, signal.SIGKILL, time.monotonic_ns()) is True
    finally:
        log.close()


def ended(daemon, rule):
    daemon.mark()
    return {record["pid"]: record["oom_killed"] for record in daemon.matches(rule)}


def test_an_oom_kill_and_a_kill_by_hand_in_one_group_differ(group, tmp_path):
    """One container: its greedy processes are killed for want of memory, another one by hand; one fails."""
    with running(tmp_path, RULES) as daemon:
        patient = in_group(group, PATIENT)
        patient.stdout.readline()
        greedy = []
        for code in (GREEDY, THREADED, GREEDY):  # one at a time: each has its name before it takes memory
            greedy.append(in_group(group, code))
            assert greedy[-1].wait() == -signal.SIGKILL
        assert patient.poll() is None
        patient.kill()
        patient.wait()
        failed = in_group(group, "raise SystemExit(3)")
        assert failed.wait() == 3
        victims = {process.pid: True for process in greedy}
        assert ended(daemon, "starved") == victims
        assert ended(daemon, "by-hand") == {patient.pid: False}
        assert ended(daemon, "any") == {**victims, patient.pid: False, failed.pid: False}
        assert {record["message"] for record in daemon.matches("starved")} == {"cnptest-oom oom_killed true"}


def test_a_process_cannot_forge_a_line_of_the_kernel(group, tmp_path):
    """Even root's line has another facility; the name of a process that segfaults stands at the start of a line."""
    with running(tmp_path, RULES) as daemon:
        patient = in_group(group, PATIENT)
        patient.stdout.readline()
        line = f"Out of memory: Killed process {patient.pid} (python3) total-vm:1kB"
        for prefix in ("", "<0>", "<3>", "<4>x\n<3>"):
            Path("/dev/kmsg").write_text(prefix + line + "\n")
        patient.kill()
        patient.wait()
        assert ended(daemon, "by-hand") == {patient.pid: False}
        assert ended(daemon, "starved") == {}


def test_without_the_kernels_log_an_oom_kill_is_unknown(group, tmp_path):
    """It matches neither of the rules, is null in the record, and is counted with its reason."""
    with running(tmp_path, RULES, "--refuse", "kernel_log") as daemon:
        greedy = in_group(group, GREEDY)
        failed = in_group(group, "raise SystemExit(3)")
        greedy.wait(), failed.wait()
        everything = ended(daemon, "any")
        assert (everything[greedy.pid], everything[failed.pid]) == (None, False)
        assert ended(daemon, "starved") == ended(daemon, "by-hand") == {}
        with Client(tmp_path / "run") as client:
            status: Any = client.ask("status")
        expected = {"attribute": "oom_killed", "reason": "unreadable", "count": 2}
        assert expected in status["events"]["identity_unknown"]
        assert status["kernel"]["no_kernel_log_because"] == "refused on request"


def test_a_flooded_kernel_log_costs_at_most_what_it_hides(group, tmp_path):
    """More lines than the log holds: the kill is known if its line is there, else unknown; never a kill by hand."""
    with running(tmp_path, RULES) as daemon:
        for _ in range(3):
            greedy = in_group(group, GREEDY)
            os.waitid(os.P_PID, greedy.pid, os.WEXITED | os.WNOWAIT)
            for _ in range(30):
                with open("/dev/kmsg", "w", buffering=1) as kmsg:  # the kernel takes ten lines of each opening
                    kmsg.writelines(f"cnptest {'x' * 800}\n" for _ in range(10))
            greedy.wait()
        assert set(ended(daemon, "any").values()) <= {True, None}
        assert ended(daemon, "by-hand") == {}
