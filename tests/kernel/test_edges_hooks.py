"""Nothing outside stops what starts and ends hooks: a program on a disk that does not answer, a process that hangs.

Hooks are children of the daemon here, or of the runner. What must hold is that of test_edges.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel.blocking import MNT_DETACH, Endurance, Timed, hanging_process, runner_service
from kernel.harness import LIBC, PATIENCE_S, child, rename, wait_status

MODES = ["embedded", "runner"]


@contextlib.contextmanager
def silent_disk(directory: Path) -> Iterator[None]:
    """A FUSE file system over a directory whose server answers nothing: whatever looks at a file in it waits."""
    device = directory.with_name("fuse")
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 229))
    server = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
    assert LIBC.mount(b"fuse", str(directory).encode(), b"fuse", 0, options) == 0
    try:
        yield
    finally:
        os.close(server)  # the kernel then aborts the connection, and what waits gets an error
        LIBC.umount2(str(directory).encode(), MNT_DETACH)


@contextlib.contextmanager
def started(tmp_path: Path, endurance: Endurance, mode: str) -> Iterator[Timed]:
    (tmp_path / "rules.yaml").write_text(endurance.rules.replace("$MARKER", ""))
    with contextlib.ExitStack() as stack:
        options: tuple[str, ...] = ()
        if mode == "runner":
            options = ("--runner", str(stack.enter_context(runner_service(tmp_path))[0]))
        daemon = Timed(tmp_path, endurance.rules, *options)
        stack.callback(daemon.kill)
        yield daemon.ready()


@pytest.mark.parametrize("mode", MODES)
def test_a_program_on_a_silent_disk_delays_no_other_hook(tmp_path, mode):
    """Its hook waits, for as long as its time limit."""
    os.chmod(tmp_path, 0o755)
    (disk := tmp_path / "disk").mkdir()
    (disk / "program").write_text("#!/bin/sh\n")
    (disk / "program").chmod(0o755)
    stuck = f"run: {{command: [{disk}/program], timeout: 1s, retries: 0}}"
    endurance = Endurance(
        tmp_path, f"  - {{name: stuck, events: [nonzero_exit], match: {{comm: cnptest-st}}, {stuck}}}"
    )
    with started(tmp_path, endurance, mode) as daemon:
        endurance.fail()
        endurance.assert_hooks_ran(PATIENCE_S)
        with silent_disk(disk):
            for _ in range(3):
                wait_status(child(lambda: (rename("cnptest-st"), os._exit(3))))
            endurance.live(tmp_path / "run")
            endurance.assert_answered()
            daemon.mark()
            endurance.assert_reported(daemon.records)
            endurance.assert_hooks_ran()
            failed = daemon.wait_for("hook_failed", rule="stuck")
            assert "timed out after 1 s" in str(failed["reason"])
        endurance.assert_nothing_doubled()
        endurance.assert_stops(daemon.process)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["execve", "mmap"])
def test_a_hanging_process_does_not_delay_the_end_of_hooks(tmp_path, mode, kind):
    """Each failed hook lets /proc be searched for the processes that it left behind."""
    os.chmod(tmp_path, 0o755)
    more = (
        "  - {name: vain, events: [nonzero_exit], match: {comm: cnptest-by}, run: {command: [/bin/false], retries: 0}}"
    )
    endurance = Endurance(tmp_path, more)
    with started(tmp_path, endurance, mode) as daemon, hanging_process(kind) as victim:
        endurance.live(tmp_path / "run")
        endurance.assert_answered()
        daemon.mark()
        endurance.assert_reported(daemon.records)
        endurance.assert_hooks_ran()
        for pid in endurance.died_at:
            daemon.wait_for("hook_failed", rule="vain", pid=pid)
        os.kill(victim, 0)
        endurance.assert_stops(daemon.process)


def test_a_stopped_helper_delays_hooks_by_less_than_a_second(tmp_path):
    """SIGSTOP for the process that makes spares, and for the spare: the hook starts from another one."""
    os.chmod(tmp_path, 0o755)
    endurance = Endurance(tmp_path)
    with started(tmp_path, endurance, "embedded") as daemon:
        endurance.fail()
        endurance.assert_hooks_ran(PATIENCE_S)
        helpers = [pid for pid in children_of(daemon.process.pid) if b"starter.py" in cmdline(pid)]
        assert helpers
        for pid in helpers:
            os.kill(pid, signal.SIGSTOP)
        endurance.live(tmp_path / "run")
        endurance.assert_answered()
        daemon.mark()
        endurance.assert_reported(daemon.records)
        for pid in helpers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        endurance.assert_hooks_ran(PATIENCE_S)
        endurance.assert_nothing_doubled()
        assert daemon.stop() == 0


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
