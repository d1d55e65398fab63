"""Runs inside the guest: reads one JSON request a line from the virtio port, answers one JSON line each.

Standard library only, and no knowledge of cnprocd: a step is a function in steps.py beside this file, run in a process
of its own so that a step that crashes, hangs or kills its children is an answer like any other. Python runs as the
guest's own python3 (3.11 and 3.13).

    {"id": 1, "step": "install", "timeout": 120}  ->  {"id": 1, "ok": true, "seconds": 8.1, "detail": "..."}
    on connection                                 ->  {"hello": BOOT_ID, "uptime": SECONDS}
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

PORT = Path("/dev/virtio-ports/cnprocd.agent")
HERE = Path(__file__).resolve().parent


def perform(step: str, timeout: float) -> dict[str, Any]:
    """One step in a child of its own session: its verdict is its exit status, its last line of output the detail."""
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, str(HERE / "steps.py"), step],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=timeout)
        ok = child.returncode == 0
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        output += f"\nno end within {timeout} s".encode()
        ok = False
    return {
        "ok": ok,
        "seconds": round(time.monotonic() - started, 1),
        "detail": output.decode(errors="replace")[-20_000:].strip(),
    }


def serve(port: BinaryIO) -> None:
    def say(answer: dict[str, Any]) -> None:
        port.write(json.dumps(answer).encode() + b"\n")

    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    say({"hello": boot_id, "uptime": uptime})
    while line := port.readline():
        request = json.loads(line)
        say({"id": request["id"], **perform(request["step"], request["timeout"])})


def main() -> None:
    # Unbuffered: the port is a character device, and a buffered reader would wait for a full block.
    with PORT.open("r+b", buffering=0) as port:
        serve(port)


if __name__ == "__main__":
    main()
