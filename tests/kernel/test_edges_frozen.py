"""Processes of cnprocd that are stopped or frozen, and a runtime directory without inodes.

A frozen cgroup is worse than SIGSTOP: with cgroup v1 not even SIGKILL ends its processes until it is thawed. What must
hold is that of test_edges.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel.blocking import Endurance, Timed, runner_service, small_disk, stopped
from kernel.harness import PATIENCE_S
from kernel.test_edges import collected, logging_to, lost, started

LOOKS_UP = "  - {name: theirs, events: [nonzero_exit], match: {comm: cnptest-by, cmdline: '*'}}"
FREEZER = Path("/sys/fs/cgroup/freezer")


@contextlib.contextmanager
def freezer(name: str) -> Iterator[Path]:
    """A freezer cgroup of version 1, thawed and removed at the end."""
    if not (FREEZER / "cgroup.procs").exists():
        pytest.skip("no freezer cgroup of version 1 is mounted")
    directory = FREEZER / f"cnptest-{name}-{os.getpid()}"
    directory.mkdir()
    try:
        yield directory
    finally:
        (directory / "freezer.state").write_text("THAWED")
        deadline = time.monotonic() + PATIENCE_S
        while pids := (directory / "cgroup.procs").read_text().split():
            for pid in pids:
                with contextlib.suppress(OSError):
                    (FREEZER / "cgroup.procs").write_text(pid)
            assert time.monotonic() < deadline, pids
        directory.rmdir()


def freeze(directory: Path, pids: list[int]) -> None:
    """Freeze these processes."""
    for pid in pids:
        (directory / "cgroup.procs").write_text(str(pid))
    (directory / "freezer.state").write_text("FROZEN")


def children_of(pid: int, script: bytes) -> list[int]:
    """The children of a process that run this script of cnprocd."""
    found = []
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        with contextlib.suppress(OSError):
            if script in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def until_a_child(pid: int, script: bytes) -> list[int]:
    """Wait for such children, and return them."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := children_of(pid, script)):
        assert time.monotonic() < deadline, f"no child runs {script!r}"
    return found


@pytest.fixture
def endurance(tmp_path):
    os.chmod(tmp_path, 0o755)
    return Endurance(tmp_path, LOOKS_UP)


def test_frozen_children_of_the_daemon_stop_nothing(tmp_path, endurance):
    """Those of the spool, of /proc, of hooks' ends and of metrics; they cannot be killed."""
    with freezer("children") as group, started(tmp_path, endurance) as daemon:
        endurance.fail()
        endurance.assert_hooks_ran(PATIENCE_S)
        children = children_of(daemon.process.pid, b"_child.py")
        assert len(children) >= 2
        freeze(group, children)
        endurance.live(tmp_path / "run")
        endurance.assert_answered()
        endurance.assert_reported(collected(daemon))
        endurance.assert_hooks_ran(PATIENCE_S)
        endurance.assert_nothing_doubled()
        endurance.assert_stops(daemon.process)


def test_a_frozen_loader_delays_nothing_but_its_reload(tmp_path, endurance):
    """It is a fork of the daemon, and has its command line."""
    with freezer("loader") as group, started(tmp_path, endurance) as daemon:
        daemon.process.send_signal(signal.SIGHUP)
        freeze(group, until_a_child(daemon.process.pid, b"cnprocd.cli.cnprocd"))
        endurance.live(tmp_path / "run")
        endurance.assert_answered()
        endurance.assert_reported(collected(daemon))
        endurance.assert_hooks_ran()
        endurance.assert_stops(daemon.process)


def test_a_frozen_runner_holds_no_slot_for_ever(tmp_path, endurance):
    """Its hooks run when it is thawed, each once."""
    endurance.rules = endurance.rules.replace(
        "timeout: 20s", "timeout: 1s, retries: 5, backoff: {initial: 1s, max: 1s}"
    )
    (tmp_path / "rules.yaml").write_text(endurance.rules.replace("$MARKER", ""))
    with (
        runner_service(tmp_path) as (path, runner),
        freezer("runner") as group,
        started(tmp_path, endurance, "--runner", str(path)) as daemon,
    ):
        endurance.fail()
        endurance.assert_hooks_ran()
        freeze(group, [runner])
        endurance.live(tmp_path / "run")
        endurance.assert_answered()
        endurance.assert_reported(collected(daemon))
        daemon.wait_for("runner_silent")
        (group / "freezer.state").write_text("THAWED")
        endurance.assert_hooks_ran()
        endurance.assert_nothing_doubled()
        endurance.assert_stops(daemon.process)


@pytest.mark.parametrize("end", ["go-on", "stop"])
def test_a_stopped_log_writer_stops_nothing(tmp_path, endurance, end):
    """SIGSTOP for the process that writes log records to a file. In the end each line is whole or counted as lost."""
    log = tmp_path / "log"
    with log.open("ab") as stdout, logging_to(tmp_path, endurance, stdout, "--log-format", "json") as process:
        (writer,) = until_a_child(process.pid, b"write_child.py")
        with stopped(writer):
            endurance.live(tmp_path / "run")
            endurance.assert_answered()
            endurance.assert_hooks_ran()
            if end == "stop":
                endurance.assert_stops(process)
        if end == "go-on":
            endurance.assert_stops(process)
        ended(writer)
    records = [json.loads(line) for line in log.read_bytes().splitlines()]
    seen = [record["pid"] for record in records if record.get("rule") == "seen" and record["event"] == "rule_matched"]
    assert len(seen) == len(set(seen))
    if end == "go-on":
        assert set(seen) == set(endurance.died_at) and not any(lost(records))
    endurance.assert_nothing_doubled()


def ended(pid: int) -> None:
    """Wait for the end of a process that is no child of this one."""
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} has not ended"
        time.sleep(0.01)


def test_a_runtime_directory_without_inodes_stops_nothing(tmp_path, endurance):
    """No file can be made in it any more while the daemon runs, so hooks' PIDs cannot be handed on."""
    with small_disk(tmp_path / "run", "4m,nr_inodes=64") as run, started(tmp_path, endurance) as daemon:
        fill(run)
        endurance.live(run)
        endurance.assert_answered()
        endurance.assert_reported(collected(daemon))
        endurance.assert_hooks_ran()
        endurance.assert_nothing_doubled()
        endurance.assert_stops(daemon.process)


def test_a_start_without_inodes_works_or_says_why(tmp_path, endurance):
    """Each number of free inodes: the daemon starts and works, or ends with one sentence and no traceback."""
    for free in range(6):
        directory = tmp_path / f"run-{free}"
        with small_disk(directory, "4m,nr_inodes=32") as run:
            for filler in fill(run)[:free]:
                filler.unlink()
            daemon = Timed(tmp_path, endurance.rules, "--runtime-dir", str(run))
            try:
                status, answer = outcome(daemon)
                print(f"{free} free inodes: {answer}")
                assert "Traceback" not in answer
                if status is None:
                    endurance.fail()
                    endurance.assert_hooks_ran()
                    endurance.assert_stops(daemon.process)
                else:
                    assert str(run) in answer
            finally:
                daemon.kill()


def outcome(daemon: Timed) -> tuple[int | None, str]:
    """Wait until a daemon has started or ended. Return its exit status, if it ended, and what it wrote."""
    try:
        daemon.wait_for("started")
    except AssertionError:
        return daemon.process.wait(PATIENCE_S), daemon.stderr()
    return None, "works"


def fill(directory: Path) -> list[Path]:
    """Use every inode of a file system."""
    made = []
    with contextlib.suppress(OSError):
        while True:
            path = directory / f"filler-{len(made)}"
            path.touch()
            made.append(path)
    return made
