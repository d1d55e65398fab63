"""The daemon is killed at each point between a match and the end of its job, in both modes: see docs/guarantees.md.

One daemon after the other is killed at its point, by the match of one process, and the next one recovers the job. The
expected number of runs of each hook is exact where the hook runs in the runner: once.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from kernel.blocking import runner_service
from kernel.harness import PATIENCE_S, child, rename, wait_status
from kernel.jobs.crash_at import POINTS
from kernel.jobs.world import until
from kernel.manager import Manager

from cnprocd.control.client import Client

RULES = """
rules:
  - name: clean
    events: [nonzero_exit]
    match: {{comm: cnptest-point}}
    run: {{command: [{hook}], timeout: 60s}}
"""
# Where hooks are children of the daemon, one that had begun when it was killed runs again.
MAY_RUN_TWICE = ("attempt handed over", "hook runs", "hook ended", "end committed", "end logged")


def fail() -> int:
    pid = child(lambda: (rename("cnptest-point"), os._exit(3)))
    wait_status(pid)
    return pid


def runs(ran: Path) -> Counter[int]:
    return Counter(map(int, ran.read_text().split()))


def is_idle(directory: Path) -> bool:
    with Client(directory / "run", PATIENCE_S) as client:
        jobs = client.ask("status")["jobs"]
    return not jobs["waiting"] and not jobs["running"]


@pytest.mark.parametrize("apart", [False, True], ids=["embedded", "apart"])
def test_kill_9_at_each_point_on_the_way_of_a_job(tmp_path, apart):
    ran, hook, point, rules = (tmp_path / name for name in ("ran", "hook", "point", "rules.yaml"))
    ran.touch()
    hook.write_text(f"#!/bin/sh\necho $CNPROCD_PID >> {ran}\n")
    hook.chmod(0o755)
    rules.write_text(RULES.format(hook=hook))
    failed: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        options = []
        if apart:
            path, _ = stack.enter_context(runner_service(tmp_path))
            options = ["--runner", str(path), "--snapshot-dir", str(tmp_path / "runner" / "rules")]
        program = (str(Path(__file__).parent / "jobs" / "crash_at.py"), str(point), "cnprocd.cli.cnprocd")
        manager = Manager(tmp_path, rules, *options, program=program)
        point.write_text("-")
        daemon = manager.start()
        stack.callback(daemon.kill)
        for name in POINTS:
            point.write_text(name)
            failed[name] = fail()
            assert daemon.wait(PATIENCE_S) == -signal.SIGKILL, name
            point.write_text("-")
            daemon = manager.start()
            stack.callback(daemon.kill)
            until(name, lambda name=name: runs(ran)[failed[name]] and is_idle(tmp_path))
    counts = {name: runs(ran)[pid] for name, pid in failed.items()}
    expected = {name: 2 if not apart and name in MAY_RUN_TWICE else 1 for name in failed}
    assert {name: count for name, count in counts.items() if not 1 <= count <= expected[name]} == {}
