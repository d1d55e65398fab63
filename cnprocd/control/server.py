"""The control socket: an asyncio server that no client can block, fill or kill.

Strategy: one callback protocol per connection, no task per client. A connection is read only while nothing of it waits:
one request is carried out per turn of the loop, and the next bytes are read when its answer has left our buffer. So a
client that sends a thousand requests at once gets one at a time between batches of events, and one that reads nothing
is stopped by the socket's own buffer. Limits, each with its answer:

    connections   over 64, or over 56 of who may only read: refused with the reason
    frame         over 1 MiB, or not JSON: told why, and closed
    idle          no whole request for 30 s: closed; a subscriber may be silent for ever
    subscriber    over 256 KiB unread: items are dropped and counted, and the next item says how many
    stalled       an answer or item that nobody reads for 60 s: closed

Facts: the socket's mode is set by umask before anyone can connect, because between bind() and chmod() there is a gap.
AF_UNIX connect() needs write permission on the socket; the kernel checks it, and SO_PEERCRED tells who passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path

from cnprocd.control import access
from cnprocd.control.protocol import (
    SOCKET_NAME,
    WRONG_USAGE,
    Answer,
    Decoder,
    Failure,
    Item,
    ProtocolError,
    Request,
    Value,
    pack,
    to_request,
)
from cnprocd.errors import EX_NOPERM, EX_SOFTWARE, EX_UNAVAILABLE, CnprocdError, StateError
from cnprocd.log import Log

Args = Mapping[str, Value]


class VerbError(CnprocdError):
    """A request cannot be carried out; `details` goes to the client as it is."""

    def __init__(self, what: str, hint: str = "", status: int = WRONG_USAGE, **details: Value) -> None:
        super().__init__(what, hint)
        self.exit_status = status
        self.details = details


@dataclass(frozen=True, slots=True)
class Verb:
    """What the daemon does for a client. `changes`: only root and the daemon's own user may. `topic`: a stream.

    What `run` returns is the answer, or a coroutine that will: until then nothing else of this client is read.
    """

    run: Callable[[Args], Value | Coroutine[None, None, Value]]
    changes: bool = False
    topic: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client, and all of them together, may take."""

    connections: int = 64
    reserved: int = 8  # of these for who may change things: readers cannot lock root out
    idle_s: float = 30.0
    stalled_s: float = 60.0
    unread_bytes: int = 256 * 1024


@dataclass(slots=True)
class Counters:
    """What happened on the socket since start."""

    accepted: int = 0
    refused: int = 0
    requests: int = 0
    malformed: int = 0
    dropped_items: int = 0


class ControlServer:
    """The daemon's ear for cnprocctl."""

    def __init__(self, runtime_dir: Path, verbs: Mapping[str, Verb], log: Log, limits: Limits | None = None) -> None:
        self.path = runtime_dir / SOCKET_NAME
        self.verbs = verbs
        self.limits = limits or Limits()
        self.counters = Counters()
        self.connections: set[_Connection] = set()
        self.group = access.readers_group()
        self.own_uid = access.own_uid()
        self.log = log
        self._server: asyncio.AbstractServer | None = None
        self._inode: int | None = None
        self._attended: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. A socket that cannot be had is said and done without: the daemon's work is the rest."""
        try:
            listening = self._bind()
        except (OSError, StateError) as error:
            self.log(
                "error",
                "control_unavailable",
                path=str(self.path),
                message=f"no control socket: {error}; events and hooks are not affected",
            )
            return
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Connection(self), sock=listening, backlog=64)

    async def stop(self) -> None:
        """Hang up on everybody, and take the socket away if it is still ours."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.hang_up()
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def attend(self, answering: Coroutine[None, None, None]) -> None:
        """See to it that an answer which takes its time is given."""
        task = asyncio.get_running_loop().create_task(answering)
        self._attended.add(task)
        task.add_done_callback(self._attended.discard)

    def wanted(self, topic: str) -> bool:
        """Whether anybody subscribed to `topic`."""
        return any(connection.topic == topic for connection in self.connections)

    def publish(self, topic: str, data: Value) -> None:
        """Give an item to whoever subscribed. Never blocks: who does not keep up misses it, and is told."""
        frame: bytes | None = None
        for connection in [one for one in self.connections if one.topic == topic]:
            if connection.is_full():
                connection.skipped += 1
                self.counters.dropped_items += 1
                continue
            if connection.skipped:
                connection.send(pack(Item(data, connection.skipped)))
                connection.skipped = 0
            else:
                frame = frame or pack(Item(data))
                connection.send(frame)

    def _bind(self) -> socket.socket:
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._clear_stale()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        umask = os.umask(0o177)
        try:
            listening.bind(str(self.path))
        except OSError:
            listening.close()
            raise
        finally:
            os.umask(umask)
        if self.group is not None:
            self._open_to_group(self.group)
        self._inode = os.stat(self.path).st_ino
        return listening

    def _open_to_group(self, group: int) -> None:
        """Members may connect. Where that is not permitted the owner alone can use it, which is safe.

        As a service the group is ours already, and chown(2) is not among the system calls we may make.
        """
        if os.stat(self.path).st_gid != group:
            try:
                os.chown(self.path, -1, group)
            except PermissionError:
                return
        os.chmod(self.path, 0o660)

    def _clear_stale(self) -> None:
        """Remove the socket of a daemon that died; leave alone the one of a daemon that lives."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(str(self.path))
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.ECONNREFUSED:  # EAGAIN: its backlog is full, so it lives
                    raise StateError(f"{self.path}: {error.strerror}", "another file is in the way") from error
                if not stat.S_ISSOCK(os.lstat(self.path).st_mode):  # a plain file refuses a connection, too
                    raise StateError(f"{self.path} is not a socket", "another file is in the way") from error
                os.unlink(self.path)
                return
        raise StateError(f"another cnprocd listens on {self.path}", "stop it, or give this one its own --runtime-dir")


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._access = access.Access(read=False, change=False)
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False
        self._ended = False
        self.topic: str | None = None
        self.skipped = 0

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        server = self._server
        transport.set_write_buffer_limits(high=server.limits.unread_bytes, low=server.limits.unread_bytes // 4)
        try:
            peer = access.peer_of(transport.get_extra_info("socket"))
        except OSError as error:
            self._refuse(f"the kernel does not tell who you are ({error.strerror})", "")
            return
        self._access = access.judge(peer, server.own_uid, server.group)
        if not self._access.read:
            self._refuse(self._access.refusal, "run it as root, or join the group cnprocd to read")
            return
        reserved = 0 if self._access.change else server.limits.reserved
        if len(server.connections) >= server.limits.connections - reserved:
            self._refuse(f"{len(server.connections)} clients are connected already", "close some: see `ss -xp`")
            return
        server.connections.add(self)
        server.counters.accepted += 1
        self._arm(server.limits.idle_s)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        self._server.connections.discard(self)
        self._disarm()

    def data_received(self, data: bytes) -> None:
        if not self._ended:
            self._decoder.feed(data)
            self._pump_soon()

    def eof_received(self) -> bool:
        """Nothing more comes. Reading was paused until all that was asked had been answered, so close."""
        return False

    def pause_writing(self) -> None:
        """The client does not read: nothing more is carried out for it."""
        if not self._ended:
            self._arm(self._server.limits.stalled_s)

    def resume_writing(self) -> None:
        if self._ended:
            return
        if self.topic is not None:
            self._disarm()
            return
        self._arm(self._server.limits.idle_s)
        self._pump_soon()

    # What the server calls.

    def is_full(self) -> bool:
        """Whether more than its share waits to be read by it."""
        return (
            self._transport is not None and self._transport.get_write_buffer_size() > self._server.limits.unread_bytes
        )

    def send(self, frame: bytes) -> None:
        # A client that went away is told of by connection_lost() in a moment; asyncio would grumble till then.
        if self._transport is not None and not self._ended and not self._transport.is_closing():
            self._transport.write(frame)

    def hang_up(self) -> None:
        self._ended = True
        self._disarm()
        if self._transport is not None:
            self._transport.abort()

    # One request after the other.

    def _pump_soon(self) -> None:
        if not self._pumping and not self._ended and self._transport is not None:
            self._pumping = True
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        if self._ended or self._transport is None:
            return
        try:
            frame = self._decoder.next()
            if frame is not None:
                if self.topic is not None:
                    raise ProtocolError("this connection carries a stream", "open another one for other requests")
                self._carry_out(to_request(frame))
        except ProtocolError as error:
            self._server.counters.malformed += 1
            self._end_with(Failure(error.what, error.hint, error.exit_status))
            return
        if self._pumping or (self.is_full() and self.topic is None):
            return  # _answer_later or resume_writing goes on
        if frame is not None:
            if self.topic is None:
                self._arm(self._server.limits.idle_s)
            self._pump_soon()
        elif not self._transport.is_closing():
            self._transport.resume_reading()

    def _carry_out(self, request: Request) -> None:
        self._server.counters.requests += 1
        verb = self._permitted(request)
        if isinstance(verb, Failure):
            self._answer(verb)
            return
        try:
            data = verb.run(request.args)
        except Exception as error:  # a bug behind one verb must not end the daemon's loop
            self._answer(self._failure(request, error))
            return
        if isinstance(data, Coroutine):
            self._pumping = True  # as if a turn were under way: nothing is read, and no turn begins
            self._disarm()
            self._server.attend(self._answer_later(request, data))
            return
        if verb.topic is not None:
            self.topic = verb.topic
            self._disarm()
        self._answer(Answer(data))

    async def _answer_later(self, request: Request, coming: Coroutine[None, None, Value]) -> None:
        try:
            reply: Answer | Failure = Answer(await coming)
        except Exception as error:  # as above
            reply = self._failure(request, error)
        self._pumping = False
        self._answer(reply)
        if not self._ended and not self.is_full():  # else resume_writing goes on
            self._arm(self._server.limits.idle_s)
            self._pump_soon()

    def _answer(self, reply: Answer | Failure) -> None:
        try:
            self.send(pack(reply))
        except ProtocolError as error:
            self.send(pack(Failure(error.what, error.hint, EX_UNAVAILABLE)))

    def _permitted(self, request: Request) -> Verb | Failure:
        verb = self._server.verbs.get(request.verb)
        if verb is None:
            known = ", ".join(sorted(self._server.verbs))
            return Failure(f"the daemon does not know {request.verb[:40]!r}", f"it knows: {known}", WRONG_USAGE)
        if verb.changes and not self._access.change:
            return Failure(f"{request.verb}: {self._access.refusal}", "run it as root", EX_NOPERM)
        return verb

    def _failure(self, request: Request, error: Exception) -> Failure:
        if isinstance(error, VerbError):
            return Failure(error.what, error.hint, error.exit_status, error.details)
        if isinstance(error, CnprocdError):
            return Failure(error.what, error.hint, error.exit_status)
        self._server.log("error", "control_failed", verb=request.verb, message=f"{type(error).__name__}: {error}")
        return Failure(f"{request.verb} failed: {error}", "this is a bug of cnprocd; see its log", EX_SOFTWARE)

    # Ends.

    def _refuse(self, what: str, hint: str) -> None:
        self._server.counters.refused += 1
        self._end_with(Failure(what, hint, EX_NOPERM if not self._access.read else EX_UNAVAILABLE))

    def _end_with(self, failure: Failure) -> None:
        """Say why, then close; what the client still sends is not read."""
        self._ended = True
        self.topic = None
        if self._transport is not None:
            self._transport.write(pack(failure))
            self._transport.close()
            self._arm(self._server.limits.stalled_s)  # for one that does not even read that

    def _arm(self, after_s: float) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(after_s, self.hang_up)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
