"""Steps about what changes under a process: its cgroup while it runs, and its program's file while no daemon runs."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

from crashes import LOAD, ready
from matching import RULES_TEXT
from probe import cursor, expect, first, matched_pids, reload_rules, run, show, until, write_rules

BEFORE, AFTER, LATER = "vm-before.scope", "vm-after.scope", "vm-later.service"
UNIT_RULES = "".join(
    f"""
  - name: {unit.partition(".")[0]}
    events: [nonzero_exit]
    match: {{exit_code: 9, unit: {unit}}}
"""
    for unit in (BEFORE, AFTER, LATER)
)
MOST_TRIES = 5


def moved_units() -> str:
    """A process that systemd moves to another scope after its exec, as GNOME does: the unit is that of the death.

    Of a zombie it can be read. A process that is reaped at once has the unit that the daemon saw when it was one to two
    seconds old.
    """
    write_rules(RULES_TEXT + UNIT_RULES)
    reload_rules()
    after = cursor()
    child = subprocess.Popen(["/bin/sh", "-c", "read line; exec /bin/sh -c 'read line; exit 9'"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    _move(child.pid, BEFORE)
    child.stdin.write(b"\n")
    child.stdin.flush()
    cmdline = Path(f"/proc/{child.pid}/cmdline")
    until("it executes another program", lambda: cmdline.read_bytes().endswith(b"\0read line; exit 9\0"))
    _move(child.pid, AFTER)
    child.stdin.write(b"\n")
    child.stdin.close()
    record = first(after, "CNPROCD_EVENT=rule_matched", f"CNPROCD_PID={child.pid}")  # its zombie is there until then
    child.wait()
    expect(record["CNPROCD_UNIT"] == AFTER, f"another unit than that of its death: {record}")
    tries = _reaped_at_once()
    expect(not matched_pids(after, BEFORE.partition(".")[0]), "matched by the unit of before")
    write_rules(RULES_TEXT)
    reload_rules()
    return f"a zombie in {AFTER}, one that was reaped at once in {LATER} at try {tries}"


def _reaped_at_once() -> int:
    """Return at which try the unit was that of the death: on an emulated CPU the daemon's look can come too early."""
    run("systemd-run", f"--unit={LATER}", "sleep", "600")
    group = f"/sys/fs/cgroup{show(LATER, 'ControlGroup')}/cgroup.procs"
    for number in range(1, MOST_TRIES + 1):
        after = cursor()
        child = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.3; echo $$ >{group}; sleep 5; exit 9"])
        child.wait()
        if child.pid in matched_pids(after, LATER.partition(".")[0]):
            run("systemctl", "stop", LATER)
            return number
    expect(False, f"matched at none of {MOST_TRIES} tries")
    return 0


def _move(pid: int, scope: str) -> None:
    """Have systemd make a scope of a running process, as a desktop session does (org.freedesktop.systemd1(5))."""
    manager = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
    unit = (scope, "fail", "1", "PIDs", "au", "1", str(pid), "0")
    run("busctl", "call", *manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", *unit)
    cgroup = Path(f"/proc/{pid}/cgroup")
    until(f"{pid} is in {scope}", lambda: cgroup.read_text().strip().endswith(f"/{scope}"))


PROGRAM = Path("/usr/local/bin/vm-named")
PROGRAM_RULES = f"""
  - name: vm-named
    events: [nonzero_exit]
    match: {{exe: {PROGRAM}}}
"""
SCRIPT = Path("/usr/local/sbin/cnprocd-vm-between")
BETWEEN = Path("/run/cnprocd-vm-between")
# Replace the program, let the process of its old file end, and let programs fail whose files could get the old number.
SCRIPT_TEXT = f"""#!/bin/sh
exec 2>{BETWEEN}/errors
systemctl show --value -p NFileDescriptorStore cnprocd.service >{BETWEEN}/stored
mv {PROGRAM}.new {PROGRAM}
echo >{BETWEEN}/end
while [ -e /proc/$(cat {BETWEEN}/pid)/exe ]; do :; done
for n in 1 2 3 4 5 6 7 8; do
    cp /bin/false {PROGRAM.parent}/vm-other$n
    stat -c %i {PROGRAM.parent}/vm-other$n >>{BETWEEN}/numbers
    {PROGRAM.parent}/vm-other$n
done
true
"""


def replaced_program() -> str:
    """A program is replaced and its old process ends while systemd restarts the daemon. Only that process matches.

    The daemon leaves a descriptor of the old file in systemd's store (FileDescriptorStoreMax=), so that no later file
    gets its number.
    """
    BETWEEN.mkdir()
    os.mkfifo(BETWEEN / "end")
    for name in (PROGRAM, Path(f"{PROGRAM}.new")):
        shutil.copy("/bin/sh", name)
    SCRIPT.write_text(SCRIPT_TEXT)
    SCRIPT.chmod(stat.S_IRWXU)
    write_rules(RULES_TEXT + PROGRAM_RULES)
    reload_rules()
    number = PROGRAM.stat().st_ino
    old = subprocess.Popen([PROGRAM, "-c", f"read line <{BETWEEN}/end; exit 7"])
    (BETWEEN / "pid").write_text(str(old.pid))
    LOAD.mkdir(parents=True, exist_ok=True)
    drop_in = LOAD / "between.conf"
    drop_in.write_text(f"[Service]\nExecStartPre=+{SCRIPT}\n")
    run("systemctl", "daemon-reload")
    before, after = int(show("cnprocd.service", "NFileDescriptorStore")), cursor()
    run("systemctl", "restart", "cnprocd.service")
    until("the new daemon", ready)
    expect(old.wait() == 7, f"the program of before ended with {old.returncode}")
    drop_in.unlink()
    run("systemctl", "daemon-reload")
    new = subprocess.run([PROGRAM, "-c", "echo $$; exit 7"], stdout=subprocess.PIPE, text=True)
    seen = matched_pids(after, "vm-named")
    stored = int((BETWEEN / "stored").read_text() or 0)
    numbers = [int(line) for line in (BETWEEN / "numbers").read_text().split()]
    expect(seen == [old.pid, int(new.stdout)], f"{old.pid} and {new.stdout} died of {PROGRAM}, matched: {seen}")
    expect(stored > before, f"{stored} descriptors in the store between the daemons, {before} before")
    expect(number not in numbers, f"a new file got the number {number} of the old one")
    write_rules(RULES_TEXT)
    reload_rules()
    return (
        f"the old process and a new one match, 8 other programs do not; {stored} descriptors between, {before} before"
    )
