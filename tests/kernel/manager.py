"""The part of a service manager that a daemon needs: NOTIFY_SOCKET, a descriptor store, and restarts.

It holds the sockets that the daemon stores (FDSTORE=1) and passes them to the next daemon (LISTEN_FDS), as systemd
does. So events wait in the receive buffers while no daemon runs.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from kernel.harness import PATIENCE_S

DAEMON = ("-m", "cnprocd.cli.cnprocd")


class Manager:
    """Starts daemons, one after the other. `program` are the arguments of Python, `options` those of cnprocd."""

    def __init__(self, directory: Path, rules: Path, *options: str, program: Sequence[str] = DAEMON) -> None:
        self.directory, self.rules = directory, rules
        self._options = options
        self._program = program
        self.stored: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(directory / "notify"))
        self._ready, self._read_all = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            message, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_LEN(4 * 16))
            fields = dict(line.split("=", 1) for line in message.decode().splitlines() if "=" in line)
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    passed = array.array("i", data[: len(data) - len(data) % 4])
                    fds = [_high(fd) for fd in passed]
                    if fields.get("FDSTORE") == "1":
                        self._replace(fields["FDNAME"], fds[0])
            if fields.get("FDSTOREREMOVE") == "1":
                os.close(self.stored.pop(fields["FDNAME"]))
            if fields.get("READY") == "1":
                self._ready.set()
            if fields.get("READ_ALL") == "1":
                self._read_all.set()

    def _read_what_was_sent(self) -> None:
        """systemd reads what a daemon has sent before it sees the end of the daemon."""
        self._read_all.clear()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"READ_ALL=1", str(self.directory / "notify"))
        assert self._read_all.wait(PATIENCE_S)

    def _replace(self, name: str, fd: int) -> None:
        former = self.stored.get(name)
        if former is not None and os.fstat(former).st_ino == os.fstat(fd).st_ino:
            os.close(fd)  # systemd drops duplicates as well
            return
        self.stored[name] = fd

    def drops(self) -> int:
        """Return the kernel's count of drops at the stored sockets."""
        inodes = {str(os.fstat(fd).st_ino) for fd in self.stored.values()}
        rows = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:]]
        return sum(int(row[8]) for row in rows if row[9] in inodes)

    def start(
        self, output: int | IO[bytes] = subprocess.DEVNULL, *, await_ready: bool = True
    ) -> subprocess.Popen[bytes]:
        """Start the daemon with all stored descriptors, and wait for READY=1."""
        self._read_what_was_sent()
        self._ready.clear()
        names = list(self.stored)
        # The shell moves the descriptors to 3 and up and knows its own pid, which exec keeps.
        moves = " ".join(f"{3 + i}<&{self.stored[name]}-" for i, name in enumerate(names))
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(self.directory / "notify"),
            "LISTEN_FDS": str(len(names)),
            "LISTEN_FDNAMES": ":".join(names),
        }
        options = ["--log-format", "json", "--rules", str(self.rules), "--runtime-dir", f"{self.directory}/run"]
        if "--state-dir" not in self._options:
            options += ["--state-dir", f"{self.directory}/state"]
        command = [sys.executable, *self._program, *options, *self._options]
        process = subprocess.Popen(
            ["bash", "-c", f'exec {moves}; LISTEN_PID=$$ exec "$@"', "bash", *command],
            env=environment,
            pass_fds=list(self.stored.values()),
            stdout=output,
        )
        assert not await_ready or self._ready.wait(PATIENCE_S), "the daemon did not become ready"
        return process


def _high(fd: int) -> int:
    """Return a duplicate that no descriptor of a daemon collides with, which are 3 and up. Close `fd`."""
    with os.fdopen(fd, "rb", buffering=0):
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100)
