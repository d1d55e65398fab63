"""One rule's trouble is not another's: limits by a field, the kernel's time, and fair turns. Hooks of both modes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from kernel.blocking import runner_service, stopped
from kernel.harness import PATIENCE_S, child, rename, running, wait_status
from kernel.test_faults import STORM
from kernel.test_snapshots import MODES, Place, rules

from cnprocd.control.client import Client


@pytest.fixture(params=MODES)
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    with contextlib.closing(Place(tmp_path, request.param)) as it:
        yield it


def limited(place: Place, name: str, after: str) -> str:
    """Return a rule on processes of this name, whose hook appends the name to the log."""
    rule = place.rule(name, name, f"cnpfair-{name}*", "echo $CNPROCD_COMM >> " + str(place.log))
    return rule.replace("events:", f"after: {after}, events:")


def fail(comm):
    pid = child(lambda: (rename(comm), os._exit(3)))
    wait_status(pid)
    return pid


def test_after_counts_by_the_kernels_time_in_a_stall(place):
    """The daemon is stopped while three processes die 0.6 s apart. That is not three within a second."""
    slow, quick = (limited(place, name, "{count: 3, within: 1s}") for name in ("slow", "quick"))
    daemon = place.daemon(rules(slow, quick, "$MARKER\n"))
    with stopped(daemon.process.pid):
        for pause_s in (0.6, 0.6, 0):
            fail("cnpfair-slow")
            time.sleep(pause_s)
        pids = [fail("cnpfair-quick") for _ in range(3)]
    daemon.mark()
    assert [record["pid"] for record in daemon.matches()] == pids[-1:]
    daemon.wait_for("hook_finished", rule="quick")
    assert place.words() == ["quick", "cnpfair-quick"]


def test_after_by_a_field_counts_each_value_alone(place):
    """Five programs fail once each, then one of them fails twice more: it alone is reported, and its hook runs once."""
    daemon = place.daemon(rules(limited(place, "loop", "{count: 3, within: 10m, by: comm}"), "$MARKER\n"))
    for name in ("alpha", "beta", "gamma", "delta", "zeta"):
        fail(f"cnpfair-loop-{name}"[:15])
    pids = [fail("cnpfair-loop-ze") for _ in range(2)]
    daemon.mark()
    assert [record["pid"] for record in daemon.matches()] == pids[-1:]
    daemon.wait_for("hook_finished", rule="loop")
    assert place.words() == ["loop", "cnpfair-loop-ze"]


DEATHS = int(os.environ.get("CNPTEST_FLOOD", "60"))  # half of them find the queue full
FLOOD = f"""
settings: {{hook_slots: 4, queue_limit: {DEATHS // 2}}}
rules:
  - name: a
    events: [nonzero_exit]
    match: {{comm: cnpfair-a}}
    run: {{command: [/bin/sleep, "0.7"], user: nobody, timeout: 20s}}
  - name: b
    events: [nonzero_exit]
    match: {{comm: cnpfair-b}}
    run: {{command: [/bin/true], user: nobody, timeout: 20s}}
$MARKER
"""


@pytest.mark.parametrize("apart", [False, True], ids=["runner-inside", "runner-apart"])
def test_another_rules_hook_waits_for_one_slot_only(tmp_path, apart):
    """60 processes of a user die under rule A, with 4 slots and 30 waiting jobs. Then one dies under rule B.

    Its job is not dropped, and its hook starts when the next hook of A ends, not after the 30 that wait.
    """
    tmp_path.chmod(0o755)
    (tmp_path / "rules.yaml").write_text(FLOOD)
    with contextlib.ExitStack() as stack:
        options = []
        if apart:
            runner, _ = stack.enter_context(runner_service(tmp_path))
            options = ["--runner", str(runner)]
        daemon = stack.enter_context(running(tmp_path, FLOOD, *options))
        storm = [sys.executable, "-IS", STORM, str(DEATHS), "1", "cnpfair-a"]
        subprocess.run(storm, stdout=subprocess.DEVNULL, check=True)
        pid = fail("cnpfair-b")
        job_id = daemon.wait_for("rule_matched", PATIENCE_S * (1 + DEATHS // 2000), rule="b", pid=pid)["job_id"]
        assert job_id is not None
        daemon.wait_for("hook_finished", job_id=job_id)
        records = list(daemon.records)
        matched = next(n for n, one in enumerate(records) if one["event"] == "rule_matched" and one["rule"] == "b")
        begun = next(n for n, one in enumerate(records) if one["event"] == "hook_started" and one["rule"] == "b")
        between = [one for one in records[matched:begun] if one["event"] == "hook_started"]
        assert len(between) <= 4, between
        waited_ms = (at(records[begun]) - at(records[matched])).total_seconds() * 1e3
        print(
            f"\n{DEATHS // 2} jobs of A wait, each takes 0.7 s, 4 slots: B's hook started after {len(between)} of A's"
        )
        print(f"hooks, {waited_ms:.0f} ms after its match was logged")
        assert not [one for one in records if one["event"] == "job_dead" and one["rule"] == "b"]
        dropped = [one for one in records if one["event"] == "queue_full"]
        assert dropped and all("of a" in str(one["message"]) and "of b" not in str(one["message"]) for one in dropped)
        status = Client(tmp_path / "run").ask("status")
        queues = {queue["rule"]: queue for queue in status["jobs"]["queues"]}
        assert queues["a"]["waiting"] > 0 and queues["a"]["shed"] > 0 and queues["a"]["oldest_waiting_s"] > 0
        assert queues.get("b", {"shed": 0})["shed"] == 0


def at(record):
    return datetime.fromisoformat(record["timestamp"])
