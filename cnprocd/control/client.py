"""The client of the control socket: blocking, for command lines.

Each failure is an error with a hint: no daemon, no permission, another version, no answer in time. If the daemon is
stopped (SIGSTOP), the kernel still accepts connections and no answer comes, so everything but a stream has a timeout.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from cnprocd.control.protocol import (
    SOCKET_NAME,
    Answer,
    Decoder,
    Failure,
    Item,
    ProtocolError,
    Request,
    pack,
    to_reply,
)
from cnprocd.errors import EX_OSERR, EX_UNAVAILABLE, CnprocdError, PrivilegeError
from cnprocd.json_value import JsonValue

TIMEOUT_S = 15.0
_CHUNK = 1 << 16


class NotRunningError(CnprocdError):
    """No daemon answers on the control socket."""

    exit_status = EX_UNAVAILABLE


class RefusedError(CnprocdError):
    """The daemon refused the request. `details` has the further facts of its answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.what, failure.hint)
        self.details = failure.details
        self.exit_status = failure.status or EX_OSERR

    def render(self, prefix: str = "") -> str:
        """Return the daemon's own rendering if it sent one (the problems of rule files), with its hint below."""
        rendered = self.details.get("rendered")
        if not isinstance(rendered, str):
            return super().render(prefix)
        return f"{rendered}\n{prefix}{self.hint}" if self.hint and self.details.get("problems") else rendered


class Client:
    """One connection to the daemon of a runtime directory. A context manager."""

    def __init__(self, runtime_dir: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._path = runtime_dir / SOCKET_NAME
        self._decoder = Decoder()
        self._timeout_s = timeout_s
        self.note: str | None = None  # of the last answer: a sentence about its data for the user
        self._socket = _connect(self._path, timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, verb: str, **args: JsonValue) -> JsonValue:
        """Return the data of the answer, and keep its note. Raises RefusedError, or CnprocdError if none comes."""
        self._send(Request(verb, args))
        reply = self._reply()
        if isinstance(reply, Item):
            raise ProtocolError(f"invalid reply to {verb}: a stream instead of an answer")
        self.note = reply.note
        return reply.data

    def stream(self, verb: str, **args: JsonValue) -> Iterator[Item | None]:
        """Yield items as they arrive, without end. Yield None once, when the stream has begun."""
        self._send(Request(verb, args))
        if isinstance(self._reply(), Answer):
            yield None
        self._socket.settimeout(None)
        while True:
            reply = self._reply()
            if isinstance(reply, Item):
                yield reply

    def fileno(self) -> int:
        """Return the descriptor of the connection, for select()."""
        return self._socket.fileno()

    def _send(self, request: Request) -> None:
        try:
            self._socket.sendall(pack(request))
        except OSError as error:
            # The daemon sends the reason before it closes the connection, so the reply may still be readable.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise _no_answer(self._path, error) from error

    def _reply(self) -> Answer | Item:
        while True:
            found = self._decoder.next()
            if found is not None:
                reply = to_reply(found)
                if isinstance(reply, Failure):
                    raise RefusedError(reply)
                return reply
            try:
                data = self._socket.recv(_CHUNK)
            except OSError as error:
                raise _no_answer(self._path, error) from error
            if not data:
                raise NotRunningError(
                    f"cannot read from {self._path}: cnprocd closed the connection",
                    "it may be stopping: systemctl status cnprocd",
                )
            self._decoder.feed(data)


def _connect(path: Path, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout_s)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise _cannot_connect(path, error) from error
    return connection


def _cannot_connect(path: Path, error: OSError) -> CnprocdError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotRunningError(f"cnprocd is not running (no {path})", "systemctl start cnprocd")
    if isinstance(error, ConnectionRefusedError):
        return NotRunningError(f"cnprocd is not running (connection refused on {path})", "systemctl start cnprocd")
    if isinstance(error, PermissionError):
        return PrivilegeError(
            f"cannot connect to {path}: {error.strerror}", "run it as root, or join the group cnprocd to read"
        )
    return CnprocdError(f"cannot connect to {path}: {error.strerror or error}", "check --runtime-dir")


def _no_answer(path: Path, error: OSError) -> CnprocdError:
    if isinstance(error, TimeoutError):
        return NotRunningError(
            f"cnprocd does not answer on {path}", "check whether it is stopped or busy: systemctl status cnprocd"
        )
    return CnprocdError(
        f"cannot talk to cnprocd on {path}: {error.strerror or error}", "see `systemctl status cnprocd`"
    )
