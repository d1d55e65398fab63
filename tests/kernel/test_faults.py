"""Faults that must not cost a match or a cleanup: disks, databases, descriptors, processes, memory."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kernel.harness import PATIENCE_S, Daemon, child, rename, running, wait_status
from kernel.refusing import refusing, why_not

from cnprocd.control.client import Client

STORM = str(Path(__file__).with_name("storm.py"))
RULES = """
settings: {{hook_slots: 2}}
rules:
  - name: cleaned
    events: [nonzero_exit]
    match: {{comm: cnptest-fault}}
    run: {{command: ["{hook}"], timeout: 20s}}
$MARKER
"""


@pytest.fixture
def ran(tmp_path):
    """The file where the hook writes its PIDs."""
    return tmp_path / "ran"


@pytest.fixture
def rules(tmp_path, ran):
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\necho $CNPROCD_PID >> {ran}\n")
    hook.chmod(0o755)
    return RULES.format(hook=hook)


def fail():
    pid = child(lambda: (rename("cnptest-fault"), os._exit(3)))
    wait_status(pid)
    return pid


def storm(count):
    """Run `count` failures, one after the other. Return their PIDs."""
    command = [sys.executable, "-IS", STORM, str(count), "1", "cnptest-fault"]
    return list(map(int, subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[1:]))


def cleaned(daemon, ran, pids):
    """Check that each of these deaths matches once and its hook succeeds."""
    for pid in pids:
        record = daemon.wait_for("rule_matched", rule="cleaned", pid=pid)
        daemon.wait_for("hook_finished", job_id=record["job_id"])
    daemon.mark()
    assert sorted(match["pid"] for match in daemon.matches("cleaned") if match["pid"] in pids) == sorted(pids)
    assert set(map(str, pids)) <= set(ran.read_text().split())


def jobs_of(daemon):
    with Client(daemon.directory / "run", PATIENCE_S) as client:
        return client.ask("status")["jobs"]


# -- the state directory -----------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """Mount a disk of 3 MB as the state directory: enough for the mapped file, and little more."""
    directory = tmp_path / "state"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "test", directory], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def fill(directory):
    with (directory / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def test_a_disk_that_is_full_at_the_start(disk, tmp_path, rules, ran):
    fill(disk)
    with running(tmp_path, rules) as daemon:
        cleaned(daemon, ran, [fail() for _ in range(5)])
        daemon.wait_for("spool_not_durable")
        assert jobs_of(daemon)["durable"] is False


def test_a_disk_that_fills_up_while_we_run(disk, tmp_path, rules, ran):
    with running(tmp_path, rules) as daemon:
        cleaned(daemon, ran, [fail()])
        fill(disk)
        pids = [fail() for _ in range(60)]
        storm = subprocess.run(
            [sys.executable, "-IS", STORM, "300", "1", "cnptest-fault"], capture_output=True, text=True
        )
        pids += map(int, storm.stdout.split()[1:])
        cleaned(daemon, ran, pids)
        assert jobs_of(daemon)["waiting"] == 0


def test_a_state_directory_that_cannot_be_written(disk, tmp_path, rules, ran):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with running(tmp_path, rules) as daemon:
        cleaned(daemon, ran, [fail() for _ in range(5)])
        assert "Read-only" in str(daemon.wait_for("spool_not_durable")["reason"])
        assert jobs_of(daemon)["durable"] is False


LOCKER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=0)
try:
    db.execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError as error:
    print(error, flush=True)
else:
    print("ours", flush=True)
    sys.stdin.readline()
"""


def test_a_database_that_another_process_holds(tmp_path, rules, ran):
    """If it is locked before the start, the daemon runs without it. While the daemon runs, no process can lock it."""
    file = tmp_path / "state" / "spool.sqlite3"
    with running(tmp_path, rules) as daemon:
        cleaned(daemon, ran, [fail()])
        tried = subprocess.run([sys.executable, "-c", LOCKER, file], capture_output=True, text=True)
        assert tried.stdout == "database is locked\n"
        cleaned(daemon, ran, [fail()])
        daemon.stop()
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "ours\n"
        with running(tmp_path, rules) as daemon:
            cleaned(daemon, ran, [fail() for _ in range(5)])
            assert "locked" in str(daemon.wait_for("spool_not_durable")["reason"])
            assert jobs_of(daemon)["durable"] is False
        holder.communicate("\n")


@pytest.mark.parametrize("damage", ["garbage", "cut", "middle"])
def test_a_damaged_database_is_renamed_and_no_cleanup_waits(tmp_path, rules, ran, damage):
    with running(tmp_path, rules) as daemon:
        cleaned(daemon, ran, [fail() for _ in range(20)])
        assert daemon.stop() == 0
    file = daemon.state_dir / "spool.sqlite3"
    raw = file.read_bytes()
    file.write_bytes(
        {"garbage": os.urandom(8192), "cut": raw[:3000], "middle": raw[:4096] + os.urandom(len(raw) - 4096)}[damage]
    )
    with running(tmp_path, rules) as daemon:
        daemon.wait_for("spool_damaged")
        cleaned(daemon, ran, [fail() for _ in range(5)])
        assert daemon.stop() == 0
    assert list(daemon.state_dir.glob("spool.sqlite3.damaged-*"))
    with sqlite3.connect(file) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# -- descriptors, processes, memory ------------------------------------------------------------------------------


def test_no_descriptors_left(tmp_path, rules, ran):
    """Matching needs none. Hooks wait without a failed attempt, and run when descriptors are available."""
    with running(tmp_path, rules) as daemon:
        cleaned(daemon, ran, [fail()])
        pid = daemon.process.pid
        generous = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, generous[1]))
        pids = [fail() for _ in range(2)]
        daemon.mark()
        for one in pids:
            daemon.wait_for("hook_failed", pid=one, will_retry=True)
        assert not set(map(str, pids)) & set(ran.read_text().split())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, generous)
        cleaned(daemon, ran, pids)
        assert not [one for one in daemon.records if one["event"] == "job_dead"]


@contextmanager
def cgroup(controller, limit, value):
    """Return a cgroup with this controller, of version 1 or 2, whichever this machine has."""
    for top in (Path("/sys/fs/cgroup", controller), Path("/sys/fs/cgroup")):
        directory = top / f"cnptest-{os.getpid()}"
        with suppress(OSError):
            directory.mkdir()
            if (directory / limit).exists():
                (directory / limit).write_text(value)
                break
            directory.rmdir()
    else:
        pytest.skip(f"no cgroup with {limit} can be made here")
    try:
        yield directory
    finally:
        while (directory / "cgroup.procs").read_text():
            pass
        directory.rmdir()


def within(directory):
    return ("sh", "-c", f'echo $$ > {directory}/cgroup.procs && exec "$@"', "sh")


def test_no_process_can_be_forked(tmp_path, rules, ran):
    """EAGAIN from fork(2), by a pids cgroup: hooks wait, and matching continues."""
    with cgroup("pids", "pids.max", "max") as group, running(tmp_path, rules, under=within(group)) as daemon:
        cleaned(daemon, ran, [fail()])
        (group / "pids.max").write_text("0")
        pids = [fail() for _ in range(3)]  # one of them can have a process that was forked before
        daemon.mark()
        assert "cannot create a process" in str(daemon.wait_for("hook_failed", will_retry=True)["reason"])
        (group / "pids.max").write_text("max")
        cleaned(daemon, ran, pids)
        assert not [one for one in daemon.records if one["event"] == "job_dead"]
        daemon.stop()


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_kernel_has_no_memory_for_a_process(tmp_path, rules, ran):
    """ENOMEM from clone(2): hooks wait, a reload fails, matching continues, nothing is lost or doubled."""
    with refusing(tmp_path) as (refusal, under), running(tmp_path, rules, under=under) as daemon:
        cleaned(daemon, ran, [fail()])
        refusal.begin()
        pids = [fail() for _ in range(3)]  # one of them can have a process that was forked before
        daemon.mark()
        reason = str(daemon.wait_for("hook_failed", will_retry=True)["reason"])
        assert "cannot create a process" in reason and "Cannot allocate memory" in reason
        told = daemon.reload(rules.replace("cnptest-fault", "cnptest-other"))
        assert told["event"] == "rules_rejected"
        assert "cannot start the loader process: Cannot allocate memory" in str(told["message"])
        pids.append(fail())
        daemon.mark()
        assert refusal.refused
        refusal.end()
        cleaned(daemon, ran, pids)
        assert not [one for one in daemon.records if one["event"] == "job_dead"]
        assert daemon.reload(rules)["event"] == "rules_loaded"
        daemon.stop()


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_start_without_memory_for_a_process_may_be_tried_again(tmp_path, rules):
    """The status is not 78, after which systemd would not restart it."""
    with refusing(tmp_path) as (refusal, under):
        refusal.begin()
        daemon = Daemon(tmp_path, rules, under=under)
        assert daemon.process.wait(PATIENCE_S) == 71
        assert "Cannot allocate memory" in daemon.stderr()


def test_a_storm_within_a_memory_limit(tmp_path, rules):
    """Twice the memory of an idle daemon is enough for any storm: nothing grows with the number of events."""
    rules = rules.split("    run:")[0] + "$MARKER\n"
    with (
        cgroup("memory", "memory.limit_in_bytes", "134217728") as group,
        running(tmp_path, rules, under=within(group)) as daemon,
    ):
        storm = subprocess.run(
            [sys.executable, "-IS", STORM, "6000", "1", "cnptest-fault"], capture_output=True, text=True
        )
        truth = sorted(map(int, storm.stdout.split()[1:]))
        daemon.mark_burst()
        assert sorted(match["pid"] for match in daemon.matches("cleaned")) == truth
        peak = int((group / "memory.max_usage_in_bytes").read_text())
        print(f"\n{len(truth)} failures matched; the cgroup's peak is {peak >> 20} MiB of 128")
        assert "oom_kill 0" in (group / "memory.oom_control").read_text()
        daemon.stop()
