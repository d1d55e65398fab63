"""A step about what only a real systemd has: units and scopes with a memory limit."""

from __future__ import annotations

import os
from pathlib import Path

from matching import RULES_TEXT
from probe import cursor, expect, first, run, show, write_rules

CONTAINER = "0123456789abcdef" * 4
RULES = f"""
  - name: vm-starved
    events: [nonzero_exit]
    match: {{oom_killed: true}}
    record: [unit, container]
  - name: vm-by-hand
    events: [nonzero_exit]
    match: {{comm: sleep, signal: SIGKILL, oom_killed: false}}
    record: [unit]
  - name: vm-container
    events: [nonzero_exit]
    match: {{container: {CONTAINER[:12]}, oom_killed: true}}
"""
GREEDY = "a = []\nwhile True: a.append(bytearray(1 << 20))"
LIMITS = ("-p", "MemoryMax=32M", "-p", "MemorySwapMax=0")


def units_and_oom_kills() -> str:
    """In a unit and in a container: whether the OOM killer ended a process, as the sandboxed daemon sees it."""
    write_rules(RULES_TEXT + RULES)
    run("systemctl", "reload", "cnprocd.service")
    after = cursor()
    found = [_killed_in_a_unit(after), _killed_in_a_container(after), _killed_by_hand(after)]
    write_rules(RULES_TEXT)
    run("systemctl", "reload", "cnprocd.service")
    run("systemctl", "reset-failed", "vm-*", ok=False)
    return ", ".join(found)


def _killed_in_a_unit(after: str) -> str:
    run("systemd-run", "--unit=vm-greedy", *LIMITS, "python3", "-ISc", GREEDY)
    record = first(after, "CNPROCD_RULE=vm-starved", "CNPROCD_UNIT=vm-greedy.service")
    expect(record["CNPROCD_OOM_KILLED"] == "true", f"no OOM kill: {record}")
    return "OOM kill in a unit"


def _killed_in_a_container(after: str) -> str:
    """A scope with the name that docker's systemd driver gives it."""
    run("systemd-run", "--scope", f"--unit=docker-{CONTAINER}", *LIMITS, "python3", "-ISc", GREEDY, ok=False)
    record = first(after, "CNPROCD_RULE=vm-container")
    seen = (record["CNPROCD_CONTAINER"], record["CNPROCD_RUNTIME"], record["CNPROCD_OOM_KILLED"])
    expect(seen == (CONTAINER, "docker", "true"), f"another container: {record}")
    return "in a container"


def _killed_by_hand(after: str) -> str:
    """SIGKILL to a process beside a victim of the OOM killer, in one cgroup."""
    run("systemd-run", "--unit=vm-patient", "-p", "OOMPolicy=continue", *LIMITS, "sleep", "600")
    cgroup, patient = show("vm-patient.service", "ControlGroup"), show("vm-patient.service", "MainPID")
    greedy = os.fork()
    if greedy == 0:
        Path(f"/sys/fs/cgroup{cgroup}/cgroup.procs").write_text(str(os.getpid()))
        os.execvp("python3", ["python3", "-ISc", GREEDY])
    os.waitpid(greedy, 0)
    first(after, "CNPROCD_RULE=vm-starved", f"CNPROCD_PID={greedy}")
    run("systemctl", "kill", "--signal=KILL", "vm-patient.service")
    record = first(after, "CNPROCD_RULE=vm-by-hand", f"CNPROCD_PID={patient}")
    expect(record["CNPROCD_OOM_KILLED"] == "false", f"a kill by hand: {record}")
    return "by hand beside one"
