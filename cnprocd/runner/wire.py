"""What the reader and the runner service say to each other, as bytes. PURE.

A frame is a 4-byte big-endian length and a JSON object with a "type". The reader names a rule and hands over events;
it cannot name a program or a user: there is no field for one, and unknown fields are refused. A limit above the rule's
own has no effect. The first frame each way is `hello` with the version of this file: an upgrade in between is told, not
guessed at.

The reader trusts the runner, which is root, and only looks whether a frame is one (`from_runner`); what the runner lets
through from the reader is strict.py's to say. So the reader, which never ends, does without pydantic.

    reader -> runner   hello     run     cut
    runner -> reader   hello (its PID)     announced (the hook's PID, before it does anything)     launched     output
                       ended (the verdict of one try)     not_now (not started, for want of something)
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from cnprocd.spool.job import Attempt, Job, State

VERSION = 1
MOST_FRAME_BYTES = 16 << 20  # a job may gather a thousand events of several kilobytes each
_LENGTH = struct.Struct(">I")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,63}")  # becomes a variable's name, CNPROCD_<KEY>
_ATTEMPT_ID = re.compile(r"[0-9a-f]{32}")
_MOST = 1 << 63


class WireError(ValueError):
    """The other side does not speak this protocol; the connection cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    # For strict.py: types as they are here, no conversions, no other keys.
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(_Frame):
    type: Literal["hello"] = "hello"
    version: int
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(_Frame):
    """One try of one job. `try_id` names it in every frame that follows."""

    type: Literal["run"] = "run"
    try_id: int
    rule: str
    job_id: int
    attempts: int
    attempt_id: str
    limit_s: float
    kernel_time_ns: int | None
    events: list[dict[str, Any]]  # JSON objects; pydantic cannot read the recursive JsonObject

    def __post_init__(self) -> None:
        _require(_is_count(self.try_id) and _is_count(self.job_id) and _is_count(self.attempts), "a count is not one")
        _require(self.kernel_time_ns is None or _is_count(self.kernel_time_ns), "the kernel's time is none")
        _require(len(self.rule) <= 256, "the rule's name is too long")
        _require(_ATTEMPT_ID.fullmatch(self.attempt_id) is not None, "the attempt's id is none")
        _require(self.limit_s > 0, "the limit is not above 0")
        _require(bool(self.events), "there are no events")
        for event in self.events:
            _require(all(map(_KEY.fullmatch, event)), "an event's field has a name that no record has")

    def job(self) -> Job:
        """The job as the runner's side knows it: all that rendering a hook needs."""
        return Job(
            job_id=self.job_id,
            rule=self.rule,
            state=State.RUNNING,
            serialize_key=None,
            kernel_time_ns=self.kernel_time_ns,
            boot_id="",
            created_ns=0,
            due_ns=0,
            attempts=self.attempts,
            failures=0,
            event_count=len(self.events),
            events=tuple(self.events),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut(_Frame):
    type: Literal["cut"] = "cut"
    try_id: int
    grace_s: float

    def __post_init__(self) -> None:
        _require(_is_count(self.try_id), "a count is not one")
        _require(0 <= self.grace_s <= 60, "the time of grace is not from 0 to 60 s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced(_Frame):
    type: Literal["announced"] = "announced"
    try_id: int
    hook_pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched(_Frame):
    type: Literal["launched"] = "launched"
    try_id: int
    latency_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output(_Frame):
    type: Literal["output"] = "output"
    try_id: int
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(_Frame):
    type: Literal["ended"] = "ended"
    try_id: int
    reason: str | None
    exit_code: int | None = None
    signal: int | None = None
    duration_ms: float | None = None
    latency_ms: float | None = None
    interrupted: bool = False

    def attempt(self) -> Attempt:
        return Attempt(self.reason, self.exit_code, self.signal, self.duration_ms, self.latency_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotNow(_Frame):
    type: Literal["not_now"] = "not_now"
    try_id: int
    reason: str


FromReader = Hello | Run | Cut
FromRunner = Hello | Announced | Launched | Output | Ended | NotNow
Message = FromReader | FromRunner


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _is_count(number: int) -> bool:
    return 0 <= number < _MOST


def frame(message: Message) -> bytes:
    """One message, ready to send."""
    body = json.dumps({one.name: getattr(message, one.name) for one in fields(message)}).encode()
    return _LENGTH.pack(len(body)) + body


def bodies(buffer: bytearray) -> Iterator[bytes]:
    """Take the complete frames from the front of `buffer`."""
    while len(buffer) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer)
        if length > MOST_FRAME_BYTES:
            raise WireError(f"a frame of {length} bytes")
        end = _LENGTH.size + length
        if len(buffer) < end:
            return
        body = bytes(buffer[_LENGTH.size : end])
        del buffer[:end]
        yield body


_FROM_RUNNER: Mapping[str, type[FromRunner]] = {
    "hello": Hello,
    "announced": Announced,
    "launched": Launched,
    "output": Output,
    "ended": Ended,
    "not_now": NotNow,
}
# What JSON has for the types of the fields above, which are texts here (PEP 563).
_JSON_TYPES: Mapping[str, frozenset[type]] = {
    "int": frozenset({int}),
    "int | None": frozenset({int, type(None)}),
    "float | None": frozenset({int, float, type(None)}),
    "str": frozenset({str}),
    "str | None": frozenset({str, type(None)}),
    "bool": frozenset({bool}),
}


def from_runner(body: bytes) -> FromRunner:
    """What the runner said. Raises WireError."""
    try:
        told = json.loads(body)
        made = _FROM_RUNNER[told.pop("type")]
        for one in fields(made):
            if one.name in told and type(told[one.name]) not in _JSON_TYPES[str(one.type)]:
                raise WireError(f"{one.name} is {told[one.name]!r:.40}")
        return made(**told)
    except WireError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WireError(f"no frame of the runner: {error}") from error
