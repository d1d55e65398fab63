"""The protocol between the daemon and the runner, as bytes. PURE.

A frame is a 4-byte big-endian length and a JSON object with a "type". The first frame each way is `hello` with VERSION,
so that an upgrade of only one side is detected.

    daemon -> runner   hello     run     terminate
    runner -> daemon   hello (its PID)     announced (the hook's PID, before it does anything)     launched     output
                       ended (the result of one attempt)     not_now (not started: something was missing)

The daemon names a rule and sends events. It cannot name a program or a user: no frame has a field for one, and unknown
fields are rejected. A limit above the rule's own has no effect. The daemon trusts the runner, which is root; the frames
that the runner accepts from the daemon are parsed by wire_validate.py.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from cnprocd.json_value import (
    JsonError,
    JsonObject,
    JsonValue,
    as_dict,
    as_number,
    as_str,
    get_bool,
    get_choice,
    get_int,
    get_int_or_none,
    get_number_or_none,
    get_str,
    get_with,
    parse_json,
)
from cnprocd.launch.request import AttemptResult

VERSION = 2
MOST_FRAME_BYTES = 16 << 20  # a job may gather a thousand events of several kilobytes each
MOST_COUNT = (1 << 63) - 1
_LENGTH = struct.Struct(">I")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,63}")  # becomes the name of a variable, CNPROCD_<KEY>
_ATTEMPT_ID = re.compile(r"[0-9a-f]{32}")

T = TypeVar("T")


class WireError(ValueError):
    """The peer broke the protocol; the connection must be closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    type: Literal["hello"] = "hello"
    version: int
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Start one attempt of one job. `attempt_id` names the attempt in every frame that follows. See LaunchRequest."""

    type: Literal["run"] = "run"
    attempt_id: str
    attempt: int
    rule: str
    job_id: int
    limit_s: float
    kernel_time_ns: int | None
    events: Sequence[JsonObject]

    def __post_init__(self) -> None:
        _require(_ATTEMPT_ID.fullmatch(self.attempt_id) is not None, "attempt_id: expected 32 hexadecimal digits")
        _require(len(self.rule) <= 256, "rule: longer than 256 characters")
        _require(self.limit_s > 0, "limit_s: not above 0")
        _require(bool(self.events), "events: empty")
        for event in self.events:
            _require(all(map(_KEY.fullmatch, event)), "events: a key that no record has")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminate:
    """End an attempt: SIGTERM, and SIGKILL after `grace_s`."""

    type: Literal["terminate"] = "terminate"
    attempt_id: str
    grace_s: float

    def __post_init__(self) -> None:
        _require(0 <= self.grace_s <= 60, "grace_s: not from 0 to 60")


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    type: Literal["announced"] = "announced"
    attempt_id: str
    hook_pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    type: Literal["launched"] = "launched"
    attempt_id: str
    latency_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    type: Literal["output"] = "output"
    attempt_id: str
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    type: Literal["ended"] = "ended"
    attempt_id: str
    reason: str | None
    exit_code: int | None = None
    signal: int | None = None
    duration_ms: float | None = None
    latency_ms: float | None = None
    interrupted: bool = False

    def result(self) -> AttemptResult:
        return AttemptResult(self.reason, self.exit_code, self.signal, self.duration_ms, self.latency_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotNow:
    type: Literal["not_now"] = "not_now"
    attempt_id: str
    reason: str


FromDaemon = Hello | Run | Terminate
FromRunner = Hello | Announced | Launched | Output | Ended | NotNow
Message = FromDaemon | FromRunner


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise WireError(otherwise)


# Frames as bytes.


def frame(message: Message) -> bytes:
    """Return one message, ready to send."""
    body = json.dumps({one.name: getattr(message, one.name) for one in fields(message)}).encode()
    return _LENGTH.pack(len(body)) + body


def bodies(buffer: bytearray) -> Iterator[bytes]:
    """Remove the complete frames from the front of `buffer` and return their bodies. Raises WireError."""
    while len(buffer) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer)
        if length > MOST_FRAME_BYTES:
            raise WireError(f"a frame of {length} bytes; the maximum is {MOST_FRAME_BYTES}")
        end = _LENGTH.size + length
        if len(buffer) < end:
            return
        body = bytes(buffer[_LENGTH.size : end])
        del buffer[:end]
        yield body


# Bodies as messages.


def parse(body: bytes, readers: Mapping[str, Callable[[JsonObject], T]]) -> T:
    """Return the message in `body`, read by the reader of its type. Raises WireError for any other JSON or key."""
    try:
        found = as_dict(parse_json(body))
        message = readers[get_choice(found, "type", readers)](found)
    except JsonError as error:
        raise WireError(str(error)) from error
    known = {one.name for one in fields(message)}  # type: ignore[arg-type]  # every message is a dataclass
    for key in found:
        _require(key in known, f"unknown key {key[:40]!r}")
    return message


def nullable(read: Callable[[JsonValue], T]) -> Callable[[JsonValue], T | None]:
    """Return the reader of a value that may be null."""
    return lambda value: None if value is None else read(value)


def read_hello(found: JsonObject) -> Hello:
    return Hello(version=get_int(found, "version"), pid=get_int(found, "pid", 0))


def _read_announced(found: JsonObject) -> Announced:
    return Announced(attempt_id=get_str(found, "attempt_id"), hook_pid=get_int(found, "hook_pid"))


def _read_launched(found: JsonObject) -> Launched:
    latency_ms = get_with(found, "latency_ms", nullable(as_number))
    return Launched(attempt_id=get_str(found, "attempt_id"), latency_ms=latency_ms)


def _read_output(found: JsonObject) -> Output:
    return Output(attempt_id=get_str(found, "attempt_id"), line=get_str(found, "line"))


def _read_ended(found: JsonObject) -> Ended:
    return Ended(
        attempt_id=get_str(found, "attempt_id"),
        reason=get_with(found, "reason", nullable(as_str)),  # required: null means that the hook succeeded
        exit_code=get_int_or_none(found, "exit_code"),
        signal=get_int_or_none(found, "signal"),
        duration_ms=get_number_or_none(found, "duration_ms"),
        latency_ms=get_number_or_none(found, "latency_ms"),
        interrupted=get_bool(found, "interrupted", False),
    )


def _read_not_now(found: JsonObject) -> NotNow:
    return NotNow(attempt_id=get_str(found, "attempt_id"), reason=get_str(found, "reason"))


_FROM_RUNNER: Mapping[str, Callable[[JsonObject], FromRunner]] = {
    "hello": read_hello,
    "announced": _read_announced,
    "launched": _read_launched,
    "output": _read_output,
    "ended": _read_ended,
    "not_now": _read_not_now,
}


def from_runner(body: bytes) -> FromRunner:
    """Return the message of a body from the runner. Raises WireError."""
    return parse(body, _FROM_RUNNER)
