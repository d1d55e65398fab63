"""The control socket: an asyncio server that no client can block, fill or stop.

Strategy: one callback protocol per connection, no task per client. The server carries out one request of a connection
per turn of the loop, and reads the next bytes of the connection when its answer has left the write buffer. So a client
that sends a thousand requests at once gets one answer at a time between batches of events, and the socket's own buffer
stops a client that reads nothing. Each limit and its consequence:

    connections   over 64, or over 56 of clients that may only read: refused with the reason
    call          over 128 KiB, or not JSON: answered with the reason, and closed
    idle          no whole call for 30 s: closed; a subscriber may be silent for any time
    subscriber    over 256 KiB unread: items are dropped and counted, and the next item carries the count
    stalled       an answer or item unread for 60 s: closed

Facts: umask sets the mode of the socket file, because a client could connect between bind() and chmod(). connect() to
an AF_UNIX socket needs write permission on its file (unix(7)); SO_PEERCRED names the process that connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path

from cnprocd import __version__
from cnprocd.control import access
from cnprocd.control.introspection import introspect, invalid_parameter, no_such_interface, no_such_method
from cnprocd.control.listening import listening_socket, open_to_group
from cnprocd.control.protocol import (
    EXPECTED_MORE,
    FAILED,
    INTERFACE,
    INVALID_MESSAGE,
    MAX_CALL,
    PERMISSION_DENIED,
    SERVICE,
    SOCKET_NAME,
    TOO_LONG,
    TOO_MANY_CLIENTS,
    WRONG_USAGE,
    Call,
    Decoder,
    EncodedReply,
    Failure,
    ProtocolError,
    Reply,
    method_of,
    pack,
    to_call,
)
from cnprocd.control.verb import Result, Verb, failure_of
from cnprocd.errors import EX_NOPERM, EX_SOFTWARE, EX_UNAVAILABLE, StateError
from cnprocd.json_value import JsonObject
from cnprocd.log import Log

GROUP_AGAIN_S = 10.0  # until the name service is asked again


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """The limits of one client, and of all clients together."""

    connections: int = 64
    reserved: int = 8  # of these, for clients that may change things: others cannot lock root out
    idle_s: float = 30.0
    stalled_s: float = 60.0
    unread_bytes: int = 256 * 1024


@dataclass(slots=True)
class Counters:
    """Events on the socket since the start of the daemon."""

    accepted: int = 0
    refused: int = 0
    requests: int = 0
    malformed: int = 0
    dropped_items: int = 0


class ControlServer:
    """The listening socket and its connections."""

    def __init__(
        self,
        runtime_dir: Path,
        verbs: Mapping[str, Verb],
        log: Log,
        limits: ClientLimits | None = None,
        readers_group: Callable[[], int | None] = access.readers_group,
    ) -> None:
        """`readers_group` raises OSError if the name service does not answer now."""
        self.path = runtime_dir / SOCKET_NAME
        self.methods = {method_of(name): verb for name, verb in verbs.items()}
        self.limits = limits or ClientLimits()
        self.counters = Counters()
        self.connections: set[_Connection] = set()
        self.group: int | None = None
        self._readers_group = readers_group
        self.own_uid = access.own_uid()
        self.log = log
        self._server: asyncio.AbstractServer | None = None
        self._inode: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. If that is impossible, log an error and return: events and hooks do not depend on the socket."""
        self._find_group()
        try:
            listening = listening_socket(self.path, self.group)
            self._inode = os.stat(self.path).st_ino
        except (OSError, StateError) as error:
            self.log(
                "error",
                "control_unavailable",
                path=str(self.path),
                message=f"cannot listen for cnprocctl: {error}; events and hooks are not affected",
            )
            return
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Connection(self), sock=listening, backlog=64)

    async def stop(self) -> None:
        """Close every connection, and remove the socket file if it is still the one of this server."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.abort()
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def run_task(self, answering: Coroutine[None, None, None]) -> None:
        """Run a coroutine, and keep a reference to its task until it ends."""
        task = asyncio.get_running_loop().create_task(answering)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def wanted(self, topic: str) -> bool:
        """Whether a client is subscribed to `topic`."""
        return any(connection.topic == topic for connection in self.connections)

    def publish(self, topic: str, item: JsonObject) -> None:
        """Send an item to every subscriber. Never block: skip a full subscriber, and report the count later."""
        message: bytes | None = None
        for connection in [one for one in self.connections if one.topic == topic]:
            if connection.is_full():
                connection.skipped += 1
                self.counters.dropped_items += 1
                continue
            if connection.skipped:
                connection.send(pack(Reply({**item, "skipped": connection.skipped}, continues=True)))
                connection.skipped = 0
            else:
                message = message or pack(Reply({**item, "skipped": 0}, continues=True))
                connection.send(message)

    def _find_group(self) -> None:
        """Let the members of the group connect, as soon as the name service answers."""
        try:
            self.group = self._readers_group()
        except OSError:
            asyncio.get_running_loop().call_later(GROUP_AGAIN_S, self._find_group)
            return
        if self.group is not None and self._inode is not None:
            open_to_group(self.path, self.group)


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._decoder = Decoder(MAX_CALL)
        self._transport: asyncio.Transport | None = None
        self._access = access.Access(read=False, change=False)
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._ended = False
        self.topic: str | None = None
        self.skipped = 0

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        server = self._server
        transport.set_write_buffer_limits(high=server.limits.unread_bytes, low=server.limits.unread_bytes // 4)
        try:
            peer = access.peer_of(transport.get_extra_info("socket"))
        except OSError as error:
            self._refuse(PERMISSION_DENIED, f"cannot read the credentials of the client: {error.strerror}", "")
            return
        self._access = access.access_of(peer, server.own_uid, server.group)
        if not self._access.read:
            self._refuse(PERMISSION_DENIED, self._access.refusal, "run it as root, or join the group cnprocd to read")
            return
        reserved = 0 if self._access.change else server.limits.reserved
        if len(server.connections) >= server.limits.connections - reserved:
            what = f"too many clients: {len(server.connections)} are connected"
            self._refuse(TOO_MANY_CLIENTS, what, "close some: see `ss -xp`")
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
            self._handle_soon()

    def eof_received(self) -> bool:
        """Close: reading was paused until every request had its answer, so none waits."""
        return False

    def pause_writing(self) -> None:
        """Stop carrying out requests: the client does not read."""
        if not self._ended:
            self._arm(self._server.limits.stalled_s)

    def resume_writing(self) -> None:
        if self._ended:
            return
        if self.topic is not None:
            self._disarm()
            return
        self._arm(self._server.limits.idle_s)
        self._handle_soon()

    # Called by the server.

    def is_full(self) -> bool:
        """Whether more than `unread_bytes` wait to be read by the client."""
        return (
            self._transport is not None and self._transport.get_write_buffer_size() > self._server.limits.unread_bytes
        )

    def send(self, message: bytes) -> None:
        """Queue a message for the client."""
        # asyncio logs a warning for each write to a client that is gone, until it calls connection_lost().
        if self._transport is not None and not self._ended and not self._transport.is_closing():
            self._transport.write(message)

    def abort(self) -> None:
        """Close the connection at once; unsent messages are discarded."""
        self._ended = True
        self._disarm()
        if self._transport is not None:
            self._transport.abort()

    # One request after the other. `_busy`: a request waits for its turn or for its answer, and nothing is read.

    def _handle_soon(self) -> None:
        if not self._busy and not self._ended and self._transport is not None:
            self._busy = True
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._handle_next)

    def _handle_next(self) -> None:
        self._busy = False
        if self._ended or self._transport is None:
            return
        try:
            message = self._decoder.next()
            if message is not None:
                if self.topic is not None:
                    raise ProtocolError(
                        "invalid call: this connection carries a stream", "open another connection for it"
                    )
                self._carry_out(to_call(message))
        except ProtocolError as error:
            self._server.counters.malformed += 1
            self._end_with(Failure(INVALID_MESSAGE, error.what, error.hint, error.exit_status))
            return
        if self._busy or (self.is_full() and self.topic is None):
            return  # _answer_later or resume_writing continues
        if message is not None:
            if self.topic is None:
                self._arm(self._server.limits.idle_s)
            self._handle_soon()
        elif not self._transport.is_closing():
            self._transport.resume_reading()

    def _carry_out(self, call: Call) -> None:
        self._server.counters.requests += 1
        if call.method.startswith(f"{SERVICE}."):
            self._reply(call, introspect(call, __version__))
            return
        verb = self._permitted(call)
        if isinstance(verb, Failure):
            self._reply(call, verb)
            return
        try:
            found = verb.run(call.parameters)
        except Exception as error:  # a bug behind one verb must not end the daemon's loop
            self._reply(call, self._failure(call, error))
            return
        if isinstance(found, Coroutine):
            self._busy = True
            self._disarm()
            self._server.run_task(self._reply_later(call, found))
            return
        if verb.topic is not None:
            self.topic = verb.topic
            self._disarm()
        self._reply(call, _as_reply(found, continues=verb.topic is not None))

    async def _reply_later(self, call: Call, coming: Coroutine[None, None, Result]) -> None:
        try:
            reply: Reply | EncodedReply | Failure = _as_reply(await coming)
        except Exception as error:  # as above
            reply = self._failure(call, error)
        self._busy = False
        self._reply(call, reply)
        if not self._ended and not self.is_full():  # else resume_writing continues
            self._arm(self._server.limits.idle_s)
            self._handle_soon()

    def _reply(self, call: Call, reply: Reply | EncodedReply | Failure) -> None:
        if call.oneway:
            return
        try:
            self.send(pack(reply))
        except ProtocolError as error:
            self.send(pack(Failure(TOO_LONG, error.what, error.hint, EX_UNAVAILABLE)))

    def _permitted(self, call: Call) -> Verb | Failure:
        interface, _, name = call.method.rpartition(".")
        verb = self._server.methods.get(call.method)
        if verb is None:
            known = ", ".join(sorted(method.rpartition(".")[2] for method in self._server.methods))
            return no_such_method(call.method, known) if interface == INTERFACE else no_such_interface(interface)
        if verb.changes and not self._access.change:
            return Failure(PERMISSION_DENIED, f"{name}: {self._access.refusal}", "run it as root", EX_NOPERM)
        if verb.topic is not None and (not call.more or call.oneway):
            return Failure(EXPECTED_MORE, f"{name} needs a call with `more`", "its replies do not end", WRONG_USAGE)
        unknown = next(iter(call.parameters.keys() - verb.takes), None) if verb.takes is not None else None
        if unknown is not None:
            return invalid_parameter(unknown, f"{name} takes no parameter {unknown[:40]!r}")
        return verb

    def _failure(self, call: Call, error: Exception) -> Failure:
        known = failure_of(call, error)
        if known is not None:
            return known
        self._server.log("error", "control_failed", verb=call.method, message=f"{type(error).__name__}: {error}")
        return Failure(FAILED, f"{call.method} failed: {error}", "this is a bug in cnprocd; see its log", EX_SOFTWARE)

    # Ends.

    def _refuse(self, error: str, what: str, hint: str) -> None:
        self._server.counters.refused += 1
        self._end_with(Failure(error, what, hint, EX_NOPERM if error == PERMISSION_DENIED else EX_UNAVAILABLE))

    def _end_with(self, failure: Failure) -> None:
        """Send the reason, then close. Further bytes from the client are not read."""
        self._ended = True
        self.topic = None
        if self._transport is not None:
            self._transport.write(pack(failure))
            self._transport.close()
            self._arm(self._server.limits.stalled_s)  # for a client that does not read it

    def _arm(self, after_s: float) -> None:
        self._disarm()
        self._timer = asyncio.get_running_loop().call_later(after_s, self.abort)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _as_reply(found: Result, *, continues: bool = False) -> Reply | EncodedReply:
    return found if isinstance(found, EncodedReply) else Reply(found, continues)
