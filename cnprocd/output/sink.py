"""Where encoded log records go: a descriptor that never makes the daemon wait.

The flags of standard output are shared with other programs (open(2), O_NONBLOCK is of the open file description), so it
is never made non-blocking itself. Instead:

    pipe, terminal   opened again through /proc/self/fd, which gives a description of its own
    socket           MSG_DONTWAIT, for each call (send(2))
    file             written by a worker process: a file has no non-blocking write, and its disk may be full or frozen.
                     A thread would do, but one that waits for a frozen disk keeps the process from ending
    journal          a connected datagram socket, whose poll(2) knows whether the other end has room (unix(7))
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import math
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cnprocd.edge import Edge, Limits
from cnprocd.output import write_child
from cnprocd.worker import MOST_MESSAGE_BYTES, ChildWorker

_NO_ROOM = (errno.EMSGSIZE, errno.ENOBUFS)  # a datagram that is too large for the socket


class Sink(Protocol):
    """Takes bytes without waiting."""

    joins: bool  # several records may be given as one piece

    def put(self, data: bytes) -> int:
        """Take as many of these bytes as fit. Raises BlockingIOError: none now. Raises OSError: it is broken."""

    def when_ready(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        """Call back when there is room again, once."""

    def close(self) -> None:
        """Let go. What a worker process has taken, it writes."""


class DescriptorSink:
    """A pipe, a terminal or a socket."""

    joins = True

    def __init__(self, fd: int, send: Callable[[bytes], int]) -> None:
        self._fd = fd
        self._send = send
        self._loop: asyncio.AbstractEventLoop | None = None

    def put(self, data: bytes) -> int:
        return self._send(data)

    def when_ready(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        def ready() -> None:
            loop.remove_writer(self._fd)
            callback()

        self._loop = loop
        loop.add_writer(self._fd, ready)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_writer(self._fd)


class FileSink:
    """A file, written by a worker process once there is an event loop; before that, directly."""

    joins = True

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.edge: Edge[bytes, bytes] | None = None
        self._is_busy = False
        self._callback: Callable[[], None] | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write through a worker process from now on."""
        script = Path(write_child.__file__)
        limits = Limits(deadline_s=math.inf)
        self.edge = Edge("log", lambda: ChildWorker(script, stdout=self._fd), limits, loop)

    def put(self, data: bytes) -> int:
        if self.edge is None:
            return os.write(self._fd, data)
        if self._is_busy:
            raise BlockingIOError
        piece = data[:MOST_MESSAGE_BYTES]
        self._is_busy = self.edge.submit(piece, self._done)
        if not self._is_busy:
            raise BlockingIOError
        return len(piece)

    def when_ready(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._callback = callback
        if not self._is_busy:  # no worker could be started
            loop.call_later(1.0, self._done, b"")

    def close(self) -> None:
        self._callback = None
        if self.edge is not None:
            self.edge.close(abandon=False)  # a kill would cut a line

    def _done(self, answer: object) -> None:
        self._is_busy = False
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


def sink_of(fd: int) -> DescriptorSink | FileSink:
    """Return the sink for a descriptor. Raises OSError: it is not open."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        ours = socket.socket(fileno=os.dup(fd))
        return DescriptorSink(ours.fileno(), lambda data: ours.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL))
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):  # another user's: it cannot be opened again
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            return DescriptorSink(own, lambda data: os.write(own, data))
    return FileSink(fd)


class JournalSink:
    """The journal's socket. A journald that was restarted is connected to again."""

    joins = False

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self.socket = _datagram_socket()
        self._connected = False
        self._waiting: asyncio.AbstractEventLoop | None = None

    def put(self, data: bytes) -> int:
        """Send one record. Raises OSError other than BlockingIOError: journald cannot be reached."""
        if self._connected:
            try:
                return self._send(data)
            except (ConnectionError, FileNotFoundError, OSError) as error:
                if isinstance(error, BlockingIOError):
                    raise
                self._disconnect()
        self.socket.connect(self.path)
        self._connected = True
        return self._send(data)

    def when_ready(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        def ready() -> None:
            self._stop_waiting()
            callback()

        self._waiting = loop
        loop.add_writer(self.socket, ready)

    def close(self) -> None:
        self._stop_waiting()
        self.socket.close()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove_writer(self.socket)
            self._waiting = None

    def _disconnect(self) -> None:
        self._stop_waiting()
        self.socket.close()
        self.socket = _datagram_socket()
        self._connected = False

    def _send(self, data: bytes) -> int:
        try:
            self.socket.send(data)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self._send_by_memfd(data)
        return len(data)

    def _send_by_memfd(self, data: bytes) -> None:
        """Send a large record as a sealed file, whose descriptor is the datagram. Only journald limits its size."""
        descriptor = os.memfd_create("cnprocd-record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            # Not socket.send_fds: CPython 3.11 ignores its address argument.
            self.socket.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))])
        finally:
            os.close(descriptor)


def _datagram_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    made.setblocking(False)
    return made
