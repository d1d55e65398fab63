"""Faults of the machine: /proc, clocks, CPUs, the journal, no D-Bus, and a stopped daemon."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from kernel.harness import PATIENCE_S, Daemon, child, rename, running, wait_status

from cnprocd.control.client import Client

NOBODY = 65534
STOP_S = float(os.environ.get("CNPROCD_STOP_S", "2"))
STORM = str(Path(__file__).with_name("storm.py"))
FAILED = """
rules:
  - {name: failed, events: [nonzero_exit], match: {comm: cnptest-around}}
  - {name: told, events: [nonzero_exit], match: {comm: sleep, cmdline: "sleep 61*", exe_claimed: "*", user: nobody}}
$MARKER
"""


def fail(comm="cnptest-around"):
    pid = child(lambda: (rename(comm), os._exit(3)))
    wait_status(pid)
    return pid


def matched(daemon, rule="failed"):
    """Return PIDs of failures whose exit was seen. Those recovered after an overrun have an unknown status."""
    daemon.mark()
    return sorted(match["pid"] for match in daemon.matches(rule) if match["exit_code"] or match["signal"])


# -- /proc -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sees_others", [True, False], ids=["with-ptrace", "without-ptrace"])
def test_proc_that_hides_other_users(tmp_path, sees_others):
    """hidepid=2. CAP_SYS_PTRACE overrides it. Without it comm and exe come from exit records, the rest is unknown."""
    hide = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    drop = () if sees_others else ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
    with running(tmp_path, FAILED, under=("unshare", "--mount", "sh", "-c", hide, "sh", *drop)) as daemon:

        def become():
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)

        failing = child(lambda: (become(), rename("cnptest-around"), os._exit(3)))
        wait_status(failing)
        sleeper = child(lambda: (become(), os.execv("/bin/sleep", ["sleep", "61"])))
        while Path(f"/proc/{sleeper}/comm").read_text() != "sleep\n":
            pass
        daemon.mark()
        os.kill(sleeper, signal.SIGKILL)
        wait_status(sleeper)
        assert matched(daemon) == [failing]
        assert matched(daemon, "told") == ([sleeper] if sees_others else [])


# -- clocks ------------------------------------------------------------------------------------------------------

SKEWED = """
import os, time
real, real_ns = time.time, time.time_ns
def offset():
    try:
        return int(open(os.environ["CNPTEST_OFFSET"]).read() or 0)
    except (OSError, ValueError):
        return 0
time.time = lambda: real() + offset()
time.time_ns = lambda: real_ns() + offset() * 10**9
clock = time.clock_gettime_ns
time.clock_gettime_ns = lambda which: clock(which) + (offset() * 10**9 if which == time.CLOCK_REALTIME else 0)
"""
DAY = 86400


@pytest.mark.parametrize("days", [-30, 30], ids=["back", "forth"])
def test_a_clock_step_neither_delays_nor_hastens_a_job(tmp_path, days):
    """CLOCK_REALTIME belongs to the whole machine, so only the daemon's calls get a clock that steps.

    A retry that is due in 100 ms runs then, a deadline of a minute does not expire, a throttle keeps its window.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SKEWED)
    skew, go = tmp_path / "offset", tmp_path / "go"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\n[ -e {go} ]\n")
    hook.chmod(0o755)
    rules = f"""
rules:
  - name: failed
    events: [nonzero_exit]
    match: {{comm: cnptest-around}}
    cooldown: 1h
    run:
      command: [{hook}]
      retries: 100
      deadline: 1m
      backoff: {{initial: 100ms, max: 100ms}}
$MARKER
"""
    env = {"PYTHONPATH": str(tmp_path / "site"), "CNPTEST_OFFSET": str(skew)}
    with running(tmp_path, rules, env=env) as daemon:
        first = fail()
        job = daemon.wait_for("rule_matched", rule="failed", pid=first)["job_id"]
        daemon.wait_for("hook_failed", job_id=job)
        skew.write_text(str(days * DAY))
        before = len([one for one in daemon.records if one["event"] == "hook_failed"])
        while len([one for one in daemon.records if one["event"] == "hook_failed"]) < before + 3:
            daemon.next_record()
        go.touch()
        daemon.wait_for("hook_finished", job_id=job)
        fail()
        assert matched(daemon) == [first], "the cooldown goes on"
        with Client(tmp_path / "run") as client:
            found = client.ask("status")
        assert found["jobs"]["dead"] == 0
        (failed,) = [one for one in found["rules"] if one["name"] == "failed"]
        assert (failed["last_hit_ns"] - found["started_ns"]) // (DAY * 10**9) in (days, days - 1), "the clock did step"
        assert daemon.stop() == 0
    with running(tmp_path, rules, env=env) as daemon:  # and a start with the clock as it is now
        second = fail()
        daemon.wait_for("hook_finished", pid=second)


# -- processors --------------------------------------------------------------------------------------------------

CPU1 = Path("/sys/devices/system/cpu/cpu1/online")


@contextlib.contextmanager
def unplugged():
    try:
        CPU1.write_text("0")
    except OSError as error:
        pytest.skip(f"no processor can be taken away here: {error}")
    try:
        yield
    finally:
        CPU1.write_text("1")


@pytest.mark.parametrize("when", ["while-we-run", "before-the-start"])
def test_a_processor_that_goes_and_comes_back(tmp_path, when):
    """Exit records are registered for every possible CPU, events are counted for each CPU: both must keep working."""

    def on_it():
        os.sched_setaffinity(0, {1})
        rename("cnptest-around")
        os._exit(3)

    if when == "before-the-start":
        with unplugged():
            daemon = Daemon(tmp_path, FAILED).ready()
            pids = [fail()]
    else:
        daemon = Daemon(tmp_path, FAILED).ready()
        pids = [child(on_it)]
        wait_status(pids[0])
        with unplugged():
            pids.append(fail())
            assert matched(daemon) == sorted(pids)
    try:
        for _ in range(20):
            pids.append(child(on_it))
            wait_status(pids[-1])
        assert matched(daemon) == sorted(pids)
        assert {match["comm"] for match in daemon.matches("failed")} == {"cnptest-around"}
        assert all(match["max_rss_kib"] for match in daemon.matches("failed")), "each has its exit record"
        assert not [one for one in daemon.records if one["event"] in ("overrun", "recovered", "identity_unknown")]
    finally:
        daemon.kill()


# -- the journal, and D-Bus --------------------------------------------------------------------------------------


def parsed(data):
    """Parse a datagram of the native journal protocol strictly (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""
    entry, at = {}, 0
    while at < len(data):
        end = data.index(b"\n", at)
        name, sign, value = data[at:end].partition(b"=")
        at = end + 1
        if not sign:
            size = int.from_bytes(data[at : at + 8], "little")
            value, at = data[at + 8 : at + 8 + size], at + 9 + size
            assert data[at - 1 : at] == b"\n"
        assert name not in entry, name
        entry[name] = value
    return {name.decode(): value for name, value in entry.items()}


class Journald:
    """A socket in journald's place, for a daemon in a mount namespace with nothing else in /run."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.path = directory / "socket"
        self.path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.settimeout(PATIENCE_S)

    def wait_for(self, **fields: bytes) -> dict[str, bytes]:
        while True:
            data, passed, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
            for _, _, fds in passed:
                for fd in array.array("i", fds):
                    os.close(fd)
            entry = parsed(data)
            if fields.items() <= entry.items():
                return entry

    def stop(self) -> None:
        self.socket.close()


@pytest.fixture
def journalled(tmp_path):
    """Return (the daemon, its journal): no D-Bus, no systemd, nothing else in /run."""
    journal = Journald(tmp_path / "journal")
    hide = "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && "
    hide += f'mount --bind {tmp_path}/journal /run/systemd/journal && exec "$@"'
    under = ("unshare", "--mount", "env", "-u", "DBUS_SESSION_BUS_ADDRESS", "sh", "-c", hide, "sh")
    rules = FAILED.replace("comm: cnptest-around", 'comm: ["*cnptest*", "*CNPROCD_RULE*"]')
    daemon = Daemon(tmp_path, rules, "--log-format", "journal", under=under)
    try:
        journal.wait_for(CNPROCD_EVENT=b"started")
        yield daemon, journal
    finally:
        daemon.kill()


@pytest.mark.parametrize(
    "comm", [b"cnptest\nPRIORITY=0", b"\nCNPROCD_RULE=cnptest", b"cnptest\x1b[2J\xff", b"cnptest=\0", b"cnptest\n\n"]
)
def test_a_hostile_name_stays_in_its_field_of_the_journal(journalled, comm):
    _, journal = journalled
    pid = child(lambda: (rename(comm), os._exit(3)))
    wait_status(pid)
    entry = journal.wait_for(CNPROCD_EVENT=b"rule_matched", CNPROCD_PID=str(pid).encode())
    assert entry["CNPROCD_RULE"] == b"failed"
    assert entry["PRIORITY"] == b"5"
    assert entry["MESSAGE"].decode().isprintable() and entry["CNPROCD_COMM"].decode().isprintable()
    real = comm.split(b"\0")[0][:15]
    assert bytes.fromhex(entry.get("CNPROCD_COMM_HEX", entry["CNPROCD_COMM"].hex().encode()).decode()) == real


def test_a_journal_that_goes_away_and_comes_back_loses_no_match(tmp_path, journalled):
    """Without the journal, records go to standard output. The first record after its return goes to it again."""
    daemon, journal = journalled
    journal.stop()
    pids = [fail() for _ in range(5)]
    for pid in pids:
        daemon.wait_for("rule_matched", rule="failed", pid=pid)
    again = Journald(tmp_path / "journal")
    pid = fail()
    entry = again.wait_for(CNPROCD_EVENT=b"rule_matched", CNPROCD_PID=str(pid).encode())
    assert entry["CNPROCD_RULE"] == b"failed"


def test_without_dbus_systemd_and_anything_else_in_run(journalled):
    daemon, journal = journalled
    pid = fail()
    journal.wait_for(CNPROCD_EVENT=b"rule_matched", CNPROCD_PID=str(pid).encode())
    with Client(daemon.directory / "run") as client:
        assert json.dumps(client.ask("status"))
    assert "libdbus" not in Path(f"/proc/{daemon.process.pid}/maps").read_text()


# -- a daemon that stands still ----------------------------------------------------------------------------------


def test_a_daemon_stopped_under_load_reports_every_lost_event(tmp_path):
    """SIGSTOP for CNPROCD_STOP_S seconds (2; the long form is 60) while processes fail as fast as possible."""
    after = "  - {name: after, events: [nonzero_exit], match: {comm: cnptest-after}}\n"
    with running(tmp_path, FAILED + after) as daemon:
        os.kill(daemon.process.pid, signal.SIGSTOP)
        truth, until = [], time.monotonic() + STOP_S
        while time.monotonic() < until:
            storm = [sys.executable, "-IS", STORM, "500", "2", "cnptest-around"]
            truth += map(int, subprocess.run(storm, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[1:])
        os.kill(daemon.process.pid, signal.SIGCONT)
        for _ in range(20):  # what comes while a full buffer is being emptied is dropped as well
            truth.append(fail("cnptest-after"))
            with contextlib.suppress(AssertionError):
                daemon.wait_for("rule_matched", patience_s=2, rule="after", pid=truth[-1])
                break
        daemon.mark_burst()
        # By count: in a minute PIDs are used more than once.
        told = Counter(matched(daemon)) + Counter(matched(daemon, "after"))
        lost = sum(int(str(one["lost"])) for one in daemon.records if one["event"] == "overrun")
        print(f"\n{len(truth)} failures in {STOP_S:g} s of standstill; {told.total()} matched, {lost} events lost")
        assert told <= Counter(truth), told - Counter(truth)
        assert len(truth) - told.total() <= lost
