"""The form of a recording: what the kernel sent, byte for byte, and what /proc said, in the order it came.

    magic     b"CNPROCD RECORDING 1\\n"
    then      one zlib stream of chunks: type (1 byte), length (4 bytes, big-endian), payload
    H         header, JSON: kernel, byte order, whether there are exit records, the family id of taskstats
    S         /proc at the start: JSON list of processes, after LISTEN
    D         datagrams of one drain of the connector, 76 bytes each
    T         exit records of the same drain: each a 2-byte length and the netlink message
    P         what /proc said right after that drain of the processes that had called exec: JSON list
    N         names of the users that were seen: JSON object uid -> name
    E         end, JSON: how much the kernel lost, and why it ended

D, T and P of one drain follow each other; a D (maybe empty) begins the next. The stream is flushed once a second, so of
a recording that was cut off all but the last second can be read: `read` says so and gives what there is. Everything is
checked: a file from elsewhere can be wrong, and must not do worse than be refused.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from cnprocd.connector.uapi import DATAGRAM_SIZE, NLMSGHDR
from cnprocd.errors import CnprocdError
from cnprocd.process.model import Process

MAGIC = b"CNPROCD RECORDING 1\n"
_HEAD = struct.Struct(">cI")
_LENGTH = struct.Struct("=H")
_MOST_CHUNK = 256 << 20
_MOST_HELD = 2 << 30  # of all that a file unpacks to: a small one can unpack to a thousand times itself
_CHUNK_COST = 512  # what an empty chunk takes of it
_PIECE = 1 << 16
_NUMBERS_END = 1 << 64
_FACTS = ("tgid", "ppid", "start_ns", "comm", "uid", "gid", "exe", "cmdline", "cgroup", "threads", "counted_ns")


class RecordingError(CnprocdError):
    """The file is no recording, or a damaged one."""

    exit_status = 1


@dataclass(slots=True)
class Drain:
    """What one drain brought."""

    datagrams: bytes = b""
    messages: list[bytes] = field(default_factory=list)
    facts: list[Process] = field(default_factory=list)


class Writer:
    """Chunks into a file. `written` counts bytes of the file, but for what waits for the next flush."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._compress = zlib.compressobj(level=3)
        self.written = file.write(MAGIC)

    def chunk(self, kind: bytes, payload: bytes) -> None:
        self._put(self._compress.compress(_HEAD.pack(kind, len(payload))))
        self._put(self._compress.compress(payload))

    def values(self, kind: bytes, value: object) -> None:
        self.chunk(kind, json.dumps(value, separators=(",", ":")).encode())

    def drain(self, drain: Drain) -> None:
        self.chunk(b"D", drain.datagrams)
        if drain.messages:
            self.chunk(b"T", b"".join(_LENGTH.pack(len(one)) + one for one in drain.messages))
        if drain.facts:
            self.values(b"P", [facts_of(one) for one in drain.facts])

    def flush(self) -> None:
        """What was written so far can be read, whatever happens next."""
        self._put(self._compress.flush(zlib.Z_SYNC_FLUSH))
        self._file.flush()

    def end(self, value: object) -> None:
        self.values(b"E", value)
        self._put(self._compress.flush(zlib.Z_FINISH))
        self._file.flush()

    def _put(self, data: bytes) -> None:
        self.written += self._file.write(data)


def facts_of(process: Process) -> dict[str, object]:
    """A process as JSON; undecodable bytes survive as lone surrogates, which JSON can carry."""
    known = asdict(process)
    return {name: known[name] for name in _FACTS if known[name] is not None}


def process_of(facts: Any) -> Process:  # noqa: ANN401  # out of a file
    """Raises RecordingError."""
    texts = ("comm", "exe", "cmdline", "cgroup")
    if not isinstance(facts, dict) or not {"tgid"} <= set(facts) <= set(_FACTS):
        raise RecordingError("the recording is damaged: what it says of a process cannot be")
    if not all(_is_text(value) if name in texts else _is_number(value) for name, value in facts.items()):
        raise RecordingError("the recording is damaged: what it says of a process cannot be")
    return Process(**facts)


def _is_text(value: object) -> bool:
    """Text as the kernel's bytes become: any lone surrogate in it stands for a byte."""
    try:
        return isinstance(value, str) and value.encode("utf-8", "surrogateescape") is not None
    except UnicodeEncodeError:
        return False


def _is_number(value: object) -> bool:
    return type(value) is int and abs(value) < _NUMBERS_END


@dataclass(slots=True)
class Recording:
    """A whole recording. `cut_short`: the end is missing."""

    header: dict[str, Any]
    start: list[Process]
    drains: list[Drain]
    names: dict[int, str]
    end: dict[str, Any]
    cut_short: bool = False


def read(file: BinaryIO) -> Recording:
    """Raises RecordingError."""
    if file.read(len(MAGIC)) != MAGIC:
        raise RecordingError("this is not a recording of cnprocd", "`cnprocctl record FILE` makes one")
    found = Recording({}, [], [], {}, {})
    for kind, payload in _chunks(file, found):
        if kind == b"H":
            found.header = _json(payload, dict)
        elif kind == b"S":
            found.start = [process_of(facts) for facts in _json(payload, list)]
        elif kind == b"D":
            found.drains.append(Drain(_whole(payload)))
        elif kind == b"T" and found.drains:
            found.drains[-1].messages = list(_messages(payload))
        elif kind == b"P" and found.drains:
            found.drains[-1].facts = [process_of(facts) for facts in _json(payload, list)]
        elif kind == b"N":
            found.names = dict(_names(_json(payload, dict)))
        elif kind == b"E":
            found.end = _json(payload, dict)
        else:
            raise RecordingError(f"the recording is damaged: a chunk {kind!r}")
    if not found.header:
        raise RecordingError("the recording has no header", "it was cut off right at its beginning")
    if not isinstance(found.header.get("family"), int | None):
        raise RecordingError("the recording is damaged: its header cannot be")
    return found


def _chunks(file: BinaryIO, found: Recording) -> Iterator[tuple[bytes, bytes]]:
    buffer = bytearray()
    decompress = zlib.decompressobj()
    at_end = False
    held = 0
    while not at_end or buffer:
        while len(buffer) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(buffer)
            if length > _MOST_CHUNK:
                raise RecordingError(f"the recording is damaged: a chunk of {length} bytes")
            if len(buffer) < _HEAD.size + length:
                break
            payload = bytes(buffer[_HEAD.size : _HEAD.size + length])
            del buffer[: _HEAD.size + length]
            held += length + _CHUNK_COST
            if held > _MOST_HELD:
                raise RecordingError(
                    f"the recording unpacks to more than {_MOST_HELD >> 30} GiB", "record for a shorter time"
                )
            yield kind, payload
        if at_end:
            break
        piece = file.read(_PIECE)
        at_end = not piece or decompress.eof  # what stands behind the end is not ours
        try:
            buffer += b"" if at_end else decompress.decompress(piece)
        except zlib.error as error:
            raise RecordingError(f"the recording is damaged: {error}") from error
        if len(buffer) > _MOST_CHUNK + _HEAD.size:
            raise RecordingError("the recording is damaged: it unpacks to more than it can hold")
    found.cut_short = not decompress.eof


def _names(names: dict[str, Any]) -> Iterator[tuple[int, str]]:
    for uid, name in names.items():
        if not (uid.isdecimal() and len(uid) <= 10 and _is_text(name)):
            raise RecordingError("the recording is damaged: a user that cannot be")
        yield int(uid), name


def _whole(payload: bytes) -> bytes:
    if len(payload) % DATAGRAM_SIZE:
        raise RecordingError("the recording is damaged: half a datagram")
    return payload


def _messages(payload: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(payload):
        if at + _LENGTH.size > len(payload):
            raise RecordingError("the recording is damaged: half an exit record")
        (length,) = _LENGTH.unpack_from(payload, at)
        at += _LENGTH.size
        if length < NLMSGHDR.size or at + length > len(payload):
            raise RecordingError("the recording is damaged: half an exit record")
        yield payload[at : at + length]
        at += length


def _json(payload: bytes, sort: type) -> Any:  # noqa: ANN401  # what it holds is checked where it is used
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise RecordingError("the recording is damaged: a chunk that is not JSON") from error
    if not isinstance(value, sort):
        raise RecordingError("the recording is damaged: a chunk of another shape")
    return value
