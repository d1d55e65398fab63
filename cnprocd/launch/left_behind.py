"""The output of programs that a successful hook left behind: read until they close it, so that none gets SIGPIPE.

The hook may have restarted a service that still has the hook's output as its own. Its lines are logged up to the hook's
output limit; the rest is discarded. When this process ends, or has too many of these pipes, a process of its own
(drain_child.py) takes them over and discards what is written to them until the last one is closed. It is spawned, not
forked: a fork of the daemon copies its page tables, for up to 40 ms if it knows 30,000 processes. The alternative,
/dev/null for every hook after its first second, would need ptrace(2): a descriptor of another process cannot be
replaced.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from cnprocd.launch import drain_child
from cnprocd.launch.output import Output

MOST_PIPES = 256


class LeftBehind:
    """Pipes that programs hold after the end of their hook. Belongs to the event loop."""

    def __init__(self) -> None:
        self._outputs: dict[int, Output] = {}
        self._drains: list[int] = []  # PIDs of the processes that have taken over pipes

    def __len__(self) -> int:
        return len(self._outputs)

    def keep(self, output: Output) -> None:
        """Read an output until its end, and close it then."""
        self._drains = [pid for pid in self._drains if _is_running(pid)]
        if len(self._outputs) >= MOST_PIPES:
            self.hand_over()
        self._outputs[output.fd] = output
        asyncio.get_running_loop().add_reader(output.fd, self._read, output)

    def hand_over(self) -> None:
        """Let a process of its own discard what is written from now on. If none can be started, close the pipes."""
        outputs, self._outputs = list(self._outputs.values()), {}
        if outputs:
            fds = [output.fd for output in outputs]
            loop = asyncio.get_running_loop()
            for fd in fds:
                loop.remove_reader(fd)
            pid = _spawn_drain(fds)
            if pid is not None:
                self._drains.append(pid)
            for fd in fds:
                os.close(fd)

    def _read(self, output: Output) -> None:
        try:
            more = output.read()
        except BlockingIOError:
            return
        if not more:
            asyncio.get_running_loop().remove_reader(output.fd)
            del self._outputs[output.fd]
            output.finish()
            os.close(output.fd)


def _spawn_drain(fds: list[int]) -> int | None:
    """Start a process that discards what is written to these pipes. Return its PID; None: none could be started."""
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-IS", drain_child.__file__, *map(str, fds)],
            {"PATH": "/usr/bin:/bin"},
            file_actions=[*null, *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds)],  # which clears FD_CLOEXEC
            setsid=True,
            setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE],
            setsigmask=[],
        )
    except OSError:
        return None


def _is_running(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False
