"""The reader's way to the runner service: a Launcher whose hooks run in another process.

Strategy: one connection, made when a hook is wanted and closed when none has run for a while, so that the runner can go
too. launch() never waits: it queues a frame, and everything else comes as frames. When the connection breaks, every try
on it counts as interrupted: the job is still in our spool and runs again (at least once).

Loop prevention: the runner says its PID before it is told of any hook, so that `on_runner` can make it a root of the
family of hooks; each hook's own PID is announced before the hook does anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from pathlib import Path

from cnprocd.launch.attempt import Emit, Ending, Running
from cnprocd.log import Log
from cnprocd.runner import wire
from cnprocd.spool.job import Attempt, HookSpec, Identity, Job

IDLE_S = 10.0  # without a hook, then the connection is closed
_CHUNK = 1 << 18


class RemoteTry:
    """A hook that runs in the runner service. `pid` is 0 until it is announced."""

    def __init__(self, job: Job, spec: HookSpec, try_id: int, send: Callable[[wire.Message], None]) -> None:
        self.job = job
        self.spec = spec
        self.pid = 0
        self.latency_ms: float | None = None
        self.try_id = try_id
        self.announce: Callable[[int], None] = lambda pid: None
        self._send = send
        self._since = time.monotonic()
        self._ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._emit: Emit = lambda line: None
        self._launched: Callable[[Running], None] = lambda one: None

    @property
    def running_s(self) -> float:
        """How long it runs by now."""
        return time.monotonic() - self._since

    def cut(self, grace_s: float) -> None:
        """End it now."""
        self._send(wire.Cut(try_id=self.try_id, grace_s=grace_s))

    async def attend(self, emit: Emit, launched: Callable[[Running], None]) -> Ending:
        """Wait for the runner's verdict. No frame of this try can have come before this is called: see launch()."""
        self._emit, self._launched = emit, launched
        return await self._ended

    def hear(self, message: wire.FromRunner) -> bool:
        """Take a frame about this try; True when it was the last."""
        match message:
            case wire.Announced():
                self.pid = message.hook_pid
                self.announce(message.hook_pid)
            case wire.Launched():
                self.latency_ms = message.latency_ms
                self._launched(self)
            case wire.Output():
                self._emit(message.line)
            case wire.Ended():
                self._end(Ending(message.attempt(), interrupted=message.interrupted))
                return True
            case wire.NotNow():
                self._end(Ending(Attempt(message.reason), not_started=True))
                return True
        return False

    def lose(self, reason: str, *, told: bool) -> None:
        """The runner is gone, and the hook with it, if it was `told` of it at all."""
        attempt = Attempt(reason, duration_ms=round(self.running_s * 1e3, 3))
        self._end(Ending(attempt, interrupted=told, not_started=not told))

    def _end(self, ending: Ending) -> None:
        if not self._ended.done():
            self._ended.set_result(ending)


class Remote:
    """A Launcher over the runner service's socket."""

    def __init__(self, path: Path, log: Log, on_runner: Callable[[int], None]) -> None:
        self._path = path
        self._log = log
        self._on_runner = on_runner
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._tries: dict[int, RemoteTry] = {}
        self._socket: socket.socket | None = None
        self._greeted = False
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._waiting: list[wire.Message] = []  # until the runner has said who it is
        self._idle: asyncio.TimerHandle | None = None

    def prepare(self, *, soon: bool = False) -> None:
        """Nothing to keep ready: systemd holds the socket."""

    def close(self) -> None:
        self._disconnect("cnprocd stops")

    def launch(
        self,
        job: Job,
        spec: HookSpec,
        who: Identity,
        attempt_id: str,
        *,
        limit_s: float,
        announce: Callable[[int], None],
    ) -> RemoteTry:
        """Hand a try to the runner. Raises OSError: the runner cannot be reached, now.

        `who` is not sent: the runner asks its own rules whom to become.
        """
        if self._socket is None:
            self._connect()
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        one = RemoteTry(job, spec, next(self._ids), self._send)
        one.announce = announce
        self._tries[one.try_id] = one
        self._send(
            wire.Run(
                try_id=one.try_id,
                rule=job.rule,
                job_id=job.job_id,
                attempts=job.attempts,
                attempt_id=attempt_id,
                limit_s=limit_s,
                kernel_time_ns=job.kernel_time_ns,
                events=[dict(event) for event in job.events],
            )
        )
        return one

    # -- the connection ------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(str(self._path))  # never waits: a full backlog is EAGAIN
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot reach the runner at {self._path}: {error.strerror}") from error
        self._socket, self._greeted = sock, False
        self._incoming.clear()
        self._outgoing[:] = wire.frame(wire.Hello(version=wire.VERSION))
        self._loop.add_reader(sock, self._on_readable)
        self._flush()

    def _disconnect(self, reason: str) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None
        self._waiting.clear()
        lost, self._tries = list(self._tries.values()), {}
        for one in lost:
            one.lose(reason, told=self._greeted)

    def _send(self, message: wire.Message) -> None:
        if self._socket is None:
            return
        if not self._greeted:
            self._waiting.append(message)
            return
        self._outgoing += wire.frame(message)
        self._flush()

    def _flush(self) -> None:
        """Write what the socket takes; the rest when it takes more."""
        assert self._socket is not None
        self._loop.remove_writer(self._socket)
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._flush)
        except OSError:
            pass  # reading tells of the end, in order with what came before it

    def _on_readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._disconnect(f"the runner is gone: {error.strerror}")
            return
        if not data:
            self._disconnect("the runner is gone")
            return
        self._incoming += data
        try:
            for body in wire.bodies(self._incoming):
                self._hear(wire.from_runner(body))
        except wire.WireError as error:
            self._log("error", "runner_protocol", message=f"the runner speaks another language: {error}")
            self._disconnect(f"the runner speaks another language: {error}")

    def _hear(self, message: wire.FromRunner) -> None:
        if isinstance(message, wire.Hello):
            self._greet(message)
            return
        one = self._tries.get(message.try_id)
        if one is not None and one.hear(message):
            del self._tries[message.try_id]
            if not self._tries:
                self._idle = self._loop.call_later(IDLE_S, self._disconnect, "idle")

    def _greet(self, hello: wire.Hello) -> None:
        if hello.version != wire.VERSION:
            raise wire.WireError(f"version {hello.version}, ours is {wire.VERSION}")
        self._on_runner(hello.pid)
        self._greeted = True
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            with contextlib.suppress(OSError):
                self._send(message)
