"""Steps about shipped examples that need a real systemd: units that are restarted, and one handler for failed units."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

from matching import RULES_TEXT
from probe import SCRATCH, cursor, expect, first, follow, matched_pids, run, show, until, write_rules

EXAMPLES = Path(__file__).resolve().parent / "config/examples"
DROP_INS = Path("/etc/cnprocd/rules.d")
UNITS = Path("/etc/systemd/system")
HANDLER = Path("/usr/local/lib/cnprocd/unit-failed")
STARTS = SCRATCH / "starts"

# The name of the script is the comm that the rule names. It lives until an emulated daemon has read its unit in /proc.
WORKER = Path("/usr/local/sbin/worker")
WORKER_TEXT = f"""#!/bin/sh
echo "$1" >>{STARTS}
sleep 5
exit 1
"""
WORKER_UNIT = f"""[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart={WORKER} %i
Restart=no
"""
FAILURES = 6  # five restarts, as the example allows


def use_example(name: str) -> None:
    """Put a shipped example in force beside the rules of the other steps."""
    write_rules(RULES_TEXT)
    DROP_INS.mkdir(exist_ok=True)
    shutil.copy(EXAMPLES / name, DROP_INS / name)
    _reload()


def remove_example(name: str) -> None:
    (DROP_INS / name).unlink()
    _reload()


def _reload() -> None:
    """The runner has 10 s to start and to take the rules, which a machine that is emulated beside others can exceed."""
    until("rules loaded", lambda: run("systemctl", "reload", "cnprocd.service", ok=False).returncode == 0)


def restart_worker() -> str:
    """Two workers fail again and again: each is restarted five times, and given up once."""
    SCRATCH.mkdir(exist_ok=True)
    STARTS.unlink(missing_ok=True)
    WORKER.write_text(WORKER_TEXT)
    WORKER.chmod(0o755)
    (UNITS / "worker@.service").write_text(WORKER_UNIT)
    run("systemctl", "daemon-reload")
    use_example("restart-worker.yaml")
    after = cursor()
    workers = ("worker@1.service", "worker@2.service")
    run("systemctl", "start", *workers)
    given_up: list[str] = []
    for record in follow(after, "CNPROCD_EVENT=rule_matched", "CNPROCD_RULE=worker-given-up", limit_s=240):
        given_up.append(record["CNPROCD_UNIT"])
        if len(given_up) == len(workers):
            break
    expect(sorted(given_up) == list(workers), f"given up: {given_up}")
    matched_pids(after, "restart-worker")  # a further restart would have been matched by now
    expect(all(show(worker, "ActiveState") == "failed" for worker in workers), "a worker runs after it was given up")
    starts = Counter(STARTS.read_text().split())
    expect(starts == {"1": FAILURES, "2": FAILURES}, f"starts by worker: {dict(starts)}")
    run("systemctl", "reset-failed", *workers)
    remove_example("restart-worker.yaml")
    return f"{len(workers)} workers, {FAILURES - 1} restarts each, then given up"


def failed_unit() -> str:
    """One handler for every unit: it gets the failed unit, once in ten minutes; stops and helpers call it not."""
    HANDLER.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(EXAMPLES / "hooks/unit-failed", HANDLER)
    HANDLER.chmod(0o755)
    use_example("failed-units.yaml")
    after = cursor()
    unit_of: dict[str, int] = {}
    for unit in ("vm-one", "vm-two", "vm-one"):
        pid = _fails(unit)
        unit_of.setdefault(f"{unit}.service", pid)
    _is_stopped("vm-three")
    _has_failing_helper("vm-four")
    seen = matched_pids(after, "unit-failed")
    expect(seen == list(unit_of.values()), f"matched {seen}, the units that failed are {unit_of}")
    for unit, pid in unit_of.items():
        done = first(after, "CNPROCD_EVENT=hook_finished", "CNPROCD_RULE=unit-failed", f"CNPROCD_PID={pid}")
        output = run("cnprocctl", "jobs", "log", done["CNPROCD_JOB_ID"]).stdout
        expect(re.search(rf"^{re.escape(unit)} failed: sh\[{pid}\] exited, 3$", output, re.M), f"the output: {output}")
    remove_example("failed-units.yaml")
    return f"{len(unit_of)} units handled, one failure within the cooldown"


def _fails(unit: str) -> int:
    """Let the main process of a unit fail. Return its PID."""
    run("systemctl", "reset-failed", f"{unit}.service", ok=False)
    run("systemd-run", f"--unit={unit}", "sh", "-c", "sleep 5; exit 3")
    pid = int(show(f"{unit}.service", "MainPID"))
    until(f"{unit} failed", lambda: show(f"{unit}.service", "ActiveState") == "failed")
    return pid


def _is_stopped(unit: str) -> None:
    run("systemd-run", f"--unit={unit}", "sleep", "600")
    run("systemctl", "stop", f"{unit}.service")


def _has_failing_helper(unit: str) -> None:
    """A child of the main process fails, and the unit does not."""
    run("systemd-run", f"--unit={unit}", "--wait", "sh", "-c", "sh -c 'exit 3'; sleep 1")
