"""Workers for an edge: a thread, or a child process.

Measured on 2 cores, Linux 6.18, Python 3.11, p50 of one read of /proc/PID/stat: 7 us on the
loop itself, 17 us in a child process, 21 us in a thread, which competes for the interpreter's lock.

    ThreadWorker   no start-up cost. A thread that waits in the kernel cannot be ended, only left alone
    ChildWorker    can be killed, and so ends even while it waits for a lock of another process (`killable` waits).
                   Costs 20 ms and 7 MB once. Where a wait is not killable (a frozen file system), a thread would keep
                   the whole process from ending (wait(2) waits for every thread); a child only stays behind

The answer of a worker is there when its descriptor is readable, so that the loop can watch many workers, and poll(2)
one. Facts: eventfd(2), unix(7), signal(7), fs/exec.c (exec_update_lock is taken with down_read_killable).
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar, cast

from cnprocd.errors import CnprocdError

MOST_MESSAGE_BYTES = 128 * 1024  # of a ChildWorker's work and answer; net.core.wmem_default is 208 KiB

W = TypeVar("W")
R = TypeVar("R")
W_contra = TypeVar("W_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class WorkerEndedError(CnprocdError):
    """The worker ended before it answered."""


class Worker(Protocol[W_contra, R_co]):
    """Does one piece of work at a time, outside the event loop."""

    greets: bool  # it sends one answer to nothing when it is ready, because it takes long to start

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is an answer, or when the worker has ended."""

    def begin(self, work: W_contra) -> None:
        """Start on a piece of work without waiting. Only for a worker that is idle. Raises OSError: it cannot."""

    def collect(self) -> R_co:
        """Return the answer, after the descriptor became readable.

        Raises WorkerEndedError, or what the work raised.
        """

    def state(self) -> str:
        """Return what it does, by the letter that proc_pid_stat(5) has for it; empty if that is unknown."""

    def abandon(self) -> None:
        """Give up a stuck worker: end it if that is possible."""

    def close(self) -> None:
        """Let the worker end when it has nothing to do. Never waits for it."""

    def is_gone(self) -> bool:
        """Whether nothing is left of a worker that was closed or has ended. Reaps a child process."""


class ThreadWorker(Generic[W, R]):
    """A thread that runs `run` for each piece. It does not keep the process from ending (threading: daemon)."""

    greets = False

    def __init__(self, name: str, run: Callable[[W], R]) -> None:
        """Raises OSError or RuntimeError: there is no descriptor or thread to be had."""
        self._run = run
        self._inbox: queue.SimpleQueue[tuple[W] | None] = queue.SimpleQueue()
        self._answer: R | None = None
        self._error: Exception | None = None
        self._ready = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            threading.Thread(target=self._work, name=name, daemon=True).start()
        except RuntimeError:
            os.close(self._ready)
            raise

    def fileno(self) -> int:
        return self._ready

    def begin(self, work: W) -> None:
        self._inbox.put((work,))

    def collect(self) -> R:
        os.eventfd_read(self._ready)
        error, self._error = self._error, None
        if error is not None:
            raise error
        return cast(R, self._answer)

    def state(self) -> str:
        return ""

    def abandon(self) -> None:
        """Nothing ends a thread from outside."""

    def close(self) -> None:
        self._inbox.put(None)

    def is_gone(self) -> bool:
        return True  # what is left of it ends by itself, and is not ours to reap

    def _work(self) -> None:
        while (piece := self._inbox.get()) is not None:
            try:
                self._answer = self._run(piece[0])
            except Exception as error:
                self._error = error
            del piece  # what it holds must not live until the next one comes
            os.eventfd_write(self._ready, 1)
        os.close(self._ready)  # here, not in close(): a stuck thread would write to another file under this number


class ChildWorker:
    """A child process that runs a script, and answers messages with messages on its standard input, a socket.

    The script imports nothing of this package: `python -IS` starts it in 20 ms. It sends one message when it is ready,
    and ends at EOF. Work and answer are at most MOST_MESSAGE_BYTES long (unix(7), SOCK_SEQPACKET).
    """

    greets = True

    def __init__(self, script: Path, *arguments: str, stdout: int | None = None) -> None:
        """`stdout` becomes its standard output. Raises OSError: there is no process or descriptor to be had."""
        self._socket, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        with far:
            try:
                self._pid = os.posix_spawn(
                    sys.executable,
                    [sys.executable, "-IS", str(script), *arguments],
                    {"PATH": "/usr/bin:/bin"},
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, far.fileno(), 0),
                        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
                        if stdout is None
                        else (os.POSIX_SPAWN_DUP2, stdout, 1),
                        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                    ],
                    setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE],
                    setsigmask=[],
                )
            except OSError:
                self._socket.close()
                raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def begin(self, work: bytes) -> None:
        self._socket.send(work)

    def collect(self) -> bytes:
        try:
            answer = self._socket.recv(MOST_MESSAGE_BYTES)
        except OSError as error:
            raise WorkerEndedError(f"the worker process {self._pid} is gone: {error.strerror}") from error
        if not answer:
            raise WorkerEndedError(f"the worker process {self._pid} has ended")
        return answer

    def state(self) -> str:
        try:
            with open(f"/proc/{self._pid}/status", "rb") as file:
                return file.read(256).partition(b"\nState:\t")[2][:1].decode()
        except OSError:
            return ""

    def abandon(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        self._socket.close()

    def is_gone(self) -> bool:
        try:
            return os.waitpid(self._pid, os.WNOHANG)[0] != 0
        except ChildProcessError:
            return True
