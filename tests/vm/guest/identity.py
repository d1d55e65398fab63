"""Steps about what only a real systemd has: memory limits, the manager of a user, and a daemon that is replaced."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from matching import RULES_TEXT
from probe import cursor, expect, first, matched_pids, reload_rules, run, show, until, write_rules

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
    reload_rules()
    after = cursor()
    found = [_killed_in_a_unit(after), _killed_in_a_container(after), _killed_by_hand(after)]
    write_rules(RULES_TEXT)
    reload_rules()
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


USER, USER_ID = "vmuser", 4242
MANAGER = f"user@{USER_ID}.service"
USER_RULES = """
  - name: vm-user-unit
    events: [nonzero_exit]
    match: {exit_code: 5, user_unit: "vm-*"}
    record: [unit]
"""
USER_UNITS = {"vm-plain.service": 5, "vm-of@a\\x2db.service": 5, "vm-good.service": 0}
RUNTIME_DIRECTORY = f"XDG_RUNTIME_DIR=/run/user/{USER_ID}"
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "env", RUNTIME_DIRECTORY)
MOST_TRIES = 5


def user_manager() -> str:
    """Units of a real service manager of a user: their processes match by `user_unit`.

    On an emulated CPU a read of /proc can take longer than the daemon waits for it. Then the attribute must be counted
    as unknown, and the unit is started once more.
    """
    run("useradd", "--create-home", f"--uid={USER_ID}", USER)
    units = Path(f"/home/{USER}/.config/systemd/user")
    units.mkdir(parents=True)
    (units / "vm-of@.service").write_text("[Service]\nExecStart=/bin/sh -c 'sleep 2; exit 5'\n")
    (units / "vm-plain.service").write_text("[Service]\nExecStart=/bin/sh -c 'sleep 2; exit 5'\n")
    (units / "vm-good.service").write_text("[Service]\nExecStart=/bin/true\n")
    run("chown", "-R", f"{USER}:{USER}", f"/home/{USER}")
    write_rules(RULES_TEXT + USER_RULES)
    reload_rules()
    run("loginctl", "enable-linger", USER)
    until("the manager of the user", lambda: show(MANAGER, "ActiveState") == "active", limit_s=120)
    tries = [f"{unit} at try {_failed_for_a_user(unit, code)}" for unit, code in USER_UNITS.items()]
    run("loginctl", "disable-linger", USER)
    run("systemctl", "stop", MANAGER)
    write_rules(RULES_TEXT)
    reload_rules()
    return f"{MANAGER}: " + ", ".join(tries)


def _failed_for_a_user(unit: str, code: int) -> int:
    """Return at which try a process of the unit matched."""
    for number in range(1, MOST_TRIES + 1):
        after, unknown = cursor(), unknown_attributes()
        run(*AS_USER, "systemctl", "--user", "start", unit)
        until(f"{unit} ends", lambda: _user_state(unit) in ("failed", "inactive"))
        pids = matched_pids(after, "vm-user-unit")
        expect(bool(pids) <= (code == 5), f"{unit} ended with {code} and matched: {pids}")
        if code != 5:
            return number
        if pids:
            record = first(after, "CNPROCD_RULE=vm-user-unit", f"CNPROCD_PID={pids[0]}")
            seen = (record["CNPROCD_UNIT"], record["CNPROCD_USER_UNIT"], record["CNPROCD_UID"])
            expect(seen == (MANAGER, unit, str(USER_ID)), f"another unit: {record}")
            return number
        now = unknown_attributes()
        expect(now.get("cgroup", 0) > unknown.get("cgroup", 0), f"{unit} neither matched nor was counted: {now}")
    expect(False, f"{unit} matched at none of {MOST_TRIES} tries: {unknown_attributes()}")
    return 0


def _user_state(unit: str) -> str:
    return run(*AS_USER, "systemctl", "--user", "show", "--value", "-p", "ActiveState", unit).stdout.strip()


def unknown_attributes() -> dict[str, int]:
    """Return how often each attribute was unknown that a rule needed, since the daemon's start."""
    events = json.loads(run("cnprocctl", "status", "--json").stdout)["events"]
    found: dict[str, int] = {}
    for one in events["identity_unknown"]:
        found[one["attribute"]] = found.get(one["attribute"], 0) + one["count"]
    return found


class Kept:
    """Processes that the daemon knows by their arguments, which no exit record has. They end when asked."""

    def __init__(self, count: int) -> None:
        """Start them, and let a reload read what all of them are."""
        command = ["/bin/sh", "-c", "read line; exit 3", "vm-kept"]
        self._alive = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
        self.ended: list[int] = []
        reload_rules()

    def end(self, most: int) -> None:
        """End so many of them, or all that are left."""
        for process in self._alive[:most]:
            process.communicate()
            self.ended.append(process.pid)
        del self._alive[:most]

    def compare(self, after: str) -> str:
        """Compare those that ended with the matches since `after`.

        On an emulated CPU a few reads of /proc take longer than the daemon waits for them: these must be counted.
        """
        seen = set(matched_pids(after, "vm-kept"))
        expect(seen <= set(self.ended), f"other processes matched: {seen - set(self.ended)}")
        lines = run("journalctl", "-q", "-o", "json", f"--after-cursor={after}").stdout.splitlines()
        logged = [one for one in map(json.loads, lines) if one.get("CNPROCD_EVENT") == "identity_unknown"]
        counted = sum(int(one["CNPROCD_COUNT"]) for one in logged) + unknown_attributes().get("cmdline", 0)
        died, unmatched = len(self.ended), len(self.ended) - len(seen)
        expect(
            unmatched <= min(counted, died // 10), f"{died} died, {unmatched} not matched, {counted} counted as unknown"
        )
        return f"by arguments: {len(seen)} of {died}, the others counted as unknown"
