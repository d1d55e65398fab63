"""A user floods a rule that runs a hook and has no throttle: no other process waits for it, and no promise is lost.

What must hold is that of test_edges.py; CNPTEST_BLOCKED_S sets for how long.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections import Counter

import pytest
from kernel.blocking import BLOCKED_S, PROMISE_S, Endurance, fork_storm
from kernel.harness import PATIENCE_S
from kernel.manager import Manager
from kernel.test_edges import MOST_WAIT, Sums, collected, memory_kib, started

from cnprocd.control.client import Client
from cnprocd.process.procfs import boot_id
from cnprocd.spool.backlog import Backlog

FLOODED = """
  - {name: flooded, events: [nonzero_exit], match: {comm: cnptest-storm}, run: {command: [/bin/true]}}
"""
SLOTS = 2
IS_LONG = "CNPTEST_BLOCKED_S" in os.environ  # on a quiet machine; without the budgets deaths were reported after 5 s


def test_a_flood_of_hooks_costs_no_other_process(tmp_path):
    """Two loops of vfork and _exit(1). Reported and counted add up; jobs beyond the budget are made, too."""
    tmp_path.chmod(0o755)
    endurance = Endurance(tmp_path, FLOODED)
    with started(tmp_path, endurance, under=("nice", "-n", "-10")) as daemon:
        with fork_storm(tmp_path) as counts:
            endurance.live(tmp_path / "run")
            peak_kib = memory_kib(daemon.process.pid)
        records = collected(daemon)
        endurance.wait_for_hooks()
        status = wait_until_made(tmp_path / "run")
        endurance.assert_stops(daemon.process)
        daemon.read_rest()
        flooded = Sums(daemon.records, "flooded")
        print(f"\n{sum(counts) / BLOCKED_S:.0f} failures a second; {peak_kib >> 10} MiB; {flooded}; {status['jobs']}")
        print(f"the daemon waited for a processor for {endurance.waits.share:.0%} of the time")
        print(endurance.figures(records))
        assert sum(counts) - flooded.lost <= flooded.total <= sum(counts)
        endurance.assert_hooks_ran(0.0)
        deferred = [record for record in daemon.records if record["event"] == "hooks_deferred"]
        if flooded.lost or endurance.waits.share > MOST_WAIT:
            pytest.skip("the machine makes more failures than its daemon gets time to read")
        endurance.assert_answered()
        assert deferred and deferred[0]["rules"] == ["flooded"]
        assert max(endurance.reported_after_s(records)) < (PROMISE_S if IS_LONG else 2 * PROMISE_S)
        assert peak_kib < 120 << 10, f"{peak_kib >> 10} MiB"


def wait_until_made(runtime_dir):
    """Wait until no job is deferred any more. Return the status then."""
    deadline = time.monotonic() + 4 * PATIENCE_S
    with Client(runtime_dir, PATIENCE_S) as client:
        while (status := client.ask("status"))["jobs"]["deferred"]:
            assert time.monotonic() < deadline, status["jobs"]
    return status


def test_kill_9_in_a_flood_of_hooks_loses_no_promise(tmp_path):
    """What is a job or waits to become one when the daemon is killed is a job of the next daemon, and runs once."""
    ran, hook, rules = tmp_path / "ran", tmp_path / "hook", tmp_path / "rules.yaml"
    hook.write_text(f'#!/bin/sh\necho "$CNPROCD_MATCH_ID" >> {ran}\n')
    hook.chmod(0o755)
    rules.write_text(
        f"settings: {{queue_limit: 100000, history_count: 100000, hook_slots: {SLOTS}}}\nrules:\n"
        "  - {name: flooded, events: [nonzero_exit], match: {comm: cnptest-storm},"
        f" run: {{command: [{hook}], timeout: 60s}}}}\n"
    )
    manager = Manager(tmp_path, rules)
    with (tmp_path / "log").open("ab") as log:
        daemon = manager.start(log)
        with fork_storm(tmp_path):
            wait_until_deferred(tmp_path / "run")
            daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        promised = keys_in_backlog(tmp_path) | keys_in_spool(tmp_path)
        waiting = len(keys_in_backlog(tmp_path))
        daemon = manager.start(log)
        wait_until_made(tmp_path / "run")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE_S) == 0
    kept = keys_in_spool(tmp_path)
    runs = Counter(ran.read_text().split())
    print(f"\n{len(promised)} promised, {waiting} of them in the backlog; {len(kept)} jobs, {len(runs)} ran")
    assert waiting
    assert promised <= kept, f"{len(promised - kept)} promised jobs are lost"
    assert len([key for key, count in runs.items() if count > 1]) <= SLOTS, "those that ran when the daemon was killed"
    reported = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert not [record for record in reported if record["event"] in ("queue_full", "event_failed")]


def wait_until_deferred(runtime_dir):
    """Wait until jobs are in the spool as well as in the backlog."""
    deadline = time.monotonic() + PATIENCE_S
    with Client(runtime_dir, PATIENCE_S) as client:
        while not (jobs := client.ask("status")["jobs"])["deferred"] or jobs["waiting"] < 100:
            assert time.monotonic() < deadline, jobs


def keys_in_backlog(directory):
    return {one.request.key for one, _ in Backlog(directory / "run" / "backlog", boot_id()).oldest(1 << 30)}


def keys_in_spool(directory):
    with contextlib.closing(sqlite3.connect(directory / "state" / "spool.sqlite3")) as db:  # else it stays locked
        return {key for (key,) in db.execute("SELECT key FROM events")}
