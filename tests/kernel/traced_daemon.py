"""Run a command of this Python, `python -m MODULE ARGUMENT...`, and note each blocking call on the event loop's thread.

A note is a line of JSON in the file CNPTEST_OFFENCES: what was called, and where. Noted from READY=1 to SIGTERM.
CNPTEST_OFFEND makes the loop commit one such call, which shows that the tracer notes it.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import re
import runpy
import sys
import threading
import traceback
from types import FrameType

# `status`, `cgroup` and `loginuid` take no lock of the process (docs/architecture.md), nor does a list of /proc. The
# daemon's own files do not hang, and its runtime directory (`run` in these tests) is memory.
ALLOWED = re.compile(r".*/run/.*|/memfd:.*|/proc|/proc/\d+(/(status|cgroup|loginuid))?|/proc/self/.*|/dev/null")
# These read the `stat` of a child that has never called execve(2), and of a zombie.
CANNOT_HANG = {"start_ticks", "zombie"}
OPENS = {"open", "os.listdir", "os.scandir", "sqlite3.connect"}


class Tracer:
    """Notes blocking calls."""

    def __init__(self, file: str) -> None:
        self.pid, self.thread = os.getpid(), threading.get_ident()
        self.fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.active = False

    def note(self, call: str, *what: object) -> None:
        if not self.active or os.getpid() != self.pid or threading.get_ident() != self.thread:
            return
        frame: FrameType | None = sys._getframe(1)
        for _ in range(6):
            if frame is None or frame.f_code.co_name in CANNOT_HANG:
                return
            frame = frame.f_back
        self.active = False
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack()[:-2]]
        own = [line for line in where if "/cnprocd/" in line][-4:]
        write(self.fd, (json.dumps({"call": call, "what": repr(what)[:200], "where": own}) + "\n").encode())
        self.active = True

    def audit(self, event: str, args: tuple[object, ...]) -> None:
        if event in OPENS and args and isinstance(args[0], (str, bytes)):
            path = os.fsdecode(args[0])
            if not ALLOWED.fullmatch(path):
                self.note(event, path)
        elif event == "socket.connect" and args[0].gettimeout() != 0.0:  # type: ignore[attr-defined]
            self.note(event, args[1])

    def watch_path(self, name: str) -> None:
        """Note each look at a path that may be on any disk. These calls raise no audit event."""
        real = getattr(os, name)

        def noted(path: object, *args: object, **how: object) -> object:
            if isinstance(path, (str, bytes, os.PathLike)) and not ALLOWED.fullmatch(os.fsdecode(path)):
                self.note(name, path)
            return real(path, *args, **how)

        setattr(os, name, noted)

    def watch(self, module: object, name: str) -> None:
        """Note each call of a function that always may block."""
        real = getattr(module, name)

        def noted(*args: object, **how: object) -> object:
            self.note(name, *args)
            return real(*args, **how)

        setattr(module, name, noted)

    def write(self, fd: int, data: bytes) -> int:
        if self.active and os.get_blocking(fd) and not ALLOWED.fullmatch(readlink(f"/proc/self/fd/{fd}")):
            self.note("write to a blocking descriptor", fd)
        return write(fd, data)


write, readlink = os.write, os.readlink


def main() -> None:
    module, sys.argv = sys.argv[3], sys.argv[3:]
    import cnprocd.daemon

    tracer = Tracer(os.environ["CNPTEST_OFFENCES"])
    sys.addaudithook(tracer.audit)
    for name in ("fsync", "fdatasync", "sync"):
        tracer.watch(os, name)
    for name in ("stat", "lstat", "readlink"):
        tracer.watch_path(name)
    for name in ("getpwnam", "getpwuid", "getpwall"):
        tracer.watch(pwd, name)
    os.write = tracer.write  # type: ignore[assignment]
    start, stop = cnprocd.daemon.start, cnprocd.daemon.stop

    async def started(*args: object) -> None:
        await start(*args)
        tracer.active = True
        if "CNPTEST_OFFEND" in os.environ:
            asyncio.get_running_loop().call_soon(pwd.getpwuid, 0)

    async def stopping(*args: object) -> None:
        tracer.active = False
        await stop(*args)

    cnprocd.daemon.start, cnprocd.daemon.stop = started, stopping  # type: ignore[assignment]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


main()
