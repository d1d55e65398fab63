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

from kernel.blocking import stopped
from kernel.harness import PATIENCE_S, child, hook_rules, rename
from kernel.jobs.world import until
from kernel.manager import Manager

from cnprocd.connector.inflight import RECORD_SLOTS
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


KILLED_AHEAD = """
import os, runpy, signal
from cnprocd.connector.source import Source
blank, drain = Source.blank_slots, Source.drain
def drain_all(self, most, all_records=False):
    return drain(self, most, all_records=True)
def kill_if_ahead(self, needed):
    blank(self, needed)
    left = os.listdir({kills!r})
    if left and len(needed.records) > {least}:
        os.rmdir(f"{kills}/{{left[0]}}")
        os.kill(os.getpid(), signal.SIGKILL)
Source.blank_slots, Source.drain = kill_if_ahead, drain_all
runpy.run_module("cnprocd.cli.cnprocd", run_name="__main__", alter_sys=True)
"""
CROWD, PROMISED = 1500, 30


def test_a_kill_keeps_the_names_of_a_backlog(tmp_path):
    """After a standstill exit records are read before the events that they belong to, more than there are slots.

    So it is after an overrun, and here always. The daemon is killed three times while more than RECORD_SLOTS records
    wait for their events. Without their records the exits would have no name, and match nothing.
    """
    kills, gate, ran = tmp_path / "kills", tmp_path / "gate", tmp_path / "ran"
    kills.mkdir()  # a directory in it for each kill that is to come
    text = hook_rules(tmp_path, f"while [ -e {gate} ]; do sleep 0.05; done; echo $CNPROCD_PID >> {ran}")
    rules = tmp_path / "rules.yaml"
    text = text.replace('comm: "cnptest-*"', "comm: cnptest-crash").replace("$MARKER", "")
    rules.write_text(f"settings: {{receive_buffer: 256M}}\n{text}")  # for the other storms of this machine
    code = KILLED_AHEAD.format(kills=str(kills), least=RECORD_SLOTS)
    manager = Manager(tmp_path, rules, program=("-c", code))
    with (tmp_path / "log").open("ab") as log:
        daemon = manager.start(log)
        gate.touch()
        promised = [failed()]
        until("a running hook", lambda: '"hook_started"' in (tmp_path / "log").read_text())
        before = len((tmp_path / "log").read_text().splitlines())
        with stopped(daemon.pid):
            subprocess.run(["true"], check=True)
            crowd = [sys.executable, "-IS", str(Path(__file__).with_name("crowd.py")), str(CROWD), "cnptest-other"]
            subprocess.run(crowd, check=True, stdout=subprocess.DEVNULL)
            promised += [failed() for _ in range(PROMISED)]
            for number in range(3):
                (kills / str(number)).mkdir()
        for number in range(3):
            assert daemon.wait(PATIENCE_S) == -signal.SIGKILL
            daemon = manager.start(log, await_ready=number == 2)
    gate.unlink()
    until("all hooks", lambda: ran.exists() and len(set(ran.read_text().split())) >= len(promised))
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(PATIENCE_S) == 0
    assert {int(pid) for pid in ran.read_text().split()} == set(promised)
    assert manager.drops() == 0
    lines = (tmp_path / "log").read_text().splitlines()[before:]
    records = [json.loads(line) for line in lines if line.endswith("}")]
    unknown = [one for one in records if one["event"] in ("identity_unknown", "handover_incomplete")]
    assert not unknown, json.dumps(unknown)


def failed() -> int:
    pid = child(lambda: (rename("cnptest-crash"), os._exit(1)))
    os.waitpid(pid, 0)
    return pid


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
