"""kill -9 at random instants: every committed job runs, and no finished job runs again.

CNPROCD_CRASH_JOBS and CNPROCD_CRASH_KILLS make it longer.
"""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from cnprocd.spool.spool import FILE_NAME

JOBS = int(os.environ.get("CNPROCD_CRASH_JOBS", "200"))
KILLS = int(os.environ.get("CNPROCD_CRASH_KILLS", "10"))


def finished(directory, copy):
    """Return the jobs that are done in the spool of a killed daemon, and how often each has run so far."""
    copy.mkdir()
    for suffix in ("", "-wal"):
        if (directory / f"{FILE_NAME}{suffix}").exists():
            shutil.copy(directory / f"{FILE_NAME}{suffix}", copy)
    with sqlite3.connect(copy / FILE_NAME) as db:
        done = [
            int(key.removeprefix("job-"))
            for (key,) in db.execute("SELECT key FROM events JOIN jobs USING (job_id) WHERE state = 'done'")
        ]
    db.close()
    runs = ledger(directory)
    return {number: runs[number] for number in done}


def ledger(directory):
    path = directory / "ledger"
    return Counter(int(line) for line in path.read_text().split()) if path.exists() else Counter()


def start(directory, first, last):
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("crash_driver.py")), str(directory), str(first), str(last)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
        text=True,
    )


def test_committed_jobs_survive_and_finished_jobs_stay_finished(tmp_path):
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    directory = tmp_path / "state"
    directory.mkdir()
    committed: set[int] = set()
    at_kill: list[dict[int, int]] = []
    drained = False

    for kill in range(KILLS + 1):
        # Each daemon adds its share of the jobs, and runs those that the earlier ones left.
        daemon = start(directory, len(committed), max(len(committed), JOBS * (kill + 1) // (KILLS + 1)))
        # Kill it by progress, not by time: the test is as strict on a busy machine.
        left, timer = chance.randint(1, 1 + JOBS // (KILLS + 1)), None
        for line in daemon.stdout:
            left -= 1
            if left == 0 and kill < KILLS:
                timer = threading.Timer(chance.uniform(0, 0.02), daemon.kill)
                timer.start()
            word, *numbers = line.split()
            if word == "committed" and len(numbers) == 2:
                committed |= set(range(*map(int, numbers)))
            drained = drained or word == "drained"
        daemon.wait()
        if timer is not None:
            timer.cancel()
        if kill < KILLS:
            at_kill.append(finished(directory, tmp_path / f"copy-{kill}"))

    runs = ledger(directory)
    twice = sum(count > 1 for count in runs.values())
    last = finished(directory, tmp_path / "copy-last")
    print(
        f"seed {seed}: {len(committed)} jobs committed, {KILLS} kills, {sum(runs.values())} runs,"
        f" {twice} jobs ran twice or more; done at the kills: {[len(done) for done in at_kill]}"
    )
    assert drained
    assert committed == set(range(JOBS))
    assert set(runs) >= committed, "a committed job never ran"
    assert set(last) == committed, "a job is not finished in the end"
    for done in at_kill:
        again = {number: runs[number] for number, before in done.items() if runs[number] != before}
        assert not again, f"finished jobs ran again (seed {seed})"
