"""The protocol of the control socket: Varlink (varlink.org), the convention of systemd for local services. PURE.

    message   one JSON object of UTF-8, then a NUL byte; at most MAX_MESSAGE bytes, a call at most MAX_CALL
    call      {"method": "io.cnprocd.Status", "parameters": {}}, and maybe "more" or "oneway"
    reply     {"parameters": {...}}, and "continues": true if another reply to the same call follows
    error     {"error": "io.cnprocd.NotFound", "parameters": {...}}

One reply follows each call, in order, or none if it is `oneway`. A stream (`more`) has no end: the client closes the
connection. interface.py describes the methods. A method is named by its verb here: `retry_dead` is RetryDead.

Every error has the parameters `what` (one line), `hint` and `status` (the exit status of a command that fails with it),
beside those that its name has in the interface.

Bytes in, values out; server.py and client.py read and write. A message that is too long, not JSON, or not an object
raises ProtocolError and ends the connection.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from cnprocd.errors import EX_CONFIG, EX_NO, EX_NOPERM, EX_UNAVAILABLE, CnprocdError
from cnprocd.json_value import (
    JsonDict,
    JsonError,
    JsonObject,
    JsonValue,
    as_dict,
    get_bool,
    get_dict,
    get_int,
    get_str,
    parse_json,
)

INTERFACE = "io.cnprocd"
SERVICE = "org.varlink.service"  # the interface that every Varlink service has
MAX_MESSAGE = 1 << 20
MAX_CALL = 128 * 1024  # of a client: the daemon decodes one of each connection in a turn of its loop
MAX_DEPTH = 64  # of brackets: the json module recurses once a level, and Python limits recursion to about a thousand
SOCKET_NAME = "control.sock"
WRONG_USAGE = 2  # the exit status of argparse; errors.py has the others

# Errors of every Varlink service.
INVALID_PARAMETER = f"{SERVICE}.InvalidParameter"
METHOD_NOT_FOUND = f"{SERVICE}.MethodNotFound"
INTERFACE_NOT_FOUND = f"{SERVICE}.InterfaceNotFound"
PERMISSION_DENIED = f"{SERVICE}.PermissionDenied"
EXPECTED_MORE = f"{SERVICE}.ExpectedMore"
# Errors of this one.
FAILED = f"{INTERFACE}.Failed"
NOT_FOUND = f"{INTERFACE}.NotFound"
WRONG_STATE = f"{INTERFACE}.WrongState"
RULES_REJECTED = f"{INTERFACE}.RulesRejected"
TOO_MANY_CLIENTS = f"{INTERFACE}.TooManyClients"
TOO_LONG = f"{INTERFACE}.TooLong"
INVALID_MESSAGE = f"{INTERFACE}.InvalidMessage"


class ProtocolError(CnprocdError):
    """The other side does not follow this protocol."""

    exit_status = EX_UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Call:
    """A method that a client calls, with its parameters. `more`: it takes a stream. `oneway`: it takes no reply."""

    method: str
    parameters: JsonObject = field(default_factory=dict)
    more: bool = False
    oneway: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply to a call that was carried out. `continues`: another one follows."""

    parameters: JsonObject = field(default_factory=dict)
    continues: bool = False


@dataclass(frozen=True, slots=True)
class EncodedReply:
    """A reply with a list of values that are JSON texts already, under `name`. For the client it is a Reply."""

    name: str
    values: tuple[str, ...]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that was not carried out. `details` has further parameters, such as the problems of a rule file."""

    error: str
    what: str
    hint: str = ""
    status: int = EX_UNAVAILABLE
    details: JsonObject = field(default_factory=dict)


def method_of(verb: str) -> str:
    """Return the full name of the method of a verb: `retry_dead` is io.cnprocd.RetryDead."""
    return f"{INTERFACE}.{''.join(word.capitalize() for word in verb.split('_'))}"


def error_of(status: int) -> str:
    """Return the name of the error of an exit status."""
    return {EX_NO: NOT_FOUND, EX_CONFIG: RULES_REJECTED, EX_NOPERM: PERMISSION_DENIED}.get(status, FAILED)


def pack(message: Call | Reply | EncodedReply | Failure) -> bytes:
    """Return one message. Raises ProtocolError if it would be longer than MAX_MESSAGE."""
    payload = (_joined(message) if isinstance(message, EncodedReply) else encode(_plain(message))).encode()
    if len(payload) > MAX_MESSAGE:
        raise too_long(len(payload))
    return payload + b"\0"


def too_long(size: int) -> ProtocolError:
    """Return the error of a message of `size` bytes."""
    return ProtocolError(
        f"cannot send {size} bytes: the limit of a message is {MAX_MESSAGE}", "ask for less: --limit N"
    )


def encode(value: JsonValue) -> str:
    """Return a value as JSON text without spaces and without NUL bytes."""
    return json.dumps(value, separators=(",", ":"))


def _joined(reply: EncodedReply) -> str:
    note = "" if reply.note is None else f',"note":{encode(reply.note)}'
    return f'{{"parameters":{{{encode(reply.name)}:[{",".join(reply.values)}]{note}}}}}'


def _plain(message: Call | Reply | Failure) -> JsonDict:
    if isinstance(message, Call):
        flags: JsonDict = {name: True for name in ("more", "oneway") if getattr(message, name)}
        return {"method": message.method, "parameters": dict(message.parameters), **flags}
    if isinstance(message, Reply):
        return {"parameters": dict(message.parameters), **({"continues": True} if message.continues else {})}
    parameters = {**message.details, "what": message.what, "hint": message.hint, "status": message.status}
    return {"error": message.error, "parameters": parameters}


class Decoder:
    """Turn bytes, as they arrive, into JSON objects. Holds at most one message and what arrived with it."""

    def __init__(self, most: int = MAX_MESSAGE) -> None:
        """`most`: the longest message, in bytes."""
        self._most = most
        self._buffer = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> None:
        """Add bytes that were received."""
        self._buffer += data

    @property
    def partial(self) -> bool:
        """Whether part of a message waits for the rest."""
        return bool(self._buffer)

    def next(self) -> JsonObject | None:
        """Return the object of the next whole message, or None until more arrives. Raises ProtocolError."""
        end = self._buffer.find(b"\0", self._searched, self._most + 1)
        if end < 0:
            self._searched = len(self._buffer)
            if self._searched > self._most:
                raise ProtocolError(f"invalid message: it is longer than {self._most} bytes")
            return None
        payload = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return _object(payload)


def _object(payload: bytes) -> JsonObject:
    try:
        value = as_dict(parse_json(payload))
    except JsonError as error:  # also for a number of too many digits, and for 100,000 brackets
        raise ProtocolError(f"invalid message: {error.what[:120]}") from error
    if _is_deeper(value, MAX_DEPTH):
        raise ProtocolError(f"invalid message: nested deeper than {MAX_DEPTH} levels")
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


def to_call(value: JsonObject) -> Call:
    """Return the call of a client's message. A parameter that is null is left out. Raises ProtocolError."""
    try:
        if get_bool(value, "upgrade", False):
            raise ProtocolError("invalid call: this service has no other protocol to upgrade to")
        parameters = get_dict(value, "parameters", {}) if value.get("parameters") is not None else {}
        parameters = {name: argument for name, argument in parameters.items() if argument is not None}
        more, oneway = get_bool(value, "more", False), get_bool(value, "oneway", False)
        return Call(get_str(value, "method"), parameters, more, oneway)
    except JsonError as error:
        raise ProtocolError(f"invalid call: {error.what}") from error


def to_reply(value: JsonObject) -> Reply | Failure:
    """Return the reply of a server's message. Raises ProtocolError."""
    try:
        parameters = get_dict(value, "parameters", {}) if value.get("parameters") is not None else {}
        if value.get("error") is not None:
            return _failure(get_str(value, "error"), parameters)
        return Reply(parameters, get_bool(value, "continues", False))
    except JsonError as error:
        raise ProtocolError(f"invalid reply: {error.what}") from error


def _failure(error: str, parameters: JsonObject) -> Failure:
    details = {name: detail for name, detail in parameters.items() if name not in ("what", "hint", "status")}
    status = get_int(parameters, "status", EX_UNAVAILABLE, minimum=0, maximum=255)
    return Failure(error, get_str(parameters, "what", error), get_str(parameters, "hint", ""), status, details)
