"""What the reader and the runner service say to each other, as bytes. PURE.

A frame is a 4-byte big-endian length and a JSON object with a "type". The reader names a rule and hands over events;
it cannot name a program or a user: there is no field for one, and unknown fields are refused. A limit above the rule's
own has no effect. The first frame each way is `hello` with the version of this file: an upgrade in between is told, not
guessed at.

    reader -> runner   hello     run     cut
    runner -> reader   hello (its PID)     announced (the hook's PID, before it does anything)     launched     output
                       ended (the verdict of one try)     not_now (not started, for want of something)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, field_validator

from cnprocd.hooks.job import Attempt, Job, State

VERSION = 1
MOST_FRAME_BYTES = 16 << 20  # a job may gather a thousand events of several kilobytes each
_LENGTH = struct.Struct(">I")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,63}")  # becomes a variable's name, CNPROCD_<KEY>

Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class WireError(ValueError):
    """The other side does not speak this protocol; the connection cannot go on."""


class _Frame(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Hello(_Frame):
    type: Literal["hello"] = "hello"
    version: int
    pid: int = 0


class Run(_Frame):
    """One try of one job. `try_id` names it in every frame that follows."""

    type: Literal["run"] = "run"
    try_id: Count
    rule: Annotated[str, Field(max_length=256)]
    job_id: Count
    attempts: Count
    attempt_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    limit_s: Annotated[float, Field(gt=0)]
    kernel_time_ns: Count | None
    events: Annotated[list[dict[str, JsonValue]], Field(min_length=1)]

    @field_validator("events")
    @classmethod
    def _names(cls, events: list[dict[str, JsonValue]]) -> list[dict[str, JsonValue]]:
        for event in events:
            if not all(_KEY.fullmatch(key) for key in event):
                raise ValueError("an event's field has a name that no record has")
        return events

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


class Cut(_Frame):
    type: Literal["cut"] = "cut"
    try_id: Count
    grace_s: Annotated[float, Field(ge=0, le=60)]


class Announced(_Frame):
    type: Literal["announced"] = "announced"
    try_id: Count
    hook_pid: int


class Launched(_Frame):
    type: Literal["launched"] = "launched"
    try_id: Count
    latency_ms: float | None


class Output(_Frame):
    type: Literal["output"] = "output"
    try_id: Count
    line: str


class Ended(_Frame):
    type: Literal["ended"] = "ended"
    try_id: Count
    reason: str | None
    exit_code: int | None = None
    signal: int | None = None
    duration_ms: float | None = None
    latency_ms: float | None = None
    interrupted: bool = False

    def attempt(self) -> Attempt:
        return Attempt(self.reason, self.exit_code, self.signal, self.duration_ms, self.latency_ms)


class NotNow(_Frame):
    type: Literal["not_now"] = "not_now"
    try_id: Count
    reason: str


FromReader = Hello | Run | Cut
FromRunner = Hello | Announced | Launched | Output | Ended | NotNow
FROM_READER: TypeAdapter[FromReader] = TypeAdapter(Annotated[FromReader, Field(discriminator="type")])
FROM_RUNNER: TypeAdapter[FromRunner] = TypeAdapter(Annotated[FromRunner, Field(discriminator="type")])


def frame(message: BaseModel) -> bytes:
    """One message, ready to send."""
    body = message.model_dump_json().encode()
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


def from_reader(body: bytes) -> FromReader:
    """What the reader said. Raises WireError."""
    try:
        return FROM_READER.validate_json(body)
    except ValidationError as error:
        raise WireError(_first(error)) from error


def from_runner(body: bytes) -> FromRunner:
    """What the runner said. Raises WireError."""
    try:
        return FROM_RUNNER.validate_json(body)
    except ValidationError as error:
        raise WireError(_first(error)) from error


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
