"""The daemon's client of the runner: a Launcher whose hooks run in the runner service.

There is one connection. It is made when a hook is to be started and closed when none has run for a while, so that the
runner can exit. launch() never waits: it queues a frame, and all results arrive as frames.

The runner's hooks outlive a connection and this daemon. If the connection breaks, a new one is made, and each attempt
is resumed by its id. If that fails for RESUME_S, the attempts count as interrupted: their jobs are still in the spool
and run again (at least once).

The runner owes its hello within ANSWER_S of a launch, an answer within ANSWER_S of each hook that is sent, and the end
within END_MARGIN_S of an attempt's time limit. If it is late, the attempt takes no slot any more and is resumed: the
runner answers how it ended, or that it was interrupted. If the runner sends nothing at all, no hook is sent to it until
it does. So no hook runs twice when it comes back.

Loop prevention: the runner sends its PID before it gets any hook, so `on_runner` can register it and its children as
hooks. Each hook's own PID is announced before the hook does anything.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Collection
from pathlib import Path

from cnprocd.edge import EdgeState
from cnprocd.errors import CnprocdError
from cnprocd.launch.attempt import TERM_GRACE_S, Announce, Emit, RunningAttempt
from cnprocd.launch.group import Root
from cnprocd.launch.request import AttemptResult, Ending, LaunchRequest
from cnprocd.launch.spawn import ReadyHook
from cnprocd.log import Log, ThrottledLog
from cnprocd.runner import wire
from cnprocd.runner.run_frame import run_of

IDLE_S = 10.0  # the connection is closed after so long without a hook
RESUME_S = 10.0
RETRY_S = 0.1  # between two connects, while attempts are to be resumed
ANSWER_S = 5.0
END_MARGIN_S = 10.0  # behind time limit and TERM_GRACE_S
LATE_S = 60.0  # how long a late answer about a snapshot counts
REPORT_EVERY_S = 10.0
SILENT = "the runner does not answer"
_CHUNK = 1 << 18


class RemoteAttempt:
    """A hook that runs in the runner. `pid` is 0 until it is announced."""

    def __init__(
        self,
        request: LaunchRequest,
        announce: Announce,
        send: Callable[[wire.Message], None],
        overdue: Callable[[RemoteAttempt], None],
    ) -> None:
        self.request = request
        self.pid = 0
        self.start_ticks: int | None = None  # the runner finds its hooks by their attempt ids
        self.latency_ms: float | None = None
        self._announce = announce
        self._send = send
        self.sent = False  # the runner may have it
        self.order: wire.Terminate | None = None  # to end it
        self.silent = False
        self._overdue = overdue
        self._timer: asyncio.TimerHandle | None = None
        self._started_s = time.monotonic()
        self._ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._early: list[wire.FromRunner] | None = []  # frames that arrived before `wait`

    @property
    def running_s(self) -> float:
        """The time since the launch, in seconds."""
        return time.monotonic() - self._started_s

    def terminate(self, grace_s: float) -> None:
        """End the attempt now: SIGTERM, and SIGKILL after `grace_s`. A new connection asks for it again."""
        self.order = wire.Terminate(attempt_id=self.request.attempt_id, grace_s=grace_s)
        self._send(self.order)

    async def wait(self, emit: Emit, launched: Callable[[RunningAttempt], None]) -> Ending:
        """Wait for the end. Frames can arrive before, if the loop had the connection to read when the hook was sent."""
        self._emit, self._launched = emit, launched
        early, self._early = self._early or (), None
        for message in early:
            self.receive(message)
        return await self._ended

    def expect_answer(self, within_s: float) -> None:
        """Call `overdue` if no frame about the progress of this attempt arrives in time."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._ended.done():
            self._timer = asyncio.get_running_loop().call_later(within_s, self._overdue, self)

    def receive(self, message: wire.FromRunner) -> bool:
        """Process a frame of this attempt. Return True if it was the last one."""
        self.silent = False
        match message:
            case wire.Announced():
                self.pid = message.hook_pid
                self._announce(message.hook_pid)
                self.expect_answer(self.request.limit_s + TERM_GRACE_S + END_MARGIN_S)
            case wire.Launched() | wire.Output() if self._early is not None:
                self._early.append(message)
            case wire.Launched():
                self.latency_ms = message.latency_ms
                self._launched(self)
            case wire.Output():
                self._emit(message.line)
            case wire.Ended():
                self._end(Ending(message.result(), interrupted=message.interrupted))
                return True
            case wire.NotNow():
                result = AttemptResult(message.reason)
                lacking, alone = message.no_snapshot, message.this_job
                self._end(Ending(result, not_started=True, no_snapshot=lacking, this_job=alone))
                return True
        return False

    def lose(self, reason: str) -> None:
        """End the attempt because the runner cannot be reached."""
        result = AttemptResult(reason, duration_ms=round(self.running_s * 1e3, 3))
        self._end(Ending(result, interrupted=self.sent, not_started=not self.sent))

    def leave(self, reason: str) -> None:
        """End the wait, not the hook: the next daemon resumes the attempt."""
        self._end(Ending(AttemptResult(reason), not_started=not self.sent, left_running=self.sent))

    def _end(self, ending: Ending) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._ended.done():
            self._ended.set_result(ending)


class RunnerClient:
    """A Launcher over the runner's socket. `on_runner` gets the runner's PID before any hook is sent."""

    outlives_daemon = True
    observes_only = False

    def __init__(self, path: Path, log: Log, on_runner: Callable[[int], None]) -> None:
        self.edges: list[EdgeState] = []
        self._path = path
        self._log = log
        self._on_runner = on_runner
        self._loop = asyncio.get_running_loop()
        self._attempts: dict[str, RemoteAttempt] = {}
        self._snapshot: asyncio.Future[str] | None = None
        self._wanted = ""  # the digest of that snapshot
        self._accepted_late: tuple[str, float] | None = None  # the digest of one for which no caller waited any more
        self._socket: socket.socket | None = None
        self._greeted = False
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._unsent: list[wire.Message] = []  # until the runner's hello has arrived
        self._to_resume: set[str] = set()
        self._resume_until_s = 0.0
        self._timer: asyncio.TimerHandle | None = None  # to disconnect, or to connect again
        self._silence = ThrottledLog(log, REPORT_EVERY_S)
        self._heard_s = 0.0  # when the runner last sent anything
        self.ready = True  # the runner is not silent
        self.on_ready: Callable[[], None] = lambda: None

    def prepare(self, *, soon: bool = False) -> None:
        """Do nothing: systemd holds the socket."""

    def close(self) -> None:
        """Disconnect. Hooks that the runner has started run on; the next daemon resumes them."""
        attempts, self._attempts = list(self._attempts.values()), {}
        self._silence.flush(self._loop.time())
        self._disconnect("cnprocd stops")
        for attempt in attempts:
            attempt.leave("cnprocd stops")

    def make_ready(self, request: LaunchRequest) -> None:
        """Do nothing: the runner prepares a hook."""

    def launch(self, request: LaunchRequest, announce: Announce, ready: ReadyHook | None = None) -> RemoteAttempt:
        """Send an attempt to the runner. Raises OSError if the runner cannot be reached now.

        Neither the hook nor the user is sent: the runner takes both from its own snapshot of the rules. Raises
        HookRefusedError if the runner would not accept the frame.
        """
        message = run_of(request)
        if self._socket is None:
            self._connect()
        attempt = self._attempts[request.attempt_id] = RemoteAttempt(request, announce, self._send, self._note_overdue)
        self._send(message)
        if not attempt.sent:
            attempt.expect_answer(ANSWER_S)  # to the daemon's hello
        return attempt

    async def end_leftover(self, root: Root, found: Callable[[], None]) -> None:
        """Raise OSError: hooks of the runner are resumed, and the runner ends what is left of one."""
        raise OSError("cannot end a hook of the runner")

    def resume(self, request: LaunchRequest, announce: Announce) -> RemoteAttempt:
        """Return an attempt that an earlier daemon sent to the runner: it runs, has ended, or was interrupted."""
        attempt = self._attempts[request.attempt_id] = RemoteAttempt(request, announce, self._send, self._note_overdue)
        attempt.expect_answer(TERM_GRACE_S + END_MARGIN_S)  # the runner may have to end what is left of it
        attempt.sent = True
        if self._greeted:
            self._send(wire.Resume(attempt_id=request.attempt_id))
        else:
            self._resume_later([attempt])
        return attempt

    async def take_snapshot(self, wanted: str, keep: Collection[str] | None) -> str:
        """Let the runner put the snapshot of the rule files in force if its digest is `wanted`. Return their digest.

        An answer that came after the caller's patience counts for the next call: on a machine that is busy for long, no
        snapshot would be accepted else. Raises OSError if the runner cannot be reached, and SnapshotRefusedError if it
        cannot read the rule files.
        """
        late, self._accepted_late = self._accepted_late, None
        if late is not None and late[0] == wanted and self._loop.time() - late[1] < LATE_S:
            return wanted
        if self._socket is None:
            self._connect()
        answer: asyncio.Future[str] = self._loop.create_future()
        self._snapshot, self._wanted = answer, wanted
        kept = None if keep is None else list(keep)[: wire.MOST_SNAPSHOTS]
        self._send(wire.TakeSnapshot(wanted=wanted, keep=kept))
        try:
            return await answer
        finally:
            self._snapshot = None
            self._wait_for_idle()

    # -- the connection ------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(str(self._path))  # never waits: a full backlog is EAGAIN
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot reach the runner at {self._path}: {error.strerror}") from error
        self._socket, self._greeted = sock, False
        self._heard_s = self._loop.time()
        self._incoming.clear()
        self._outgoing[:] = wire.frame(wire.Hello(version=wire.VERSION))
        self._loop.add_reader(sock, self._on_readable)
        self._flush()

    def _disconnect(self, reason: str) -> None:
        """Close the connection. Attempts that the runner may have are resumed; the others have not started."""
        self._set_timer(None)
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket, self._greeted = None, False
        self._unsent.clear()
        self._answers_again()
        if self._snapshot is not None and not self._snapshot.done():
            self._snapshot.set_exception(OSError(reason))
        for attempt in list(self._attempts.values()):
            if not attempt.sent:
                del self._attempts[attempt.request.attempt_id]
                attempt.lose(reason)
        if self._attempts:
            self._resume_later(self._attempts.values())

    def _resume_later(self, attempts: Collection[RemoteAttempt]) -> None:
        if not self._to_resume:
            self._resume_until_s = self._loop.time() + RESUME_S
        self._to_resume.update(attempt.request.attempt_id for attempt in attempts)
        if self._socket is None:
            self._set_timer(self._loop.call_later(RETRY_S, self._reconnect))

    def _reconnect(self) -> None:
        if self._socket is not None:
            return
        try:
            self._connect()
        except OSError as error:
            if self._loop.time() < self._resume_until_s:
                self._set_timer(self._loop.call_later(RETRY_S, self._reconnect))
            else:
                self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        lost = [self._attempts.pop(one) for one in self._to_resume if one in self._attempts]
        self._to_resume.clear()
        for attempt in lost:
            attempt.lose(reason)

    def _send(self, message: wire.Message) -> None:
        if self._socket is None:
            return
        if not self._greeted:
            self._unsent.append(message)
            return
        if isinstance(message, wire.Run):
            attempt = self._attempts[message.attempt_id]
            attempt.sent = True
            attempt.expect_answer(ANSWER_S)
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
        self._heard_s = self._loop.time()
        self._answers_again()
        try:
            for body in wire.bodies(self._incoming):
                self._receive(wire.from_runner(body))
        except wire.WireError as error:
            self._log("error", "runner_protocol", message=f"protocol error from the runner: {error}")
            self._disconnect(f"protocol error from the runner: {error}")

    def _receive(self, message: wire.FromRunner) -> None:
        if isinstance(message, wire.Hello):
            self._greet(message)
        elif isinstance(message, wire.SnapshotTaken):
            self._take_answer(message)
        else:
            attempt = self._attempts.get(message.attempt_id)
            if attempt is not None and attempt.receive(message):
                del self._attempts[message.attempt_id]
                self._wait_for_idle()

    def _take_answer(self, message: wire.SnapshotTaken) -> None:
        # The answer to an earlier request can be late: it may name the wanted files, of which no snapshot was taken.
        if self._snapshot is None or self._snapshot.done() or message.wanted != self._wanted:
            if message.digest == message.wanted:
                self._accepted_late = message.wanted, self._loop.time()
            return
        self._accepted_late = None
        if message.digest is None:
            self._snapshot.set_exception(SnapshotRefusedError(message.error or "no reason was given"))
        else:
            self._snapshot.set_result(message.digest)

    def _wait_for_idle(self) -> None:
        if self._socket is not None and not self._attempts and self._snapshot is None:
            self._set_timer(self._loop.call_later(IDLE_S, self._disconnect_if_idle))

    def _disconnect_if_idle(self) -> None:
        if not self._attempts and self._snapshot is None:
            self._disconnect("idle")

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer

    def _greet(self, hello: wire.Hello) -> None:
        if hello.version != wire.VERSION:
            raise wire.WireError(f"its version is {hello.version}, the daemon's is {wire.VERSION}; restart both")
        self._on_runner(hello.pid)
        self._greeted = True
        unsent = [*(wire.Resume(attempt_id=one) for one in self._to_resume), *self._unsent]
        orders = [one.order for one in self._attempts.values() if one.sent and one.order is not None]
        self._to_resume.clear()
        self._unsent.clear()
        for message in (*unsent, *orders):
            self._send(message)

    # -- silence -------------------------------------------------------------------------------------------------

    def _note_overdue(self, attempt: RemoteAttempt) -> None:
        """Free the slot of an attempt about which the runner is late, and ask about it, or let its job wait."""
        request, now_s, asked = attempt.request, self._loop.time(), attempt.silent
        self.ready = self.ready and now_s - self._heard_s < ANSWER_S
        attempt.silent = True
        text = f"{SILENT}: job {request.job_id}, attempt {request.attempt_id}"
        self._silence.add(
            "error", "runner_silent", now_s, {"count": 1}, text, job_id=request.job_id, attempt_id=request.attempt_id
        )
        if attempt.sent:
            if self._greeted and (self.ready or not asked):  # else it is asked already, or will be after the greeting
                self._send(wire.Resume(attempt_id=request.attempt_id))
            attempt.expect_answer(TERM_GRACE_S + END_MARGIN_S)
        else:
            del self._attempts[request.attempt_id]
            self._unsent = [one for one in self._unsent if getattr(one, "attempt_id", None) != request.attempt_id]
            attempt.lose(SILENT)
        if self.ready:
            self.on_ready()

    def _answers_again(self) -> None:
        if not self.ready:
            self.ready = True
            self._silence.flush(self._loop.time())
            self._loop.call_soon(self.on_ready)


class SnapshotRefusedError(CnprocdError):
    """The runner cannot read the rule files, or cannot store their snapshot."""
