"""The parts of all steps: run a command, make a process die, read the journal until it has a record.

Nothing here sleeps: waiting queries the journal or a unit again until a deadline. To show that no more records come, a
marker process dies last: its record is behind all others.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

RULES = Path("/etc/cnprocd/rules.yaml")
SCRATCH = Path("/var/tmp/cnprocd-vm")
LIMIT_S = 60.0
MOST_RELOADS = 3


class StepFailedError(Exception):
    """The verdict of a step, as text."""


def expect(good: object, otherwise: str) -> None:
    if not good:
        raise StepFailedError(otherwise)


def run(*argv: str, timeout: float = 120, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output. With `ok`, its failure fails the step."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    expect(not ok or done.returncode == 0, f"{' '.join(argv)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def show(unit: str, key: str) -> str:
    return run("systemctl", "show", "--value", "-p", key, unit).stdout.strip()


def main_pid(unit: str = "cnprocd.service") -> int:
    return int(show(unit, "MainPID") or 0)


def die(comm: str, code: int) -> int:
    """Run a process with this name that exits with this code. Return its PID after reaping it."""
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/comm").write_text(comm)
        finally:
            os._exit(code)
    os.waitpid(child, 0)
    return child


def cursor() -> str:
    """Return the cursor of the end of the journal."""
    return str(json.loads(run("journalctl", "-q", "-n", "1", "-o", "json").stdout)["__CURSOR"])


def follow(after: str, *matches: str, limit_s: float = LIMIT_S) -> Iterator[dict[str, str]]:
    """Yield the records from `after` on, as they come. The step fails at the deadline.

    Matches are compared here: journalctl of systemd 252 skips one matching entry too many after --after-cursor.
    """
    wanted = [tuple(match.split("=", 1)) for match in matches]
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for line in run("journalctl", "-q", "-o", "json", f"--after-cursor={after}").stdout.splitlines():
            record = json.loads(line)
            after = record["__CURSOR"]
            if all(record.get(key) == value for key, value in wanted):
                yield record
    raise StepFailedError(f"no such record within {limit_s} s: {' '.join(matches)}")


def first(after: str, *matches: str, limit_s: float = LIMIT_S) -> dict[str, str]:
    return next(follow(after, *matches, limit_s=limit_s))


def matched_pids(after: str, rule: str, marker: str = "vm-marker", limit_s: float = LIMIT_S) -> list[int]:
    """Return the PIDs that `rule` matched, up to the marker process that dies now."""
    last = die("vmmarker", 1)
    seen = []
    for record in follow(after, "CNPROCD_EVENT=rule_matched", limit_s=limit_s):
        if record.get("CNPROCD_RULE") == rule:
            seen.append(int(record["CNPROCD_PID"]))
        elif record.get("CNPROCD_RULE") == marker and record["CNPROCD_PID"] == str(last):
            return seen
    return seen


def until(what: str, question: Callable[[], bool], limit_s: float = LIMIT_S) -> float:
    """Run a check again and again (each takes time of its own) until it is true. Return the time that it took."""
    started = time.monotonic()
    while not question():
        expect(time.monotonic() - started < limit_s, f"not within {limit_s} s: {what}")
    return time.monotonic() - started


def write_rules(text: str) -> None:
    RULES.write_text(text)


def reload_rules() -> None:
    """Reload. A runner that has to start on an emulated CPU may answer too late for the first time."""
    for _ in range(MOST_RELOADS):
        done = run("systemctl", "reload", "cnprocd.service", ok=False)
        if done.returncode == 0:
            return
    expect(False, f"{MOST_RELOADS} reloads failed: {done.stderr}")


def run_step(steps: Mapping[str, Callable[[], str]], name: str) -> int:
    """Run a step, or `diagnose`. Print its detail, or the failure. Return the exit status."""
    try:
        print(diagnose() if name == "diagnose" else steps[name]())
    except StepFailedError as reason:
        print(reason)
        return 1
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


def diagnose() -> str:
    """Return the output of the commands that help most after a failed step."""
    sockets = ("cnprocd-connector.socket", "cnprocd-kmsg.socket", "cnprocd-runner.socket")
    units = ("cnprocd.service", *sockets, "cnprocd-runner.service")
    commands = (
        ("systemctl", "--no-pager", "--full", "status", *units),
        ("cnprocctl", "status"),
        ("journalctl", "-q", "--no-pager", "-n", "40", "-o", "short-monotonic"),
        ("cat", "/proc/net/netlink"),
    )
    return "\n".join(
        f"$ {' '.join(each)}\n{done.stdout}{done.stderr}"
        for each in commands
        if shutil.which(each[0]) and (done := run(*each, ok=False))
    )
