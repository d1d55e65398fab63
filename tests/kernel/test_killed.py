"""kill -9 at random instants, with a service manager that keeps the sockets: nothing committed is lost.

The test is the manager. It holds the sockets that the daemon stores (FDSTORE=1) and passes them to the next daemon
(LISTEN_FDS), as systemd does. A storm of failing processes runs all the time. The expected values are the storm's list
from waitpid(), and the file to which the hooks append.

Every event that the sockets delivered became a job. Events that were read and not committed are in the mapped slots
(connector/inflight.py); events that were not read are in the sockets. Only drops of the kernel may be missing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from kernel.harness import PATIENCE_S, hook_rules
from kernel.manager import Manager

from cnprocd.control.client import Client

KILLS = int(os.environ.get("CNPROCD_KILLS", "10"))
FAILURES = 40 * KILLS


def test_kill_9_at_random_instants(tmp_path):
    ran = tmp_path / "ran"
    rules = tmp_path / "rules.yaml"
    text = hook_rules(tmp_path, f"echo $CNPROCD_JOB_ID $CNPROCD_PID $CNPROCD_MATCH_ID >> {ran}")
    rules.write_text(text.replace('comm: "cnptest-*"', "comm: cnptest-crash").replace("$MARKER", ""))
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    manager = Manager(tmp_path, rules)
    log = (tmp_path / "log").open("ab")
    daemon = manager.start(log)
    storm = subprocess.Popen(
        [sys.executable, "-IS", "-c", STORM, str(FAILURES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    truth: list[int] = []
    for _ in range(KILLS):
        instant = chance.randrange(FAILURES // KILLS)
        for i in range(FAILURES // KILLS):
            storm.stdin.write("\n")
            storm.stdin.flush()
            if i == instant:
                daemon.send_signal(signal.SIGKILL)
            truth.append(int(storm.stdout.readline()))
        daemon.wait()
        daemon = manager.start(log)
    storm.stdin.close()
    storm.wait()

    with Client(tmp_path / "run", PATIENCE_S) as client:
        while (jobs := client.ask("status")["jobs"])["waiting"] or jobs["running"]:
            pass
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(PATIENCE_S) == 0
    with sqlite3.connect(tmp_path / "state" / "spool.sqlite3") as db:
        committed = dict(db.execute("SELECT job_id, state FROM jobs"))

    runs = [(int(job), int(pid), match_id) for job, pid, match_id in map(str.split, ran.read_text().splitlines())]
    by_job = Counter(job for job, _, _ in runs)
    seen = {pid for _, pid, _ in runs}
    missing = set(truth) - seen
    dropped = manager.drops()
    print(
        f"\nseed {seed}: {len(truth)} failures, {KILLS} kills, {len(committed)} jobs committed, {len(runs)} runs,"
        f" {sum(count > 1 for count in by_job.values())} jobs ran twice, {len(missing)} missing,"
        f" {dropped} dropped by the kernel"
    )
    assert set(by_job) == set(committed), "every committed job ran at least once"
    assert set(committed.values()) == {"done"}
    assert seen <= set(truth)
    assert len(missing) <= dropped
    ids = defaultdict(set)
    for pid, match_id in {(pid, match_id) for _, pid, match_id in runs} | logged(tmp_path / "log"):
        ids[pid].add(match_id)
    assert [pid for pid, of_pid in ids.items() if len(of_pid) > 1] == [], "a match that is reported again keeps its id"
    assert len(set().union(*ids.values())) == len(ids), "two matches have two ids"


def logged(path: Path) -> set[tuple[int, str]]:
    """Return PID and match id of each match in the log. The line that a kill cut is left out."""
    lines = [line for line in path.read_text().splitlines() if '"rule_matched"' in line and line.endswith("}")]
    return {(record["pid"], record["match_id"]) for record in map(json.loads, lines)}


STORM = """
import os, sys
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        with open("/proc/self/comm", "w") as comm: comm.write("cnptest-crash")
        os._exit(1)
    os.waitpid(pid, 0)
    print(pid, flush=True)
"""
