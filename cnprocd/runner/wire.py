"""The protocol between the daemon and the runner, as bytes. PURE.

A frame is a 4-byte big-endian length and a JSON object with a "type". The first frame each way is `hello` with VERSION,
so that an upgrade of only one side is detected.

    daemon -> runner   hello     take_snapshot (of the rule files)     run     terminate
                       resume (an attempt of the time before this connection)
    runner -> daemon   hello (its PID)     snapshot_taken     announced (the hook's PID, before it does anything)
                       launched     output     ended (the result of one attempt)
                       not_now (not started: something was missing)

The daemon names a rule of a snapshot that the runner made of root-owned files, and sends events. It cannot name a
program or a user: no frame has a field for one, and unknown fields are rejected. A limit above the rule's own has no
effect. The daemon trusts the runner, which is root; the frames that the runner accepts from the daemon are parsed by
wire_validate.py.

The sender keeps to the limits: see client.py for a job whose events exceed a frame. A frame of the daemon that is too
long is skipped, and the attempt that it names is refused for good. The other attempts are not affected.
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
    get_str_or_none,
    get_with,
    parse_json,
)
from cnprocd.launch.request import AttemptResult

VERSION = 3
MOST_FRAME_BYTES = 16 << 20  # a job may gather a thousand events of several kilobytes each
MOST_COUNT = (1 << 63) - 1
MOST_SNAPSHOTS = 64  # that the daemon may ask to keep: snapshot_files.MOST_KEPT
_HEAD_BYTES = 256  # of a frame that is too long: they hold its type and its attempt_id
_HEAD_OF_RUN = re.compile(rb'\{"type": "run", "attempt_id": "([0-9a-f]{32})"')
_DIGEST = re.compile(r"[0-9a-f]{64}")
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
    snapshot: str
    rule: str
    job_id: int
    limit_s: float
    kernel_time_ns: int | None
    events_left_out: int
    events: Sequence[JsonObject]

    def __post_init__(self) -> None:
        _require_attempt_id(self.attempt_id)
        _require(_DIGEST.fullmatch(self.snapshot) is not None, "snapshot: expected 64 hexadecimal digits")
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
class Resume:
    """Report about an attempt that an earlier connection started: the runner sends its frames here, or its result."""

    type: Literal["resume"] = "resume"
    attempt_id: str

    def __post_init__(self) -> None:
        _require_attempt_id(self.attempt_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeSnapshot:
    """Read the rule files, and put their snapshot in force if its digest is `wanted`. Keep those in `keep`, too.

    `keep` None: all, because it is not known which ones jobs need.
    """

    type: Literal["take_snapshot"] = "take_snapshot"
    wanted: str
    keep: Sequence[str] | None

    def __post_init__(self) -> None:
        keep = self.keep or ()
        _require(len(keep) <= MOST_SNAPSHOTS, f"keep: more than {MOST_SNAPSHOTS}")
        for digest in (self.wanted, *keep):
            _require(_DIGEST.fullmatch(digest) is not None, "a snapshot: expected 64 hexadecimal digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTaken:
    """The answer to TakeSnapshot. `digest` is that of the rule files now, or None if `error` says why there is none."""

    type: Literal["snapshot_taken"] = "snapshot_taken"
    wanted: str
    digest: str | None
    error: str | None


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
    """The attempt was not started. `no_snapshot`: the runner cannot read the rules that it names.

    `this_job`: another job of the rule may be started.
    """

    type: Literal["not_now"] = "not_now"
    attempt_id: str
    reason: str
    no_snapshot: bool = False
    this_job: bool = False


FromDaemon = Hello | TakeSnapshot | Run | Resume | Terminate
OfAttempt = Announced | Launched | Output | Ended | NotNow
FromRunner = Hello | SnapshotTaken | OfAttempt
Message = FromDaemon | FromRunner


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise WireError(otherwise)


def _require_attempt_id(text: str) -> None:
    _require(_ATTEMPT_ID.fullmatch(text) is not None, "attempt_id: expected 32 hexadecimal digits")


# Frames as bytes.


@dataclass(frozen=True, slots=True)
class TooLong:
    """A frame that was skipped. `attempt_id` names the attempt that it asked for."""

    attempt_id: str
    reason: str


class Incoming:
    """The bytes that arrived from the daemon, as the bodies of frames. A frame that is too long is skipped."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0

    def add(self, data: bytes) -> Iterator[bytes | TooLong]:
        """Return the bodies that are complete with `data`. Raises WireError for an unknown frame that is too long."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._buffer += data[skipped:]
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            end = _LENGTH.size + length
            if length > MOST_FRAME_BYTES and len(self._buffer) >= _LENGTH.size + _HEAD_BYTES:
                yield self._too_long(length)
                self._skip = max(0, end - len(self._buffer))
                del self._buffer[:end]
            elif length <= MOST_FRAME_BYTES and len(self._buffer) >= end:
                yield bytes(self._buffer[_LENGTH.size : end])
                del self._buffer[:end]
            else:
                return

    def _too_long(self, length: int) -> TooLong:
        reason = f"a frame of {length} bytes; the maximum is {MOST_FRAME_BYTES}"
        head = _HEAD_OF_RUN.match(self._buffer, _LENGTH.size)
        if head is None:
            raise WireError(reason)
        return TooLong(head[1].decode(), reason)


def bodies(buffer: bytearray) -> Iterator[bytes]:
    """Remove the complete frames from the front of `buffer` and return their bodies. Raises WireError."""
    while len(buffer) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer)
        _require(length <= MOST_FRAME_BYTES, f"a frame of {length} bytes; the maximum is {MOST_FRAME_BYTES}")
        end = _LENGTH.size + length
        if len(buffer) < end:
            return
        content = bytes(buffer[_LENGTH.size : end])
        del buffer[:end]
        yield content


def frame(message: Message) -> bytes:
    """Return one message, ready to send."""
    content = body(message)
    return _LENGTH.pack(len(content)) + content


def body(message: Message) -> bytes:
    """Return one message as JSON."""
    return json.dumps({one.name: getattr(message, one.name) for one in fields(message)}).encode()


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


def _read_snapshot_taken(found: JsonObject) -> SnapshotTaken:
    digest, error = get_str_or_none(found, "digest"), get_str_or_none(found, "error")
    return SnapshotTaken(wanted=get_str(found, "wanted"), digest=digest, error=error)


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
    return NotNow(
        attempt_id=get_str(found, "attempt_id"),
        reason=get_str(found, "reason"),
        no_snapshot=get_bool(found, "no_snapshot", False),
        this_job=get_bool(found, "this_job", False),
    )


_FROM_RUNNER: Mapping[str, Callable[[JsonObject], FromRunner]] = {
    "hello": read_hello,
    "snapshot_taken": _read_snapshot_taken,
    "announced": _read_announced,
    "launched": _read_launched,
    "output": _read_output,
    "ended": _read_ended,
    "not_now": _read_not_now,
}


def from_runner(body: bytes) -> FromRunner:
    """Return the message of a body from the runner. Raises WireError."""
    return parse(body, _FROM_RUNNER)
