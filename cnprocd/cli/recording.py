"""The file format of a recording: the kernel's messages, byte for byte, and what was read from /proc, in order.

    magic     b"CNPROCD RECORDING 1\\n"
    then      one zlib stream of chunks: type (1 byte), length (4 bytes, big-endian), payload
    H         header, JSON: kernel, byte order, whether there are exit records, the family id of taskstats,
              whether the kernel's log was read
    S         /proc at the start: JSON list of processes, after LISTEN
    D         datagrams of one drain of the connector, 76 bytes each
    T         exit records of the same drain: each a 2-byte length and the netlink message
    P         what was read from /proc right after that drain, of the processes that had called exec: JSON list
    K         PIDs of victims of the OOM killer that the kernel's log named since the drain before: JSON list
    N         names of the users of all these processes: JSON object uid -> name
    E         end, JSON: how many events the kernel dropped, and why the recording ended

D, T, P and K of one drain follow each other; a D (which may be empty) begins the next. The stream is flushed once a
second, so all but the last second of a truncated recording can be read; `Recording.cut_short` marks one. Every value is
checked, because the file may come from another machine: a damaged file raises RecordingError and nothing else.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

from cnprocd.connector.uapi import DATAGRAM_SIZE, NLMSGHDR
from cnprocd.errors import CnprocdError
from cnprocd.json_value import (
    JsonDict,
    JsonError,
    JsonObject,
    JsonValue,
    as_dict,
    as_int,
    as_str,
    get_int,
    get_int_or_none,
    get_with,
    list_of,
    parse_json,
)
from cnprocd.process.model import MoreIds, Process

MAGIC = b"CNPROCD RECORDING 1\n"
_HEAD = struct.Struct(">cI")
_LENGTH = struct.Struct("=H")
_MOST_CHUNK = 256 << 20
_MOST_HELD = 2 << 30  # of all chunks together: zlib unpacks a small file to a thousand times its size
_CHUNK_COST = 512  # the memory that an empty chunk takes
_PIECE = 1 << 16
_MAX_NUMBER = (1 << 64) - 1
_FACTS = ("tgid", "ppid", "start_ns", "comm", "uid", "gid", "exe", "cmdline", "cgroup", "threads", "counted_ns")
_ID_FACTS = ("euid", "loginuid")


class RecordingError(CnprocdError):
    """The file is not a recording, or it is damaged."""

    exit_status = 1


@dataclass(slots=True)
class Drain:
    """The result of one drain: datagrams of the connector, exit records, and processes read from /proc."""

    datagrams: bytes = b""
    messages: list[bytes] = field(default_factory=list)
    facts: list[Process] = field(default_factory=list)
    victims: list[int] = field(default_factory=list)  # of the OOM killer


class Writer:
    """Write chunks to a file. `written` counts the bytes of the file, without those that wait for the next flush."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._compress = zlib.compressobj(level=3)
        self.written = file.write(MAGIC)

    def chunk(self, kind: bytes, payload: bytes) -> None:
        """Write one chunk."""
        self._put(self._compress.compress(_HEAD.pack(kind, len(payload))))
        self._put(self._compress.compress(payload))

    def values(self, kind: bytes, value: JsonValue) -> None:
        """Write one chunk of JSON."""
        self.chunk(kind, json.dumps(value, separators=(",", ":")).encode())

    def drain(self, drain: Drain) -> None:
        """Write the chunks of one drain."""
        self.chunk(b"D", drain.datagrams)
        if drain.messages:
            self.chunk(b"T", b"".join(_LENGTH.pack(len(one)) + one for one in drain.messages))
        if drain.facts:
            self.values(b"P", [facts_of(one) for one in drain.facts])
        if drain.victims:
            self.values(b"K", list(drain.victims))

    def flush(self) -> None:
        """Make all that was written so far readable."""
        self._put(self._compress.flush(zlib.Z_SYNC_FLUSH))
        self._file.flush()

    def end(self, value: JsonValue) -> None:
        """Write the last chunk and finish the stream."""
        self.values(b"E", value)
        self._put(self._compress.flush(zlib.Z_FINISH))
        self._file.flush()

    def _put(self, data: bytes) -> None:
        self.written += self._file.write(data)


def facts_of(process: Process) -> JsonDict:
    """Return a process as JSON. Undecodable bytes become lone surrogates, which JSON can carry."""
    known = asdict(process) | (process.more_ids or MoreIds())._asdict()
    return {name: known[name] for name in (*_FACTS, *_ID_FACTS) if known[name] is not None}


def process_of(value: JsonValue) -> Process:
    """Return the process that `facts_of` turned into JSON. Raises JsonError."""
    facts = as_dict(value)
    unknown = set(facts) - {*_FACTS, *_ID_FACTS}
    if unknown:
        raise JsonError(f"unknown keys: {', '.join(sorted(map(repr, unknown)))[:80]}")
    return Process(
        tgid=_number(facts, "tgid"),
        ppid=_number_or_none(facts, "ppid"),
        start_ns=_number_or_none(facts, "start_ns"),
        comm=_text_or_none(facts, "comm"),
        uid=_number_or_none(facts, "uid"),
        gid=_number_or_none(facts, "gid"),
        exe=_text_or_none(facts, "exe"),
        cmdline=_text_or_none(facts, "cmdline"),
        cgroup=_text_or_none(facts, "cgroup"),
        threads=_number(facts, "threads", 1),
        counted_ns=_number(facts, "counted_ns", 0),
        more_ids=MoreIds(_number_or_none(facts, "euid"), _number_or_none(facts, "loginuid")),
    )


_PROCESSES = list_of(process_of)
_PIDS = list_of(as_int)


def _number(facts: JsonObject, key: str, default: int | None = None) -> int:
    return get_int(facts, key, default, minimum=-_MAX_NUMBER, maximum=_MAX_NUMBER)


def _number_or_none(facts: JsonObject, key: str) -> int | None:
    return get_int_or_none(facts, key, minimum=-_MAX_NUMBER, maximum=_MAX_NUMBER)


def _text_or_none(facts: JsonObject, key: str) -> str | None:
    return get_with(facts, key, _kernel_text) if facts.get(key) is not None else None


def _kernel_text(value: JsonValue) -> str:
    """Return a text whose lone surrogates all stand for undecodable bytes, as the kernel's bytes are decoded."""
    text = as_str(value)
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise JsonError("expected a decoded byte string, found a surrogate that stands for no byte") from None
    return text


@dataclass(slots=True)
class Recording:
    """A recording in memory. `cut_short`: its end is missing."""

    header: JsonObject
    start: list[Process]
    drains: list[Drain]
    names: dict[int, str]
    end: JsonObject
    cut_short: bool = False


def read(file: BinaryIO) -> Recording:
    """Return the recording in a file. Raises RecordingError."""
    if file.read(len(MAGIC)) != MAGIC:
        raise RecordingError("the file is not a recording of cnprocd", "`cnprocctl record FILE` writes one")
    found = Recording({}, [], [], {}, {})
    try:
        for kind, payload in _chunks(file, found):
            _take(kind, payload, found)
        if not found.header:
            raise RecordingError("the recording has no header", "it was truncated at its beginning")
        get_int_or_none(found.header, "family")
    except JsonError as error:
        raise RecordingError(f"damaged recording: {error.what}") from error
    return found


def _take(kind: bytes, payload: bytes, found: Recording) -> None:
    """Add one chunk. Raises RecordingError or JsonError."""
    if kind == b"D":
        found.drains.append(Drain(_whole(payload)))
    elif kind == b"T" and found.drains:
        found.drains[-1].messages = list(_messages(payload))
    elif kind in (b"S", b"P", b"K", b"H", b"N", b"E"):
        _take_json(kind, parse_json(payload), found)
    else:
        raise RecordingError(f"damaged recording: unknown chunk {kind!r}")


def _take_json(kind: bytes, value: JsonValue, found: Recording) -> None:
    if kind == b"H":
        found.header = as_dict(value)
    elif kind == b"N":
        found.names = dict(_names(as_dict(value)))
    elif kind == b"E":
        found.end = as_dict(value)
    elif kind == b"S":
        found.start = _PROCESSES(value)
    elif found.drains and kind == b"K":
        found.drains[-1].victims = _PIDS(value)
    elif found.drains:
        found.drains[-1].facts = _PROCESSES(value)
    else:
        raise RecordingError("damaged recording: processes before the first drain")


def _chunks(file: BinaryIO, found: Recording) -> Iterator[tuple[bytes, bytes]]:
    buffer = bytearray()
    decompress = zlib.decompressobj()
    at_end = False
    held = 0
    while not at_end or buffer:
        while len(buffer) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(buffer)
            if length > _MOST_CHUNK:
                raise RecordingError(f"damaged recording: a chunk of {length} bytes")
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
        at_end = not piece or decompress.eof  # ignore bytes after the end of the stream
        try:
            buffer += b"" if at_end else decompress.decompress(piece)
        except zlib.error as error:
            raise RecordingError(f"damaged recording: {error}") from error
        if len(buffer) > _MOST_CHUNK + _HEAD.size:
            raise RecordingError("damaged recording: it unpacks to more than a chunk can hold")
    found.cut_short = not decompress.eof


def _names(names: JsonObject) -> Iterator[tuple[int, str]]:
    for uid, name in names.items():
        if not (uid.isdecimal() and len(uid) <= 10):
            raise RecordingError("damaged recording: invalid uid")
        yield int(uid), _kernel_text(name)


def _whole(payload: bytes) -> bytes:
    if len(payload) % DATAGRAM_SIZE:
        raise RecordingError("damaged recording: truncated datagram")
    return payload


def _messages(payload: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(payload):
        if at + _LENGTH.size > len(payload):
            raise RecordingError("damaged recording: truncated exit record")
        (length,) = _LENGTH.unpack_from(payload, at)
        at += _LENGTH.size
        if length < NLMSGHDR.size or at + length > len(payload):
            raise RecordingError("damaged recording: truncated exit record")
        yield payload[at : at + length]
        at += length
