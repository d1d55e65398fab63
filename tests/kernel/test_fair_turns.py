"""One rule's trouble is not another's: limits by a field, the kernel's time, and fair turns. Hooks of both modes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from datetime import datetime

import pytest
from kernel.blocking import runner_service
from kernel.harness import child, rename, running, wait_status

from cnprocd.control.client import Client

ESCALATION = """
rules:
  - {name: flapping, events: [nonzero_exit], match: {comm: "cnpfair-*"}, after: {count: 3, within: 2s}}
  - {name: looping, events: [nonzero_exit], match: {comm: "cnpfair-*"}, after: {count: 3, within: 10m, by: comm}}
$MARKER
"""


def fail(comm="cnpfair-flap"):
    pid = child(lambda: (rename(comm), os._exit(3)))
    wait_status(pid)
    return pid


def test_after_counts_by_the_kernels_time_in_a_stall(tmp_path):
    """The daemon is stopped while three processes die 1.5 s apart. That is not three within two seconds."""
    with running(tmp_path, ESCALATION) as daemon:
        os.kill(daemon.process.pid, signal.SIGSTOP)
        for pause_s in (1.5, 1.5, 0):
            fail()
            time.sleep(pause_s)
        os.kill(daemon.process.pid, signal.SIGCONT)
        daemon.mark()
        assert daemon.matches("flapping") == []


def test_after_by_a_field_counts_each_value_alone(tmp_path):
    """Five programs fail once each, then one of them fails twice more: it alone is reported."""
    with running(tmp_path, ESCALATION) as daemon:
        for name in ("alpha", "beta", "gamma", "delta", "zeta"):
            fail(f"cnpfair-{name}")
        pids = [fail("cnpfair-zeta") for _ in range(2)]
        daemon.mark()
        assert [record["pid"] for record in daemon.matches("looping")] == pids[-1:]


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
        for _ in range(DEATHS):
            fail("cnpfair-a")
        pid = fail("cnpfair-b")
        job_id = daemon.wait_for("rule_matched", rule="b", pid=pid)["job_id"]
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
