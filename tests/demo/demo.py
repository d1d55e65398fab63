"""The headline scenario with real processes: a background process of a database dies, and its resources are freed.

A process called ora_pmon_DEMO takes a shared memory segment and a lock file and is killed with SIGKILL. A second
process, ora_smon_DEMO, has the same kinds of resources and keeps running: its resources must stay. Exit 0 only if all
this holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
IPC_PRIVATE, IPC_CREAT = 0, 0o1000
PR_SET_NAME = 15
PATIENCE_S = 8.0

RULES = """\
lists:
  oracle_background: ["ora_*"]
rules:
  - name: oracle-process-died
    description: Free what a dead background process held
    events: [nonzero_exit]
    match: {{comm: $oracle_background}}
    log: {{level: error, message: "{{comm}}[{{pid}}] died of {{status}}"}}
    run:
      command: [{hook}, --pid, "{{pid}}", --locks, {locks}]
      timeout: 5s
"""


def background_process(name: str, locks: Path) -> int:
    """Fork a process of this name that takes a segment and a lock file, and waits. Return when it has them."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        LIBC.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
        segment = LIBC.shmget(IPC_PRIVATE, 1 << 20, IPC_CREAT | 0o600)
        LIBC.shmat.restype = ctypes.c_void_p
        LIBC.shmat(segment, None, 0)
        (locks / f"{name}.lock").write_text(str(os.getpid()))
        os.write(done, b"x")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    return pid


def held_by(pid: int, locks: Path) -> list[str]:
    """Return the segments (by the kernel's cpid) and lock files of a process."""
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    segments = [f"shared memory segment {row[1]}" for row in rows if int(row[4]) == pid]
    return segments + [str(lock) for lock in locks.glob("*.lock") if lock.read_text() == str(pid)]


def wait_for(lines: subprocess.Popen[str], event: str) -> dict[str, object]:
    assert lines.stdout is not None
    for line in lines.stdout:
        record: dict[str, object] = json.loads(line)
        if record["event"] == event:
            return record
        if record["event"] in ("job_dead", "hook_failed"):
            raise SystemExit(f"the hook failed: {line}")
    raise SystemExit(f"cnprocd ended before {event}")


def main() -> int:
    if os.geteuid() != 0:
        print("make demo needs root: it subscribes to kernel events and frees shared memory", file=sys.stderr)
        return 77
    signal.alarm(int(PATIENCE_S) + 1)  # a demo that hangs has failed
    with tempfile.TemporaryDirectory(prefix="cnprocd-demo-") as name, contextlib.ExitStack() as cleanup:
        place = Path(name)
        hook = Path(shutil.copy(Path(__file__).with_name("free-what-it-held"), place))
        hook.chmod(0o755)
        rules = place / "rules.yaml"
        rules.write_text(RULES.format(hook=hook, locks=place))
        print(f"--- rules\n{rules.read_text()}")

        daemon = subprocess.Popen(
            [
                sys.executable, "-m", "cnprocd.cli.cnprocd", "--rules", str(rules), "--log-format", "json",
                "--state-dir", str(place / "state"), "--runtime-dir", str(place / "run"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        cleanup.callback(stop, daemon)
        wait_for(daemon, "started")

        victim, bystander = background_process("ora_pmon_DEMO", place), background_process("ora_smon_DEMO", place)
        cleanup.callback(free, bystander)
        held, kept = held_by(victim, place), held_by(bystander, place)
        print(f"--- ora_pmon_DEMO[{victim}] holds: {', '.join(held)}")
        print(f"--- ora_smon_DEMO[{bystander}] holds: {', '.join(kept)}")

        print(f"--- kill -KILL {victim}")
        os.kill(victim, signal.SIGKILL)
        killed_at = time.monotonic()
        os.waitpid(victim, 0)
        match = wait_for(daemon, "rule_matched")
        finished = wait_for(daemon, "hook_finished")
        took_ms = (time.monotonic() - killed_at) * 1000
        print(f"--- the record\n{json.dumps(match, indent=2)}")
        print(f"--- the hook exited with {finished['exit_code']}; {took_ms:.1f} ms from kill to cleanup")

        left = held_by(victim, place)
        untouched = held_by(bystander, place) == kept
        print(f"--- resources left of ora_pmon_DEMO: {', '.join(left) or 'none'}")
        print(f"--- resources of ora_smon_DEMO: {'untouched' if untouched else 'GONE'}")
        worked = (
            len(held) == len(kept) == 2
            and not left
            and untouched
            and (match["pid"], match["signal"], match["comm"]) == (victim, "SIGKILL", "ora_pmon_DEMO")
        )
        print("It worked." if worked else "It did not work.")
        return 0 if worked else 1


def stop(daemon: subprocess.Popen[str]) -> None:
    daemon.terminate()
    daemon.wait()


def free(pid: int) -> None:
    """End the bystander and remove its resources."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        if int(line.split()[4]) == pid:
            LIBC.shmctl(int(line.split()[1]), 0, None)


if __name__ == "__main__":
    sys.exit(main())
