"""The control socket's language: framed JSON, versioned, and suspicious of every byte.

    frame     4-byte big-endian length, then that many bytes of UTF-8 JSON: one object; at most MAX_FRAME bytes
    request   {"v": 1, "verb": "status", "args": {}}
    answer    {"v": 1, "ok": true, "data": ...}
              {"v": 1, "ok": false, "error": {"what": ..., "hint": ..., "status": 78, ...}}
    stream    {"v": 1, "item": ..., "skipped": 0}, any number of them; `skipped` items were left out before this one

One answer follows each request, in order. A stream has no end: whoever has enough closes the connection.

PURE: bytes in, values out. Reading and writing is done by server.py and client.py. A frame that is too long, not JSON,
or not an object raises ProtocolError and ends the connection: after it nobody knows where the next frame begins.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from cnprocd.errors import EX_UNAVAILABLE, CnprocdError

VERSION = 1
MAX_FRAME = 1 << 20
DEEPEST = 64  # of brackets: what reads and writes JSON goes down one call a level, and calls end at some thousand
SOCKET_NAME = "control.sock"
WRONG_USAGE = 2  # what argparse ends with; the other statuses are those of errors.py
_LENGTH = struct.Struct(">I")

Value = object  # a JSON value


class ProtocolError(CnprocdError):
    """The other side does not speak this protocol."""

    exit_status = EX_UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Request:
    """What a client wants."""

    verb: str
    args: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request that was carried out."""

    data: Value


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a stream. `skipped` ones were left out before it, because the client read too slowly."""

    data: Value
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that was not carried out; `details` is what else is known, as the problems of a rule file."""

    what: str
    hint: str = ""
    status: int = EX_UNAVAILABLE
    details: Mapping[str, Value] = field(default_factory=dict)


def pack(message: Request | Answer | Item | Failure) -> bytes:
    """One frame. Raises ProtocolError if it would be too long."""
    payload = json.dumps(_plain(message), separators=(",", ":"), default=str).encode()
    if len(payload) > MAX_FRAME:
        raise ProtocolError(f"the answer has {len(payload)} bytes, the limit is {MAX_FRAME}", "ask for less: --limit N")
    return _LENGTH.pack(len(payload)) + payload


def _plain(message: Request | Answer | Item | Failure) -> dict[str, Value]:
    if isinstance(message, Request):
        return {"v": VERSION, "verb": message.verb, "args": dict(message.args)}
    if isinstance(message, Answer):
        return {"v": VERSION, "ok": True, "data": message.data}
    if isinstance(message, Item):
        return {"v": VERSION, "item": message.data, "skipped": message.skipped}
    error = {**message.details, "what": message.what, "hint": message.hint, "status": message.status}
    return {"v": VERSION, "ok": False, "error": error}


class Decoder:
    """Bytes as they arrive, to JSON objects. Holds at most one frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    @property
    def partial(self) -> bool:
        """Whether part of a frame is waiting for the rest."""
        return bool(self._buffer)

    def next(self) -> dict[str, Value] | None:
        """The next whole frame's object, or None until more arrives. Raises ProtocolError."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if not 0 < length <= MAX_FRAME:
            raise ProtocolError(f"a frame of {length} bytes: 1 to {MAX_FRAME} are allowed")
        if len(self._buffer) < _LENGTH.size + length:
            return None
        payload = bytes(self._buffer[_LENGTH.size : _LENGTH.size + length])
        del self._buffer[: _LENGTH.size + length]
        return _object(payload)


def _object(payload: bytes) -> dict[str, Value]:
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:  # also a number of too many digits, and 100,000 brackets
        raise ProtocolError("a frame that is not JSON", str(error)[:80]) from error
    if not isinstance(value, dict):
        raise ProtocolError("a frame that is not a JSON object")
    if _is_deeper(value, DEEPEST):
        raise ProtocolError(f"a frame nested deeper than {DEEPEST} levels")
    return value


def _is_deeper(value: Value, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


def to_request(value: Mapping[str, Value]) -> Request:
    """What a client's frame asks for. Raises ProtocolError."""
    _check_version(value)
    verb, args = value.get("verb"), value.get("args", {})
    if not isinstance(verb, str) or not isinstance(args, dict):
        raise ProtocolError("a request needs a verb (text) and args (an object)")
    return Request(verb, args)


def to_reply(value: Mapping[str, Value]) -> Answer | Item | Failure:
    """What a server's frame says. Raises ProtocolError."""
    _check_version(value)
    if "item" in value:
        skipped = value.get("skipped", 0)
        return Item(value["item"], skipped if isinstance(skipped, int) else 0)
    if value.get("ok") is True:
        return Answer(value.get("data"))
    error = value.get("error")
    if value.get("ok") is not False or not isinstance(error, dict):
        raise ProtocolError("an answer that is neither data, an item, nor an error")
    status = error.get("status")
    details = {name: detail for name, detail in error.items() if name not in ("what", "hint", "status")}
    return Failure(
        str(error.get("what", "")),
        str(error.get("hint", "")),
        status if isinstance(status, int) else EX_UNAVAILABLE,
        details,
    )


def _check_version(value: Mapping[str, Value]) -> None:
    if value.get("v") != VERSION or value.get("v") is True:
        raise ProtocolError(
            f"the other side speaks version {str(value.get('v'))[:20]} of the control protocol, we speak {VERSION}",
            "cnprocd and cnprocctl come from different releases: restart the daemon (systemctl restart cnprocd)",
        )
