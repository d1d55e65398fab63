"""Nothing outside stops the loop: each edge of docs/architecture.md is blocked for a while.

Meanwhile another program's processes fail every 100 ms. Each death must be reported within 1 s, each hook must run,
`cnprocctl status` must answer within 1 s, SIGTERM must end the daemon within its bound, and nothing may happen twice.
CNPTEST_BLOCKED_S sets for how long (default 3 s).
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel.blocking import (
    BLOCKED_S,
    DeafManager,
    Endurance,
    FrozenDisk,
    SleepyNames,
    StoppedJournal,
    Timed,
    UnreadPipe,
    fork_storm,
    greedy_clients,
    hanging_process,
    runner_service,
    small_disk,
    stopped,
)
from kernel.harness import PATIENCE_S, Daemon, running

from cnprocd.control.client import Client

LOOKS_UP = """
  - {name: theirs, events: [nonzero_exit], match: {comm: cnptest-fuse}}
  - {name: names, events: [comm], threads: true, match: {comm: cnptest-fuse}}
"""
UNKNOWN_UID = 54321
MOST_WAIT = 0.4  # of the time: more of it lets the receive buffer overrun, whatever the daemon does
BURST = 3000


@pytest.fixture
def endurance(tmp_path):
    os.chmod(tmp_path, 0o755)
    return Endurance(tmp_path)


@contextlib.contextmanager
def started(tmp_path, endurance, *options, under=(), env=None):
    daemon = Timed(tmp_path, endurance.rules, *options, under=under, env=env)
    try:
        yield daemon.ready()
    finally:
        daemon.kill()


def restarted_without_doubles(tmp_path, endurance, **how):
    """After a restart on the same directories everything is done once, and nothing is left to do."""
    with started(tmp_path, endurance, **how) as daemon:
        daemon.mark()
        endurance.assert_hooks_ran()
        daemon.mark()
        endurance.assert_nothing_doubled()
        assert daemon.stop() == 0


def collected(daemon):
    """The records that have come so far, after everything that happened was evaluated."""
    daemon.mark()
    return daemon.records


# -- /proc -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["execve", "mmap"])
def test_a_hanging_process_costs_no_other_process(tmp_path, kind):
    endurance = Endurance(tmp_path, LOOKS_UP)
    with started(tmp_path, endurance) as daemon, hanging_process(kind):
        endurance.live(tmp_path / "run")
        endurance.assert_answered()
        endurance.assert_reported(collected(daemon))
        endurance.assert_hooks_ran()
        endurance.assert_stops(daemon.process)
    restarted_without_doubles(tmp_path, endurance)


@pytest.mark.parametrize("kind", ["execve", "mmap"])
def test_a_hanging_process_does_not_delay_a_start(tmp_path, kind):
    endurance = Endurance(tmp_path, LOOKS_UP)
    with hanging_process(kind) as victim:
        began = time.monotonic()
        with started(tmp_path, endurance) as daemon:
            assert time.monotonic() - began < 5.0
            unread = daemon.wait_for("proc_unreadable")
            assert victim in unread["pids"]
            endurance.live(tmp_path / "run", 1.0)
            endurance.assert_reported(collected(daemon))
            endurance.assert_stops(daemon.process)


# -- names -------------------------------------------------------------------------------------------------------


def test_a_silent_name_service_delays_nothing(tmp_path, endurance):
    """Processes of a uid that is not in passwd, as subordinate uids and containers have them."""
    names = SleepyNames(tmp_path)
    with started(tmp_path, endurance, under=names.under, env=names.env) as daemon, names.blocked():
        endurance.live(tmp_path / "run", uid=UNKNOWN_UID)
        endurance.assert_answered()
        records = collected(daemon)
        endurance.assert_reported(records)
        endurance.assert_hooks_ran()
        seen = next(record for record in records if record.get("rule") == "seen")
        assert (seen["uid"], seen["user"]) == (UNKNOWN_UID, None)
        endurance.assert_stops(daemon.process)
    restarted_without_doubles(tmp_path, endurance, under=names.under, env=names.env)


# -- the log -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def logging_to(tmp_path, endurance, stdout, *options, under=()):
    """A daemon whose standard output is not read by the harness; ready when its control socket is there."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(endurance.rules.replace("$MARKER", ""))
    process = subprocess.Popen(
        [
            *under, sys.executable, "-m", "cnprocd.cli.cnprocd", "--rules", str(rules), "--state-dir",
            str(tmp_path / "state"), "--runtime-dir", str(tmp_path / "run"), *options,
        ],
        stdout=stdout,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "run" / "control.sock").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lost(records):
    """How many records and matches the daemon reported as lost."""
    reports = [record for record in records if record["event"] == "log_lost"]
    return sum(record["records"] for record in reports), sum(record["matches"] for record in reports)


def test_an_unread_output_stops_nothing(tmp_path, endurance):
    """Every match is written in the end or counted as lost."""
    pipe = UnreadPipe()
    with logging_to(tmp_path, endurance, pipe.writer, "--log-format", "json") as process:
        with pipe.blocked():
            endurance.live(tmp_path / "run")
            endurance.assert_answered()
            endurance.assert_hooks_ran()
        endurance.assert_stops(process)
    os.close(pipe.writer)
    pipe.thread.join(PATIENCE_S)
    records = pipe.records()
    seen = [record["pid"] for record in records if record["event"] == "rule_matched"]
    assert len(seen) == len(set(seen))
    assert len(seen) + lost(records)[1] == len(endurance.died_at)
    endurance.assert_nothing_doubled()


def test_an_unread_output_does_not_hold_up_a_stop(tmp_path, endurance):
    pipe = UnreadPipe()
    with logging_to(tmp_path, endurance, pipe.writer, "--log-format", "json") as process, pipe.blocked():
        endurance.live(tmp_path / "run", 1.0)
        endurance.assert_stops(process)
    restarted_without_doubles(tmp_path, endurance)


def test_a_stopped_journal_stops_nothing(tmp_path, endurance):
    journal = StoppedJournal(tmp_path)
    options = ("--log-format", "journal")
    with (
        logging_to(tmp_path, endurance, subprocess.DEVNULL, *options, under=journal.under) as process,
        journal.blocked(),
    ):
        endurance.live(tmp_path / "run")
        endurance.assert_answered()
        endurance.assert_hooks_ran()
        endurance.assert_stops(process)
    restarted_without_doubles(tmp_path, endurance)


def test_a_full_disk_under_the_output_loses_no_word(tmp_path, endurance):
    """After the disk has room again each line is whole, and what is missing was counted."""
    # Room for what is written after the block: four records of 400 bytes for each death.
    with small_disk(tmp_path / "disk", f"{64 + int(BLOCKED_S * 40)}k") as disk:
        log = disk / "log"
        with log.open("ab") as stdout:
            rest = disk / "rest"
            with logging_to(tmp_path, endurance, stdout, "--log-format", "json") as process:
                with rest.open("wb", buffering=0) as file:
                    for size in (4096, 1):
                        with contextlib.suppress(OSError):
                            while True:
                                file.write(b"x" * size)
                endurance.live(tmp_path / "run")
                endurance.assert_hooks_ran()
                endurance.assert_answered()
                rest.unlink()
                endurance.live(tmp_path / "run", 1.0)
                endurance.assert_hooks_ran()
                endurance.assert_stops(process)
        import json

        records = [json.loads(line) for line in log.read_bytes().splitlines()]
    seen = [record["pid"] for record in records if record["event"] == "rule_matched"]
    assert len(seen) == len(set(seen))
    assert len(seen) + lost(records)[1] == len(endurance.died_at)


# -- the disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["thaw", "stop"])
def test_a_frozen_disk_stops_nothing(tmp_path, endurance, end):
    """Hooks run from memory, reported as not durable; after the thaw nothing runs again."""
    disk = FrozenDisk(tmp_path)
    options = ("--state-dir", str(disk.directory / "state"))
    try:
        with started(tmp_path, endurance, *options) as daemon:
            with disk.blocked():
                endurance.live(tmp_path / "run")
                endurance.assert_answered()
                endurance.assert_reported(collected(daemon))
                endurance.assert_hooks_ran()
                assert endurance.status["jobs"]["durable"] is False
                if end == "stop":
                    endurance.assert_stops(daemon.process)
            if end == "thaw":
                daemon.wait_for("spool_durable")
                assert daemon.stop() == 0
        with started(tmp_path, endurance, *options) as daemon:
            daemon.mark()
            daemon.mark()
            endurance.assert_hooks_ran()
            endurance.assert_nothing_doubled()
            daemon.stop()
    finally:
        disk.close()


# -- the service manager, the control socket, the runner, one owner ----------------------------------------------


def test_a_deaf_service_manager_stops_nothing(tmp_path, endurance):
    manager = DeafManager(tmp_path)
    with started(tmp_path, endurance, env=manager.env) as daemon, manager.blocked():
        endurance.live(tmp_path / "run")
        endurance.assert_answered()
        endurance.assert_reported(collected(daemon))
        endurance.assert_hooks_ran()
        endurance.assert_stops(daemon.process)


def test_greedy_clients_delay_nothing(tmp_path, endurance):
    """A history of 18 MB, asked for by three clients a thousand rows at a time."""
    (tmp_path / "state").mkdir()
    endurance.fill_history(tmp_path / "state", 18 << 20)
    with started(tmp_path, endurance) as daemon:
        with greedy_clients(tmp_path / "run"):
            endurance.live(tmp_path / "run")
            endurance.assert_answered()
            endurance.assert_reported(collected(daemon))
            endurance.assert_hooks_ran()
        assert daemon.stop() == 0


def test_a_stopped_runner_holds_no_slot_for_ever(tmp_path, endurance):
    """Its jobs are reported and tried again; SIGTERM ends the daemon; after SIGCONT each hook has run once."""
    endurance.rules = endurance.rules.replace(
        "timeout: 20s", "timeout: 1s, retries: 5, backoff: {initial: 1s, max: 1s}"
    )
    (tmp_path / "rules.yaml").write_text(endurance.rules.replace("$MARKER", ""))
    with runner_service(tmp_path) as (path, runner), started(tmp_path, endurance, "--runner", str(path)) as daemon:
        endurance.fail()
        endurance.assert_hooks_ran()
        with stopped(runner):
            endurance.live(tmp_path / "run")
            endurance.assert_answered()
            endurance.assert_reported(collected(daemon))
            daemon.wait_for("runner_silent")
            endurance.assert_stops(daemon.process)
        with started(tmp_path, endurance, "--runner", str(path)) as daemon:
            daemon.mark()
            endurance.assert_hooks_ran()
            endurance.assert_nothing_doubled()
            assert daemon.stop() == 0


def test_a_second_daemon_ends_with_75_and_names_the_first(tmp_path, endurance):
    with started(tmp_path, endurance) as daemon:
        for options in ((), ("--state-dir", str(tmp_path / "other")), ("--runtime-dir", str(tmp_path / "other"))):
            second = Daemon(tmp_path, endurance.rules, *options)
            assert second.process.wait(PATIENCE_S) == 75
            assert f"PID {daemon.process.pid}" in second.stderr()
        endurance.live(tmp_path / "run", 1.0)
        endurance.assert_reported(collected(daemon))
        endurance.assert_hooks_ran()
        endurance.assert_nothing_doubled()


# -- storms ------------------------------------------------------------------------------------------------------


CONFIG = Path(__file__).parents[2] / "config/rules.yaml"
SHIPPED = CONFIG.read_text().split("rules:\n", 1)[1].split("# A cleanup", 1)[0]
STORM = f"""
{SHIPPED}
  - {{name: storm, events: [nonzero_exit], match: {{comm: cnptest-storm}}}}
  - name: limited
    events: [nonzero_exit]
    match: {{comm: cnptest-storm}}
    rate_limit: {{count: 2, per: 1h, by: comm}}
    run: {{command: [/bin/true]}}
"""


def test_a_storm_by_a_user_costs_no_other_process(tmp_path):
    """Two loops of vfork and _exit(1) against config/rules.yaml and two more rules. Reported and counted add up."""
    endurance = Endurance(tmp_path, STORM)
    with started(tmp_path, endurance, under=("nice", "-n", "-10")) as daemon:
        with fork_storm(tmp_path) as counts:
            endurance.live(tmp_path / "run")
            peak_kib = memory_kib(daemon.process.pid)
        records = collected(daemon)
        endurance.wait_for_hooks()
        with Client(tmp_path / "run", PATIENCE_S) as client:
            hits = {rule["name"]: rule["hits"] for rule in client.ask("status")["rules"]}
        stopped_after_s = endurance.assert_stops(daemon.process)
        daemon.read_rest()
        storm, shipped, limited = (Sums(daemon.records, rule) for rule in ("storm", "process-failed", "limited"))
        print(
            f"\n{sum(counts) / BLOCKED_S:.0f} failures a second; {peak_kib >> 10} MiB; log-only rule: {storm}"
            f"\nshipped rule: {shipped}; SIGTERM {stopped_after_s:.2f} s"
        )
        assert sum(counts) - storm.lost <= storm.total <= sum(counts)
        assert limited.reported == 2 and sum(counts) - storm.lost <= limited.total <= sum(counts)
        assert shipped.total >= hits["process-failed"] >= hits["storm"], "what came after the question is not in hits"
        print(f"the daemon waited for a processor for {endurance.waits.share:.0%} of the time")
        endurance.assert_hooks_ran(0.0)
        endurance.assert_answered()
        keeps_up = not storm.lost and endurance.waits.share < MOST_WAIT
        if keeps_up:
            endurance.assert_reported(records)
        else:  # a machine that makes more failures than its daemon gets time to read: they are found later
            print(f"not in time: {endurance.figures(records)}")
        assert peak_kib < (80 if keeps_up else 160) << 10, f"{peak_kib >> 10} MiB"


class Sums:
    """What became of the matches of a rule."""

    def __init__(self, records, rule):
        self.reported = len(
            [record for record in records if record.get("rule") == rule and record["event"] == "rule_matched"]
        )
        self.counted = sum(
            record["count"] for record in records if record["event"] == "matches_counted" and record["rule"] == rule
        )
        self.held = sum(
            record["count"] for record in records if record["event"] == "throttled" and record["rule"] == rule
        )
        self.dropped = sum(record["rules"].get(rule, 0) for record in records if record["event"] == "log_lost")
        self.lost = sum(record["lost"] for record in records if record["event"] == "overrun")  # events, of any rule
        self.total = self.reported + self.held + self.counted + self.dropped

    def __str__(self):
        return (
            f"{self.reported} reported, {self.held} held back, {self.counted} counted, {self.dropped} dropped by the"
            f" log, {self.lost} events lost"
        )


def test_a_burst_that_ends_is_reported_whole(tmp_path):
    """3,000 processes that fail at once are not a flood: what is not reported at once is reported a moment later."""
    rules = """rules:
  - {name: every-failure, events: [nonzero_exit], match: {comm: cnptest-burst}}
$MARKER
"""
    with running(tmp_path, rules) as daemon:
        crowd = [sys.executable, "-IS", str(Path(__file__).with_name("crowd.py")), str(BURST), "cnptest-burst"]
        truth = subprocess.run(crowd, stdout=subprocess.PIPE, text=True, check=True)
        pids = [int(pid) for pid in truth.stdout.split()]
        assert len(pids) == BURST
        daemon.mark_burst()
        assert sorted(record["pid"] for record in daemon.matches("every-failure")) == sorted(pids)
        assert not [record for record in daemon.records if record["event"] in ("matches_counted", "log_lost")]


def memory_kib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM")


def test_a_hundred_hangups_cost_at_most_two_reloads(tmp_path, endurance):
    with started(tmp_path, endurance) as daemon:
        for _ in range(100):
            daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for("rules_loaded")
        endurance.live(tmp_path / "run", 1.0)
        endurance.assert_reported(collected(daemon))
        assert len([record for record in daemon.records if record["event"] == "rules_loaded"]) <= 2
        assert daemon.stop() == 0


def test_a_hangup_without_descriptors_is_tried_again(tmp_path, endurance):
    """The reload is reported as failed, and happens on its own when there are descriptors again."""
    with started(tmp_path, endurance) as daemon:
        generous = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, generous[1]))
        try:
            daemon.process.send_signal(signal.SIGHUP)
            rejected = daemon.wait_for("rules_rejected")
        finally:
            resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, generous)
        assert "Too many open files" in rejected["message"]
        assert rejected["retry_in_s"] == 1.0
        daemon.wait_for("rules_loaded")
        endurance.live(tmp_path / "run", 1.0)
        endurance.assert_answered()
        endurance.assert_reported(collected(daemon))
        assert daemon.stop() == 0


def test_a_silent_name_service_delays_no_start(tmp_path, endurance):
    """A rule names a user that only the name service knows: the daemon starts, and the rule matches nothing."""
    names = SleepyNames(tmp_path)
    endurance.rules = endurance.rules.replace(
        "$MARKER", "  - {name: named, events: [nonzero_exit], match: {user: cnptest-larry}}\n$MARKER"
    )
    with names.blocked(), started(tmp_path, endurance, under=names.under, env=names.env) as daemon:
        warning = daemon.wait_for("rules_warning")
        assert 'no user named "cnptest-larry"' in str(warning["message"])
        endurance.live(tmp_path / "run", 1.0)
        records = collected(daemon)
        endurance.assert_reported(records)
        assert not daemon.matches("named")
        endurance.assert_stops(daemon.process)
