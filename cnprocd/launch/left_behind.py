"""The output of programs that a successful hook left behind: read until they close it, so that none gets SIGPIPE.

The hook may have restarted a service that still has the hook's output as its own. Its lines are logged up to the hook's
output limit; the rest is discarded. When this process ends, or has too many of these pipes, a child of it takes them
over and discards what is written to them until the last one is closed. The alternative, /dev/null for every hook after
its first second, would need ptrace(2): a descriptor of another process cannot be replaced.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Iterable

from cnprocd.launch.output import Output

MOST_PIPES = 256
_CHUNK = 1 << 20


class LeftBehind:
    """Pipes that programs hold after the end of their hook. Belongs to the event loop."""

    def __init__(self) -> None:
        self._outputs: dict[int, Output] = {}

    def __len__(self) -> int:
        return len(self._outputs)

    def keep(self, output: Output) -> None:
        """Read an output until its end, and close it then."""
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
            _fork_drain(fds)
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


def _fork_drain(fds: list[int]) -> None:
    """Start a grandchild that drains, so that this process has no child to reap."""
    try:
        pid = os.fork()
    except OSError:
        return
    if pid == 0:
        try:
            signal.set_wakeup_fd(-1)  # the event loop's wakeup pipe is shared with the parent
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            if os.fork() == 0:
                _drain(fds)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def _drain(fds: Iterable[int]) -> None:
    """Discard what is written to the pipes, until each is closed."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    kept = sorted({*fds, null})
    for below, above in zip([-1, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(below + 1, above)
    poll = select.poll()
    left = set(fds)
    for fd in left:
        poll.register(fd, select.POLLIN)
    while left:
        for fd, _ in poll.poll():
            if os.splice(fd, null, _CHUNK) == 0:
                poll.unregister(fd)
                left.discard(fd)
