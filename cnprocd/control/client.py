"""The control socket from the other side: blocking, for command lines.

Every way in which it can fail is an error with what to do: no daemon, no permission, another version, no answer in
time. A daemon that is stopped (SIGSTOP) accepts connections in the kernel and answers nothing, so everything but a
stream has a time limit.
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
    Value,
    pack,
    to_reply,
)
from cnprocd.errors import EX_NOPERM, EX_OSERR, EX_UNAVAILABLE, CnprocdError

TIMEOUT_S = 15.0
_CHUNK = 1 << 16


class NotRunningError(CnprocdError):
    """Nobody listens on the control socket."""

    exit_status = EX_UNAVAILABLE


class RefusedError(CnprocdError):
    """The daemon answered that it will not. `details` is what it told besides; `exit_status` is its own."""

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

    def value(self) -> dict[str, object]:
        """Return the error as a JSON object, with the problems of rule files."""
        problems = self.details.get("problems")
        return super().value() | ({"problems": problems} if problems else {})


class Client:
    """One connection to the daemon of a runtime directory. Use it with `with`."""

    def __init__(self, runtime_dir: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._path = runtime_dir / SOCKET_NAME
        self._decoder = Decoder()
        self._timeout_s = timeout_s
        self._socket = _connect(self._path, timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, verb: str, **args: Value) -> Value:
        """The answer's data. Raises RefusedError, or another CnprocdError when there is no answer."""
        self._send(Request(verb, args))
        reply = self._reply()
        if isinstance(reply, Item):
            raise ProtocolError(f"a stream came for an answer to {verb}")
        return reply.data

    def stream(self, verb: str, **args: Value) -> Iterator[Item | None]:
        """Items as they come, for as long as the caller wants them; None is said once, when the stream has begun."""
        self._send(Request(verb, args))
        if isinstance(self._reply(), Answer):
            yield None
        self._socket.settimeout(None)
        while True:
            reply = self._reply()
            if isinstance(reply, Item):
                yield reply

    def fileno(self) -> int:
        return self._socket.fileno()

    def _send(self, request: Request) -> None:
        try:
            self._socket.sendall(pack(request))
        except OSError as error:
            # A refusal may be waiting: the daemon says why before it hangs up.
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
                    f"cnprocd closed the connection ({self._path})", "it may be stopping: systemctl status cnprocd"
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
        return NotRunningError(f"cnprocd is not running (nobody answers on {path})", "systemctl start cnprocd")
    if isinstance(error, PermissionError):
        refused = CnprocdError(f"you may not use {path}", "run it as root, or join the group cnprocd to read")
        refused.exit_status = EX_NOPERM
        return refused
    return CnprocdError(f"{path}: {error.strerror or error}", "is --runtime-dir right?")


def _no_answer(path: Path, error: OSError) -> CnprocdError:
    if isinstance(error, TimeoutError):
        return NotRunningError(
            f"cnprocd does not answer on {path}", "is it stopped or very busy? systemctl status cnprocd"
        )
    return CnprocdError(f"{path}: {error.strerror or error}", "systemctl status cnprocd")
