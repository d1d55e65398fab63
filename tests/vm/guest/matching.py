"""Steps about rules: a match in the journal, a good reload, a refused reload."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

from probe import cursor, die, expect, first, matched_pids, run, show, write_rules

MESSAGE_ID_MATCHED = "2b761c5a2a174400bfd70bbfcdc48658"

RULES_TEXT = """
rules:
  - name: vm-fail
    events: [nonzero_exit]
    match: {comm: vmfail}
    log: {level: error, message: "{comm}[{pid}] died of {status}"}
  - name: vm-storm
    events: [nonzero_exit]
    match: {comm: vmstorm}
    log: {level: info, message: "{comm}[{pid}] died of {status}"}
  - name: vm-marker
    events: [nonzero_exit]
    match: {comm: vmmarker}
    log: {level: info, message: marker}
"""


def failing_process() -> str:
    """With the shipped rules: one failed process, one record, native fields."""
    after = cursor()
    pid = die("vmfirst", 3)
    record = first(after, "_SYSTEMD_UNIT=cnprocd.service", f"CNPROCD_PID={pid}")
    wanted = {
        "CNPROCD_EVENT": "rule_matched",
        "CNPROCD_RULE": "process-failed",
        "CNPROCD_COMM": "vmfirst",
        "CNPROCD_EXIT_CODE": "3",
        "MESSAGE_ID": MESSAGE_ID_MATCHED,
        "OBJECT_PID": str(pid),
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "cnprocd",
    }
    wrong = {key: record.get(key) for key, value in wanted.items() if record.get(key) != value}
    expect(not wrong, f"wrong fields {wrong} in {record}")
    explained = run("journalctl", "-x", "-n", "1", f"MESSAGE_ID={MESSAGE_ID_MATCHED}").stdout
    expect("matched rule process-failed" in explained, f"no catalog entry:\n{explained}")
    return record["MESSAGE"]


def good_reload() -> str:
    write_rules(RULES_TEXT)
    before = show("cnprocd.service", "MainPID")
    run("systemctl", "reload", "cnprocd.service")
    after = cursor()
    pid = die("vmfail", 7)
    record = first(after, f"CNPROCD_PID={pid}", "CNPROCD_RULE=vm-fail")
    expect(show("cnprocd.service", "MainPID") == before, "a reload started a new process")
    return record["MESSAGE"]


def bad_reload() -> str:
    """Reload an invalid file: refused at once with file:line:column, and the current rules are kept."""
    after = cursor()
    write_rules(RULES_TEXT.replace("comm: vmfail", "com: vmfail"))
    refused = run("systemctl", "reload", "cnprocd.service", ok=False)
    expect(refused.returncode != 0, "systemctl reload accepted a bad rule file")
    message = first(after, "_SYSTEMD_UNIT=cnprocd.service", "CNPROCD_EVENT=rules_rejected")["MESSAGE"]
    expect("rules.yaml:5:13" in message, f"no place of the error in {message}")
    expect(show("cnprocd.service", "ActiveState") == "active", "a bad reload stopped the service")
    pid = die("vmfail", 8)
    first(after, f"CNPROCD_PID={pid}", "CNPROCD_RULE=vm-fail")
    write_rules(RULES_TEXT)
    run("systemctl", "reload", "cnprocd.service")
    return next(line for line in message.splitlines() if "rules.yaml" in line)


HOUR_S = 3600
RETRIED = """
  - name: vm-retried
    events: [nonzero_exit]
    match: {comm: vmretried}
    cooldown: 10m
    run:
      command: [/usr/bin/test, -e, /run/vm-go]
      retries: 100
      deadline: 5m
      backoff: {initial: 1s, max: 1s}
"""


def varlink() -> str:
    """varlinkctl of this release, as a member of the group: introspection, a call, and a live match."""
    if shutil.which("varlinkctl") is None:
        return "this release has no varlinkctl"
    socket = "/run/cnprocd/control.sock"
    as_reader = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--groups=cnprocd", "varlinkctl")
    expect("io.cnprocd" in run(*as_reader, "info", socket).stdout, "info does not name the interface")
    expect("method Watch" in run(*as_reader, "introspect", socket, "io.cnprocd").stdout, "introspect lacks Watch")
    status = json.loads(run(*as_reader, "call", "-j", socket, "io.cnprocd.Status", "{}").stdout)
    expect(status["pid"] == int(show("cnprocd.service", "MainPID")), f"Status is of PID {status['pid']}")
    refused = run(*as_reader, "call", "-j", socket, "io.cnprocd.Reload", "{}", ok=False)
    expect(refused.returncode != 0, "a member of the group could reload")
    command = [*as_reader, "call", "--more", "-j", socket, "io.cnprocd.Watch", "{}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        try:  # each line begins with a record separator (RFC 7464)
            ready = json.loads(watching.stdout.readline().lstrip("\x1e"))
            expect(ready == {"ready": True}, f"the first reply is {ready}")
            pid = die("vmfail", 7)
            match = json.loads(watching.stdout.readline().lstrip("\x1e"))["match"]
            expect(match["pid"] == pid, f"the match is of PID {match['pid']} instead of {pid}")
        finally:
            watching.kill()
    return f"varlinkctl printed the match {match['match_id']} of PID {pid}"


def clock_steps() -> str:
    """Step the machine's clock back and forth by hours: no retry, deadline or cooldown changes, no match is lost."""
    write_rules(RULES_TEXT + RETRIED)
    run("systemctl", "reload", "cnprocd.service")
    after = cursor()
    pid = die("vmretried", 3)
    first(after, f"CNPROCD_PID={pid}", "CNPROCD_RULE=vm-retried", "CNPROCD_EVENT=rule_matched")
    try:
        for hours in (-2, 4):
            now = time.clock_gettime(time.CLOCK_REALTIME)
            time.clock_settime(time.CLOCK_REALTIME, now + hours * HOUR_S)
            failed = cursor()
            first(failed, "CNPROCD_EVENT=hook_failed", "CNPROCD_RULE=vm-retried", limit_s=20)
            first(failed, f"CNPROCD_PID={die('vmfail', 9)}", "CNPROCD_RULE=vm-fail")
            die("vmretried", 4)  # within the cooldown
        Path("/run/vm-go").touch()
        done = cursor()
        first(done, "CNPROCD_EVENT=hook_finished", "CNPROCD_RULE=vm-retried", limit_s=20)
    finally:
        time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) - 2 * HOUR_S)
    seen = matched_pids(after, "vm-retried")
    expect(seen == [pid], f"the cooldown let {seen} through, one of them is {pid}")
    write_rules(RULES_TEXT)
    run("systemctl", "reload", "cnprocd.service")
    return "2 hours back, 4 forth: retried every second, one match within the cooldown"
