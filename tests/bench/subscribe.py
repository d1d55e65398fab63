"""Measure how long a subscriber waits for a match: `python tests/bench/subscribe.py [COUNT]` prints milliseconds.

A daemon with one rule, a subscriber on its control socket (plain JSON, no code of cnprocd), and processes that are
killed one after the other. From the kernel's time of the exit event to the moment when the subscriber has parsed the
match; both are of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RULES = "rules:\n  - {name: killed, events: [nonzero_exit], match: {comm: cnpbench-sub, signal: SIGKILL}}\n"
PAUSE_S = 0.01  # between two processes: each is an isolated event


def killed() -> None:
    """Start a process of the rule's name, and kill it."""
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/comm").write_text("cnpbench-sub")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "rules.yaml").write_text(RULES)
        options = ["--rules", "rules.yaml", "--state-dir", "state", "--runtime-dir", "run", "--log-format", "json"]
        command = [sys.executable, "-m", "cnprocd.cli.cnprocd", *options]
        with subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE) as daemon:
            assert daemon.stdout is not None
            while b'"started"' not in daemon.stdout.readline():
                pass
            found = measured(directory / "run" / "control.sock", count)
            daemon.terminate()
            daemon.stdout.read()
    p50, p99 = found[count // 2], found[count * 99 // 100]
    print(f"{count} processes: p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {found[-1]:.2f} ms")


def measured(path: Path, count: int) -> list[float]:
    """Return the latency of each match in milliseconds, sorted."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    connection.sendall(b'{"method":"io.cnprocd.Watch","more":true}\0')
    assert b"ready" in connection.recv(65536)
    found: list[float] = []
    for _ in range(count):
        killed()
        message = connection.recv(65536)
        at_ns = time.monotonic_ns()
        match = json.loads(message.rstrip(b"\0"))["parameters"]["match"]
        found.append((at_ns - match["kernel_time_ns"]) / 1e6)
        time.sleep(PAUSE_S)
    return sorted(found)


if __name__ == "__main__":
    main()
