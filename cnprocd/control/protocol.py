"""The protocol of the control socket: framed, versioned JSON. PURE.

    frame     4-byte big-endian length, then that many bytes of UTF-8 JSON: one object; at most MAX_FRAME bytes
    request   {"v": 1, "verb": "status", "args": {}}
    answer    {"v": 1, "ok": true, "data": ...}    and maybe "note": a sentence about the data for the user
              {"v": 1, "ok": false, "error": {"what": ..., "hint": ..., "status": 78, ...}}
    stream    {"v": 1, "item": ..., "skipped": 0}, any number of them; `skipped` items were left out before this one

One answer follows each request, in order. A stream has no end: the client closes the connection.

Bytes in, values out; server.py and client.py read and write. A frame that is too long, not JSON, or not an object
raises ProtocolError and ends the connection, because the start of the next frame is then unknown.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from cnprocd.errors import EX_UNAVAILABLE, CnprocdError
from cnprocd.json_value import (
    JsonDict,
    JsonError,
    JsonObject,
    JsonValue,
    as_dict,
    get_dict,
    get_int,
    get_str,
    get_str_or_none,
    parse_json,
)

VERSION = 1
MAX_FRAME = 1 << 20
MAX_DEPTH = 64  # of brackets: the json module recurses once a level, and Python limits recursion to about a thousand
SOCKET_NAME = "control.sock"
WRONG_USAGE = 2  # the exit status of argparse; errors.py has the others
_LENGTH = struct.Struct(">I")


class ProtocolError(CnprocdError):
    """The other side does not follow this protocol."""

    exit_status = EX_UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Request:
    """A verb that a client asks for, with its arguments."""

    verb: str
    args: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request that was carried out. `note` is a sentence about the data for the user."""

    data: JsonValue
    note: str | None = None


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """An answer whose data is a list of values that are JSON texts already. For the client it is an Answer."""

    values: tuple[str, ...]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a stream. `skipped` items were left out before it because the client read too slowly."""

    data: JsonValue
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that was not carried out. `details` has further facts, such as the problems of a rule file."""

    what: str
    hint: str = ""
    status: int = EX_UNAVAILABLE
    details: JsonObject = field(default_factory=dict)


def pack(message: Request | Answer | EncodedAnswer | Item | Failure) -> bytes:
    """Return one frame. Raises ProtocolError if it would be longer than MAX_FRAME."""
    payload = (_joined(message) if isinstance(message, EncodedAnswer) else encode(_plain(message))).encode()
    if len(payload) > MAX_FRAME:
        raise too_long(len(payload))
    return _LENGTH.pack(len(payload)) + payload


def too_long(size: int) -> ProtocolError:
    """Return the error of a message of `size` bytes."""
    return ProtocolError(f"cannot send {size} bytes: the limit of a message is {MAX_FRAME}", "ask for less: --limit N")


def encode(value: JsonValue) -> str:
    """Return a value as JSON text without spaces."""
    return json.dumps(value, separators=(",", ":"))


def _joined(answer: EncodedAnswer) -> str:
    note = "" if answer.note is None else f',"note":{encode(answer.note)}'
    return f'{{"v":{VERSION},"ok":true,"data":[{",".join(answer.values)}]{note}}}'


def _plain(message: Request | Answer | Item | Failure) -> JsonDict:
    if isinstance(message, Request):
        return {"v": VERSION, "verb": message.verb, "args": dict(message.args)}
    if isinstance(message, Answer):
        note = {} if message.note is None else {"note": message.note}
        return {"v": VERSION, "ok": True, "data": message.data, **note}
    if isinstance(message, Item):
        return {"v": VERSION, "item": message.data, "skipped": message.skipped}
    error = {**message.details, "what": message.what, "hint": message.hint, "status": message.status}
    return {"v": VERSION, "ok": False, "error": error}


class Decoder:
    """Turn bytes, as they arrive, into JSON objects. Holds at most one frame and what arrived with it."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add bytes that were received."""
        self._buffer += data

    @property
    def partial(self) -> bool:
        """Whether part of a frame waits for the rest."""
        return bool(self._buffer)

    def next(self) -> JsonObject | None:
        """Return the object of the next whole frame, or None until more arrives. Raises ProtocolError."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if not 0 < length <= MAX_FRAME:
            raise ProtocolError(f"invalid frame of {length} bytes: 1 to {MAX_FRAME} are allowed")
        if len(self._buffer) < _LENGTH.size + length:
            return None
        payload = bytes(self._buffer[_LENGTH.size : _LENGTH.size + length])
        del self._buffer[: _LENGTH.size + length]
        return _object(payload)


def _object(payload: bytes) -> JsonObject:
    try:
        value = as_dict(parse_json(payload))
    except JsonError as error:  # also for a number of too many digits, and for 100,000 brackets
        raise ProtocolError(f"invalid frame: {error.what[:120]}") from error
    if _is_deeper(value, MAX_DEPTH):
        raise ProtocolError(f"invalid frame: nested deeper than {MAX_DEPTH} levels")
    return value


def _is_deeper(value: JsonValue, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [inner for one in level for inner in _children(one)]
        if not level:
            return False
    return True


def _children(value: JsonValue) -> Iterable[JsonValue]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def to_request(value: JsonObject) -> Request:
    """Return the request of a client's frame. Raises ProtocolError."""
    _check_version(value)
    try:
        return Request(get_str(value, "verb"), get_dict(value, "args", {}))
    except JsonError as error:
        raise ProtocolError(f"invalid request: {error.what}") from error


def to_reply(value: JsonObject) -> Answer | Item | Failure:
    """Return the reply of a server's frame. Raises ProtocolError."""
    _check_version(value)
    try:
        if "item" in value:
            return Item(value["item"], get_int(value, "skipped", 0, minimum=0))
        if value.get("ok") is True:
            return Answer(value.get("data"), get_str_or_none(value, "note"))
        if value.get("ok") is False:
            return _failure(get_dict(value, "error"))
    except JsonError as error:
        raise ProtocolError(f"invalid reply: {error.what}") from error
    raise ProtocolError("invalid reply: it has neither data, an item, nor an error")


def _failure(error: JsonObject) -> Failure:
    details = {name: detail for name, detail in error.items() if name not in ("what", "hint", "status")}
    status = get_int(error, "status", EX_UNAVAILABLE, minimum=0, maximum=255)
    return Failure(get_str(error, "what", ""), get_str(error, "hint", ""), status, details)


def _check_version(value: JsonObject) -> None:
    if value.get("v") != VERSION or value.get("v") is True:
        raise ProtocolError(
            f"unknown version {str(value.get('v'))[:20]} of the control protocol: this side uses {VERSION}",
            "cnprocd and cnprocctl come from different releases: restart the daemon (systemctl restart cnprocd)",
        )
