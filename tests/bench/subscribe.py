"""Measure how long a subscriber waits for a match: `python tests/bench/subscribe.py [COUNT] [--root TREE]`.

A daemon with one rule, a subscriber on its control socket, and processes that are killed one after the other. From the
kernel's time of the exit event to the moment when this program has parsed the match; both are of CLOCK_MONOTONIC.
Three subscribers, each with its own processes: plain Python as in docs/subscribing.md, `cnprocctl --json watch`, and
`varlinkctl call --more` of this machine or of TREE, a root of Debian 13 such as .fleet/tree. The last two are programs
of their own, whose output comes through a pipe. The load of the machine is printed before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

RULES = "rules:\n  - {name: killed, events: [nonzero_exit], match: {comm: cnpbench-sub, signal: SIGKILL}}\n"
PAUSE_S = 0.01  # between two processes: each is an isolated event
WATCH = "io.cnprocd.Watch"
Next = Callable[[], Any]
"""Return the next reply: {"ready": true} first, then {"match": ...}."""
Subscribe = Callable[[], AbstractContextManager[Next]]


def killed() -> int:
    """Start a process of the rule's name, kill it, and return its PID."""
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/comm").write_text("cnpbench-sub")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    return pid


@contextmanager
def plain(runtime_dir: Path) -> Iterator[Next]:
    """A socket, as in docs/subscribing.md."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(runtime_dir / "control.sock"))
        connection.sendall(json.dumps({"method": WATCH, "more": True}).encode() + b"\0")
        buffer = bytearray()

        def next_reply() -> Any:
            while b"\0" not in buffer:
                buffer.extend(connection.recv(65536))
            end = buffer.index(b"\0")
            reply = json.loads(buffer[:end])
            del buffer[: end + 1]
            return reply["parameters"]

        yield next_reply


@contextmanager
def program(command: list[str], *, announces: bool) -> Iterator[Next]:
    """A program that prints a JSON object a line. Without `announces`, it reports on stderr that it has begun."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=None if announces else subprocess.PIPE) as process:
        assert process.stdout is not None
        out = process.stdout
        if process.stderr is not None:
            process.stderr.readline()
        begun = iter(() if announces else ({"ready": True},))

        def next_reply() -> Any:
            first = next(begun, None)
            if first is not None:
                return first
            found = json.loads(out.readline().strip(b"\x1e\n"))
            return found if announces else {"match": found}

        try:
            yield next_reply
        finally:
            process.terminate()


def subscribers(runtime_dir: Path, root: Path | None) -> dict[str, Subscribe]:
    ctl = [sys.executable, "-m", "cnprocd.cli.cnprocctl", "--runtime-dir", str(runtime_dir), "--json", "watch"]
    found: dict[str, Subscribe] = {
        "Python": lambda: plain(runtime_dir),
        "cnprocctl watch": lambda: program(ctl, announces=False),
    }
    call = ["varlinkctl", "call", "--more", "--json=short"]
    if root is not None:
        mounts = 'mkdir -p "$1/mnt/bench" && mount --bind "$2" "$1/mnt/bench" && mount --bind /proc "$1/proc"'
        script = f'{mounts} && shift 2 && exec chroot "$@"'
        enter = ["unshare", "--mount", "sh", "-c", script, "sh", str(root), str(runtime_dir), str(root)]
        inside = [*enter, *call, "/mnt/bench/control.sock", WATCH, "{}"]
        found["varlinkctl"] = lambda: program(inside, announces=True)
    elif shutil.which("varlinkctl"):
        here = [*call, str(runtime_dir / "control.sock"), WATCH, "{}"]
        found["varlinkctl"] = lambda: program(here, announces=True)
    return found


def measured(next_reply: Next, count: int) -> list[float]:
    """Return the latency of each match in milliseconds, sorted."""
    assert next_reply()["ready"]
    found: list[float] = []
    for _ in range(count):
        pid = killed()
        match = next_reply()["match"]
        at_ns = time.monotonic_ns()
        assert match["pid"] == pid
        found.append((at_ns - match["kernel_time_ns"]) / 1e6)
        time.sleep(PAUSE_S)
    return sorted(found)


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=500)
    parser.add_argument("--root", type=Path, help="a root of Debian 13 that has varlinkctl")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "rules.yaml").write_text(RULES)
        options = ["--rules", "rules.yaml", "--state-dir", "state", "--runtime-dir", "run", "--log-format", "json"]
        command = [
            "nice",
            "-n",
            "-10",
            sys.executable,
            "-m",
            "cnprocd.cli.cnprocd",
            *options,
        ]  # as cnprocd.service has it
        with (directory / "log").open("wb") as log, subprocess.Popen(command, cwd=directory, stdout=log) as daemon:
            while b'"started"' not in (directory / "log").read_bytes():
                assert daemon.poll() is None
                time.sleep(0.05)
            print(load())
            for kind, subscribe in subscribers(directory / "run", given.root).items():
                with subscribe() as next_reply:
                    found = measured(next_reply, given.count)
                p50, p99 = found[given.count // 2], found[given.count * 99 // 100]
                print(f"{kind}: {given.count} processes, p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {found[-1]:.2f} ms")
            print(load())
            daemon.terminate()


if __name__ == "__main__":
    main()
