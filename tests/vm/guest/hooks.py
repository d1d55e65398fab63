"""Steps about hooks: they run as the named user outside the sandbox, and jobs waiting at a reboot run after it."""

from __future__ import annotations

import json
import os
import pwd
import re
from pathlib import Path

from matching import RULES_TEXT
from probe import SCRATCH, cursor, die, expect, first, reload_rules, run, until, write_rules

HOOK = Path("/usr/local/sbin/cnprocd-vm-hook")
HOOK_TEXT = """#!/bin/sh
case "$1" in
look) { cat /proc/self/status /proc/self/cgroup; touch "$HOME/was-here"; echo "touched=$?"; env; cat; } >"$2" ;;
note) echo "$CNPROCD_PID" >>"$2" ;;
wait) while [ ! -e "$3" ]; do sleep 1; done; echo "$CNPROCD_PID" >>"$2" ;;
esac
"""

HOOKS_TEXT = (
    RULES_TEXT
    + """
  - name: vm-kept
    events: [nonzero_exit]
    match: {cmdline: "*vm-kept*"}
    log: {level: info, message: "{pid} {cmdline}"}
  - name: vm-look
    events: [nonzero_exit]
    match: {comm: vmlook}
    run: {command: [/usr/local/sbin/cnprocd-vm-hook, look, /var/tmp/cnprocd-vm/look], user: oper, timeout: 60s}
  - name: vm-note
    events: [nonzero_exit]
    match: {comm: vmnote}
    run:
      command: [/usr/local/sbin/cnprocd-vm-hook, note, /var/tmp/cnprocd-vm/noted]
      user: oper
      timeout: 60s
      retries: 3
  - name: vm-wait
    events: [nonzero_exit]
    match: {comm: vmwait}
    run:
      command: [/usr/local/sbin/cnprocd-vm-hook, wait, /var/tmp/cnprocd-vm/waited, /var/tmp/cnprocd-vm/go]
      user: oper
      timeout: 300s
      retries: 3
"""
)


def prepare() -> None:
    """Create a user with a home, a root-owned hook, a directory to write to, and rules that use them."""
    if run("getent", "passwd", "oper", ok=False).returncode:
        run("useradd", "--create-home", "--shell", "/bin/sh", "oper")
    SCRATCH.mkdir(exist_ok=True)
    os.chown(SCRATCH, pwd.getpwnam("oper").pw_uid, -1)
    HOOK.write_text(HOOK_TEXT)
    HOOK.chmod(0o755)
    write_rules(HOOKS_TEXT)
    reload_rules()


def hook_as_user() -> str:
    prepare()
    after = cursor()
    pid = die("vmlook", 5)
    finished = first(after, "CNPROCD_EVENT=hook_finished", "CNPROCD_RULE=vm-look")
    text = (SCRATCH / "look").read_text()
    field = dict(re.findall(r"^(\w+):\s+(.*)$", text, re.M))
    oper = pwd.getpwnam("oper")
    expect(field["Uid"].split() == [str(oper.pw_uid)] * 4, f"runs as {field['Uid']}")
    expect(field["Gid"].split() == [str(oper.pw_gid)] * 4, f"runs as group {field['Gid']}")
    expect(field["Groups"].split() in ([], [str(oper.pw_gid)]), f"groups {field['Groups']}")
    expect(field["NoNewPrivs"] == "0" and field["Seccomp"] == "0", "it inherited the reader's sandbox")
    expect(int(field["CapEff"], 16) == 0, f"capabilities {field['CapEff']}")
    expect("touched=0" in text, "it cannot write below /home: ProtectHome= reached it")
    (cgroup,) = re.findall(r"^0::(\S+)$", text, re.M)
    expect(re.fullmatch(r"/system\.slice/cnprocd-runner\.service/\S+", cgroup), f"its cgroup is {cgroup}")
    expect(f"CNPROCD_PID={pid}\n" in text, "no CNPROCD_PID in its environment")
    event = json.loads(text.strip().splitlines()[-1])
    expect(event["pid"] == pid and event["exit_code"] == 5, f"its standard input: {event}")
    return f"{oper.pw_name} in {cgroup.rsplit('/', 1)[1]}, job {finished['CNPROCD_JOB_ID']}"


def queue_jobs() -> str:
    """Start hooks that cannot end before the reboot: some run, some wait for a slot."""
    prepare()
    after = cursor()
    pids = [die("vmwait", 1) for _ in range(20)]
    (SCRATCH / "waiting").write_text("\n".join(map(str, pids)))
    first(after, "CNPROCD_EVENT=hook_started", "CNPROCD_RULE=vm-wait")
    os.sync()
    return f"{len(pids)} jobs, none can finish"


def jobs_after_reboot() -> str:
    wanted = set((SCRATCH / "waiting").read_text().split())
    expect(not (SCRATCH / "waited").exists(), "a hook finished before the reboot")
    (SCRATCH / "go").touch()

    def ran() -> set[str]:
        return set((SCRATCH / "waited").read_text().split()) if (SCRATCH / "waited").exists() else set()

    seconds = until("every job ran", lambda: bool(run("sync")) and ran() >= wanted, limit_s=180)
    expect(ran() == wanted, f"hooks of {ran() - wanted} ran as well")
    return f"{len(wanted)} of {len(wanted)} ran, {seconds:.0f} s after"
