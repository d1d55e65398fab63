"""A reload on a machine with many processes stops nothing, loses no death and reports none twice.

CNPTEST_SLEEPERS sets how many (default 300). What must hold is that of test_edges.py, while rules that need a table of
processes come into force and go again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kernel.blocking import BLOCKED_S, Endurance, Timed
from kernel.harness import PATIENCE_S

from cnprocd.control.client import Client

SLEEPERS = int(os.environ.get("CNPTEST_SLEEPERS", "300"))
FORK_THEM = """
import os, sys
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        os.read(0, 1)
        os._exit(0)
print("ready", flush=True)
os.read(0, 1)
"""
NEEDS_A_TABLE = """
  - {{name: by-parent, events: [nonzero_exit], match: {{comm: cnptest-by, parent: {{comm: "{comm}"}}}}}}
"""


@contextlib.contextmanager
def sleepers(count: int) -> Iterator[None]:
    """So many processes that do nothing, forked by a small one."""
    process = subprocess.Popen(
        [sys.executable, "-IS", "-c", FORK_THEM, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.stdin.close()  # which ends them all
        process.wait(PATIENCE_S)


def replace_rules(daemon: Timed, rules: str) -> None:
    """At once: a reload may be reading the file."""
    written, daemon.rules = daemon.rules, daemon.rules.with_suffix(".new")
    daemon.write_rules(rules)
    daemon.rules = daemon.rules.replace(written)


def test_reloads_among_many_processes_stop_nothing(tmp_path):
    os.chmod(tmp_path, 0o755)
    comm = Path("/proc/self/comm").read_text().strip()
    plain, with_table = Endurance(tmp_path), Endurance(tmp_path, NEEDS_A_TABLE.format(comm=comm))
    endurance, daemon = plain, Timed(tmp_path, plain.rules)
    over = threading.Event()

    def reload_again_and_again() -> None:
        for rules in itertools.cycle((with_table.rules, plain.rules)):
            replace_rules(daemon, rules)
            daemon.process.send_signal(signal.SIGHUP)
            if over.wait(0.5):
                return

    try:
        daemon.ready()
        with sleepers(SLEEPERS):
            reloading = threading.Thread(target=reload_again_and_again)
            reloading.start()
            endurance.live(tmp_path / "run", BLOCKED_S)
            over.set()
            reloading.join()
            replace_rules(daemon, with_table.rules)
            with Client(tmp_path / "run", PATIENCE_S) as client:
                client.ask("reload")  # not a SIGHUP: earlier ones may wait
            last = [endurance.fail() for _ in range(5)]
            daemon.mark()
        endurance.assert_answered()
        endurance.assert_reported(daemon.records)
        seen = Counter(record["pid"] for record in daemon.matches("seen"))
        assert {seen[pid] for pid in endurance.died_at} == {1}
        for record in daemon.records:
            if record["event"] in ("identity_unknown", "rules_loaded", "proc_unreadable") or record.get("pid") in last:
                print(record)
        assert {record["pid"] for record in daemon.matches("by-parent")} >= set(last)
        assert not [record for record in daemon.records if record["event"] in ("recovered", "rules_rejected")]
        endurance.assert_hooks_ran()
        endurance.assert_nothing_doubled()
        print([record for record in daemon.records if record["event"] == "loop_stalled"])
        endurance.assert_stops(daemon.process)
    finally:
        over.set()
        daemon.kill()
