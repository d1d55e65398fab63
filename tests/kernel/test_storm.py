"""Storms: every failing process matches exactly once, under its own name, and success costs nothing.

The expected values are the storm's list of PIDs and statuses, from waitpid(). Sizes are for every run of the suite;
CNPROCD_STORM multiplies them (make bench uses the full ones).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from kernel.harness import PATIENCE_S, running

from cnprocd.control.client import Client

SCALE = int(os.environ.get("CNPROCD_STORM", "1"))

RULE = """
rules:
  - {name: failed, events: [nonzero_exit], match: {comm: cnptest-b}}
$MARKER
"""


def storms(workers, count, failing_every, names):
    """Run `storm.py` in several processes at once. Return name -> Counter of the PIDs that failed."""
    command = [sys.executable, "-IS", str(Path(__file__).with_name("storm.py"))]
    arguments = [str(count // workers), str(failing_every), *names]
    running_storms = [
        subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) for _ in range(workers)
    ]
    result = {name: Counter() for name in names}
    for process in running_storms:
        output, _ = process.communicate()
        assert process.returncode == 0
        for line in output.splitlines():
            name, *pids = line.split()
            result[name].update(map(int, pids))
    return result


@pytest.mark.parametrize("refused", [(), ("event_mask", "taskstats")], ids=["this", "oldest"])
def test_every_failure_once_and_nothing_else(tmp_path, refused):
    with running(tmp_path, RULE, *(f"--refuse={feature}" for feature in refused)) as daemon:
        truth = storms(2, 20_000 * SCALE, 10, ["cnptest-a", "cnptest-b", "cnptest-c", "cnptest-d"])
        daemon.mark_burst()
        records = daemon.matches("failed")
        print(f"\n{20_000 * SCALE} processes, {sum(truth['cnptest-b'].values())} to match, {len(records)} matched")
        assert Counter(record["pid"] for record in records) == truth["cnptest-b"]
        assert {(r["comm"], r["uid"], r["exit_code"], r["recovered"]) for r in records} == {("cnptest-b", 0, 1, False)}
        assert not [record for record in daemon.records if record["event"] == "overrun"]


def test_success_brings_no_datagram(tmp_path):
    """All delivered events are failures on this machine, for which the second rule writes records.

    It matches every thread, because each sends an event: daemons of other tests have threads and are killed.
    """
    anyone = '  - {name: anyone, events: [nonzero_exit], threads: true, match: {comm: "*"}}'
    everyone = RULE.replace("$MARKER", f"{anyone}\n$MARKER")
    with running(tmp_path, everyone) as daemon:
        with Client(tmp_path / "run", PATIENCE_S) as client:  # at first, everything is delivered
            before = client.ask("status")["events"]
        storms(2, 20_000 * SCALE, 10**9, ["cnptest-a", "cnptest-b"])  # the first of each name fails
        daemon.mark()
        assert daemon.stop() == 0
    (stopping,) = [record for record in daemon.records if record["event"] == "stopping"]
    events = int(str(stopping["message"]).split(" events")[0].rsplit(" ", 1)[1]) - before["delivered"]
    print(f"\n{20_000 * SCALE} processes, 4 of them failing, brought {events} events")
    # Failures of other programs before that are matched as well, by this rule alone.
    assert events == len(daemon.matches("anyone")) - before["matches"]
    ours = [record for record in daemon.matches("anyone") if record["comm"] in ("cnptest-a", "cnptest-b")]
    assert len(ours) == 4
