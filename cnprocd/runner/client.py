"""The daemon's client of the runner: a Launcher whose hooks run in the runner service.

There is one connection. It is made when a hook is to be started and closed when none has run for a while, so that the
runner can exit. launch() never waits: it queues a frame, and all results arrive as frames. If the connection breaks,
every attempt on it counts as interrupted: its job is still in the spool and runs again (at least once).

Loop prevention: the runner sends its PID before it gets any hook, so `on_runner` can register it and its children as
hooks. Each hook's own PID is announced before the hook does anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

from cnprocd.launch.attempt import Announce, Emit, RunningAttempt
from cnprocd.launch.request import AttemptResult, Ending, LaunchRequest
from cnprocd.log import Log
from cnprocd.runner import wire

IDLE_S = 10.0  # the connection is closed after so long without a hook
_CHUNK = 1 << 18


class RemoteAttempt:
    """A hook that runs in the runner. `pid` is 0 until it is announced."""

    def __init__(self, request: LaunchRequest, announce: Announce, send: Callable[[wire.Message], None]) -> None:
        self.request = request
        self.pid = 0
        self.latency_ms: float | None = None
        self._announce = announce
        self._send = send
        self._started_s = time.monotonic()
        self._ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._emit: Emit = lambda line: None
        self._launched: Callable[[RunningAttempt], None] = lambda one: None

    @property
    def running_s(self) -> float:
        """The time since the launch, in seconds."""
        return time.monotonic() - self._started_s

    def terminate(self, grace_s: float) -> None:
        """End the attempt now: SIGTERM, and SIGKILL after `grace_s`."""
        self._send(wire.Terminate(attempt_id=self.request.attempt_id, grace_s=grace_s))

    async def wait(self, emit: Emit, launched: Callable[[RunningAttempt], None]) -> Ending:
        """Wait for the end. No frame of this attempt can arrive before: launch() returns before the loop reads."""
        self._emit, self._launched = emit, launched
        return await self._ended

    def receive(self, message: wire.FromRunner) -> bool:
        """Process a frame of this attempt. Return True if it was the last one."""
        match message:
            case wire.Announced():
                self.pid = message.hook_pid
                self._announce(message.hook_pid)
            case wire.Launched():
                self.latency_ms = message.latency_ms
                self._launched(self)
            case wire.Output():
                self._emit(message.line)
            case wire.Ended():
                self._end(Ending(message.result(), interrupted=message.interrupted))
                return True
            case wire.NotNow():
                self._end(Ending(AttemptResult(message.reason), not_started=True))
                return True
        return False

    def lose(self, reason: str, *, sent: bool) -> None:
        """End the attempt because the connection broke. `sent`: the runner may have started the hook."""
        result = AttemptResult(reason, duration_ms=round(self.running_s * 1e3, 3))
        self._end(Ending(result, interrupted=sent, not_started=not sent))

    def _end(self, ending: Ending) -> None:
        if not self._ended.done():
            self._ended.set_result(ending)


class RunnerClient:
    """A Launcher over the runner's socket. `on_runner` gets the runner's PID before any hook is sent."""

    def __init__(self, path: Path, log: Log, on_runner: Callable[[int], None]) -> None:
        self._path = path
        self._log = log
        self._on_runner = on_runner
        self._loop = asyncio.get_running_loop()
        self._attempts: dict[str, RemoteAttempt] = {}
        self._socket: socket.socket | None = None
        self._greeted = False
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._unsent: list[wire.Message] = []  # until the runner's hello has arrived
        self._idle: asyncio.TimerHandle | None = None

    def prepare(self, *, soon: bool = False) -> None:
        """Do nothing: systemd holds the socket."""

    def close(self) -> None:
        self._disconnect("cnprocd stops")

    def launch(self, request: LaunchRequest, announce: Announce) -> RemoteAttempt:
        """Send an attempt to the runner. Raises OSError if the runner cannot be reached now.

        Neither the hook nor the user is sent: the runner takes both from its own rules.
        """
        if self._socket is None:
            self._connect()
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        attempt = RemoteAttempt(request, announce, self._send)
        self._attempts[request.attempt_id] = attempt
        self._send(
            wire.Run(
                attempt_id=request.attempt_id,
                attempt=request.attempt,
                rule=request.rule,
                job_id=request.job_id,
                limit_s=request.limit_s,
                kernel_time_ns=request.kernel_time_ns,
                events=request.events,
            )
        )
        return attempt

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
        self._unsent.clear()
        lost, self._attempts = list(self._attempts.values()), {}
        for attempt in lost:
            attempt.lose(reason, sent=self._greeted)

    def _send(self, message: wire.Message) -> None:
        if self._socket is None:
            return
        if not self._greeted:
            self._unsent.append(message)
            return
        self._outgoing += wire.frame(message)
        self._flush()

    def _flush(self) -> None:
        """Write as much as the socket accepts now, and the rest when it is writable again."""
        assert self._socket is not None
        self._loop.remove_writer(self._socket)
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._flush)
        except OSError:
            pass  # the next read reports the error, after the frames that arrived before it

    def _on_readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._disconnect(f"connection to the runner lost: {error.strerror}")
            return
        if not data:
            self._disconnect("the runner closed the connection")
            return
        self._incoming += data
        try:
            for body in wire.bodies(self._incoming):
                self._receive(wire.from_runner(body))
        except wire.WireError as error:
            self._log("error", "runner_protocol", message=f"protocol error from the runner: {error}")
            self._disconnect(f"protocol error from the runner: {error}")

    def _receive(self, message: wire.FromRunner) -> None:
        if isinstance(message, wire.Hello):
            self._greet(message)
            return
        attempt = self._attempts.get(message.attempt_id)
        if attempt is not None and attempt.receive(message):
            del self._attempts[message.attempt_id]
            if not self._attempts:
                self._idle = self._loop.call_later(IDLE_S, self._disconnect, "idle")

    def _greet(self, hello: wire.Hello) -> None:
        if hello.version != wire.VERSION:
            raise wire.WireError(f"its version is {hello.version}, the daemon's is {wire.VERSION}; restart both")
        self._on_runner(hello.pid)
        self._greeted = True
        unsent, self._unsent = self._unsent, []
        for message in unsent:
            with contextlib.suppress(OSError):
                self._send(message)
