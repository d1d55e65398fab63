"""Run inside the guest: read one JSON request a line from the virtio port, answer one JSON line each.

Standard library only, and without knowledge of cnprocd. A step is a function in steps.py beside this file. It runs in a
process of its own, so that a step that crashes, hangs or kills its children still gives an answer. Python is the
guest's python3 (3.11 and 3.13).

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
    """Run one step in a child with its own session: exit status is the verdict, last line of output the detail."""
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, str(HERE / "steps.py"), step],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"CNPROCD_VM_LIMIT_S": str(timeout)},
    )
    try:
        output, _ = child.communicate(timeout=timeout)
        ok = child.returncode == 0
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        output += f"\ntimed out after {timeout} s".encode()
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
    # Unbuffered: the port is a character device, and a buffered read would wait for a full block.
    with PORT.open("r+b", buffering=0) as port:
        serve(port)


if __name__ == "__main__":
    main()
