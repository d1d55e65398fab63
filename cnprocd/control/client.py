"""The client of the control socket: blocking, for command lines.

Each failure is an error with a hint: no daemon, no permission, another version, no answer in time. If the daemon is
stopped (SIGSTOP), the kernel still accepts connections and no answer comes, so everything but a stream has a timeout.
"""

from __future__ import annotations

import errno
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cnprocd.control.protocol import (
    METHOD_NOT_FOUND,
    SOCKET_NAME,
    Call,
    Decoder,
    Failure,
    ProtocolError,
    Reply,
    method_of,
    pack,
    to_reply,
)
from cnprocd.errors import EX_OSERR, EX_UNAVAILABLE, CnprocdError, PrivilegeError
from cnprocd.json_value import JsonObject, JsonValue, get_dict, get_int, get_str_or_none

TIMEOUT_S = 15.0
SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
_CHUNK = 1 << 16


class NotRunningError(CnprocdError):
    """No daemon answers on the control socket."""

    exit_status = EX_UNAVAILABLE


class RefusedError(CnprocdError):
    """The daemon refused the call. `error` is the name of the error, `details` has its further parameters."""

    def __init__(self, failure: Failure) -> None:
        hint = failure.hint
        if failure.error == METHOD_NOT_FOUND:
            hint = f"{hint}; if cnprocd is of another release, restart it: systemctl restart cnprocd"
        super().__init__(failure.what, hint)
        self.error = failure.error
        self.details = failure.details
        self.exit_status = failure.status or EX_OSERR

    def render(self, prefix: str = "") -> str:
        """Return the daemon's own rendering if it sent one (the problems of rule files), with its hint below."""
        rendered = self.details.get("rendered")
        if not isinstance(rendered, str):
            return super().render(prefix)
        return f"{rendered}\n{prefix}{self.hint}" if self.hint and self.details.get("problems") else rendered


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a stream. `skipped` items were left out before it because the client read too slowly."""

    data: JsonObject
    skipped: int = 0


class Client:
    """One connection to the daemon of a runtime directory. A context manager."""

    def __init__(self, runtime_dir: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._path = runtime_dir / SOCKET_NAME
        self._decoder = Decoder()
        self._timeout_s = timeout_s
        self.note: str | None = None  # of the last reply: a sentence about its data for the user
        self._socket = _connect(self._path, timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, verb: str, **parameters: JsonValue) -> JsonObject:
        """Return the parameters of the reply, and keep its note. Raises RefusedError, or CnprocdError if none comes."""
        self._send(Call(method_of(verb), parameters))
        reply = self._reply()
        if reply.continues:
            raise ProtocolError(f"invalid reply to {verb}: a stream instead of one reply")
        self.note = get_str_or_none(reply.parameters, "note")
        return reply.parameters

    def stream(self, verb: str, item: str) -> Iterator[Item | None]:
        """Yield the parameter `item` of each reply as it arrives, without end. Yield None when the stream begins."""
        self._send(Call(method_of(verb), more=True))
        while True:
            found = self._reply().parameters
            self._socket.settimeout(None)
            yield Item(get_dict(found, item), get_int(found, "skipped", 0, minimum=0)) if item in found else None

    def fileno(self) -> int:
        """Return the descriptor of the connection, for select()."""
        return self._socket.fileno()

    def _send(self, call: Call) -> None:
        try:
            self._socket.sendall(pack(call))
        except OSError as error:
            # The daemon sends the reason before it closes the connection, so the reply may still be readable.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise _no_answer(self._path, error) from error

    def _reply(self) -> Reply:
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
        return NotRunningError(f"cnprocd is not running (no {path})", _how_to_start())
    if isinstance(error, ConnectionRefusedError):
        return NotRunningError(f"cnprocd is not running (connection refused on {path})", _how_to_start())
    if isinstance(error, PermissionError):
        return PrivilegeError(f"cannot connect to {path}: {error.strerror}", _how_to_connect(path))
    return CnprocdError(f"cannot connect to {path}: {error.strerror or error}", "check --runtime-dir")


def _how_to_start() -> str:
    if SYSTEMD.is_dir():
        return "systemctl start cnprocd"
    return "run cnprocd as root, or give the --runtime-dir of the one that runs"


def _how_to_connect(path: Path) -> str:
    """Return the hint for a refused user. In the foreground the socket is for its owner alone: no group helps."""
    try:
        group_may = bool(path.stat().st_mode & stat.S_IWGRP)
    except OSError:  # the directory hides it, as that of the service does
        group_may = True
    return "run it as root, or join the group cnprocd to read" if group_may else "run it as root"


def _no_answer(path: Path, error: OSError) -> CnprocdError:
    if isinstance(error, TimeoutError):
        return NotRunningError(
            f"cnprocd does not answer on {path}", "check whether it is stopped or busy: systemctl status cnprocd"
        )
    return CnprocdError(
        f"cannot talk to cnprocd on {path}: {error.strerror or error}", "see `systemctl status cnprocd`"
    )
