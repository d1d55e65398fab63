"""Keep the matches of a flood whose jobs are made later, where kill -9 does not lose them.

To make a job in SQLite takes ten times as long as to append its request to a file. So in a flood the requests that are
beyond a rule's budget are appended here, and become jobs later, in their order, in a share of the time. The file is the
queue: what waits takes no memory of the daemon, and the next daemon goes on with it. It is in the runtime directory, so
it survives the daemon and not the machine, like the receive slots (connector/inflight.py).

The head has the boot id and where the oldest request begins; that moves when the jobs are on the disk. If the daemon is
killed in between, the requests are made jobs again: their keys are known, so none runs twice. Each request has its
length and a checksum before it, because a kill can end a write(2) in the middle. The events of such a batch are still
in the receive slots. To drop the requests of a rule, a mark is appended: those before it are skipped.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import struct
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

from cnprocd.json_value import JsonObject
from cnprocd.log import Level
from cnprocd.spool.job import Gather, JobRequest

MOST_BYTES = 64 << 20
_MAGIC = b"cnprbl01"  # the number is that of the format
_HEAD_SIZE = 64
_OLDEST = struct.Struct("=Q")  # where the oldest request begins, behind the head
_START = _HEAD_SIZE + _OLDEST.size
_FRAME = struct.Struct("=II")  # length and CRC-32 of a request
_MARK = b"[["  # [[rule, ...]]: the requests of these rules before it are dropped. A request is ["key","rule",...]
_LEAST_COMPACTED = 1 << 20
_CHUNK = 256 << 10


class Postponed(NamedTuple):
    """A request whose job is made later, and how its match is logged then: level and message, or None for neither."""

    request: JobRequest
    level: Level | None
    message: str


class Backlog:
    """Requests that wait, oldest first. Without a path, or if there can be no file, it takes none."""

    def __init__(self, path: Path | None = None, boot_id: str = "") -> None:
        self._path = path
        self._head = (_MAGIC + boot_id.encode()).ljust(_HEAD_SIZE, b"\0")
        self._by_rule: Counter[str] = Counter()
        self._snapshots: dict[str, Counter[str]] = {}  # of the requests of each rule
        self._dropped: dict[str, int] = {}  # by rule: where the mark ends before which its requests are skipped
        self._fd = -1
        self._oldest = self._end = _START
        if path is not None:
            with contextlib.suppress(OSError):  # as for the receive slots: the daemon works without the file
                self._hold(_open(path))
                self._adopt()

    def __len__(self) -> int:
        return self._by_rule.total()

    def __bool__(self) -> bool:
        return self._end > self._oldest

    def of_rule(self, rule: str) -> int:
        """Return how many requests of a rule wait."""
        return self._by_rule[rule]

    @property
    def rules(self) -> list[str]:
        """The rules whose requests wait."""
        return list(self._by_rule)

    def snapshots(self) -> list[str]:
        """Return the digests of the rules that the requests refer to."""
        return [digest for digest in {digest for of_rule in self._snapshots.values() for digest in of_rule} if digest]

    def append(self, requests: Sequence[Postponed]) -> bool:
        """Keep these requests in one write, all or none. Return False if that cannot be done."""
        if self._fd < 0:
            return False
        data = b"".join(map(_framed, requests))
        if self._end - self._oldest + len(data) > MOST_BYTES:
            return False
        try:
            written = os.pwrite(self._fd, data, self._end)
            if written != len(data):
                os.ftruncate(self._fd, self._end)
                return False
        except OSError:
            return False
        self._end += len(data)
        for one in requests:
            self._count(one)
        return True

    def oldest(self, most: int) -> list[tuple[Postponed, int]]:
        """Return the oldest requests, at most so many, each with where it ends. They stay until `remove`."""
        return [found for found, _ in zip(self._waiting(), range(most), strict=False)]

    def remove(self, done: Sequence[tuple[Postponed, int]]) -> None:
        """Forget the oldest requests: their jobs are committed."""
        for one, end in done:
            self._oldest = end
            self._take_off(one, end)
        if self._oldest == self._end:
            self._empty()
            return
        os.pwrite(self._fd, _OLDEST.pack(self._oldest), _HEAD_SIZE)
        if self._oldest - _START > max(_LEAST_COMPACTED, self._end - self._oldest):
            self._compact()

    def drop(self, rule: str = "*") -> Counter[str]:
        """Drop the waiting requests of rules (a glob). Return how many of each that were. Raises OSError."""
        rules = fnmatch.filter(self.rules, rule)
        dropped = Counter({name: self._by_rule[name] for name in rules})
        if rules:
            mark = _frame_of([rules])
            _write(self._fd, mark, self._end)
            self._end += len(mark)
            self._skip(rules, self._end)
        return dropped

    def give_up(self) -> Counter[str]:
        """Empty the file, because the rest cannot be read. Return how many requests of each rule that were."""
        lost = +self._by_rule
        self._empty()
        return lost

    def _empty(self) -> None:
        """Cut the file before the head is changed: an `oldest` behind the end of the file means that none is left."""
        os.ftruncate(self._fd, _START)
        os.pwrite(self._fd, _OLDEST.pack(_START), _HEAD_SIZE)
        self._oldest = self._end = _START
        self._by_rule.clear()
        self._snapshots.clear()
        self._dropped.clear()

    def _waiting(self) -> Iterator[tuple[Postponed, int]]:
        """Yield the requests that are not dropped, oldest first, each with where it ends."""
        for data, end in _frames(self._fd, self._oldest, self._end):
            if not data.startswith(_MARK) and end > self._dropped.get(_rule_in(data), 0):
                yield _request(data), end

    def _count(self, one: Postponed) -> None:
        rule = one.request.rule
        self._by_rule[rule] += 1
        self._snapshots.setdefault(rule, Counter())[one.request.snapshot] += 1

    def _take_off(self, one: Postponed, end: int) -> None:
        rule = one.request.rule
        if end <= self._dropped.get(rule, 0):
            return  # its job was made before it was dropped
        for counter, key in ((self._by_rule, rule), (self._snapshots[rule], one.request.snapshot)):
            counter[key] -= 1
            if not counter[key]:
                del counter[key]
        if rule not in self._by_rule:
            del self._snapshots[rule]

    def _skip(self, rules: Sequence[str], before: int) -> None:
        """Forget the requests of these rules that end before this."""
        for rule in rules:
            self._dropped[rule] = before
            self._by_rule.pop(rule, None)
            self._snapshots.pop(rule, None)

    def _hold(self, fd: int) -> None:
        """Use a file, and close it with this object."""
        self._fd, self._close = fd, weakref.finalize(self, os.close, fd)

    def _adopt(self) -> None:
        """Take up what the daemon before has left, up to a request that is cut."""
        size = os.fstat(self._fd).st_size
        head = os.pread(self._fd, _START, 0)
        if len(head) < _START or not head.startswith(self._head):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, self._head + _OLDEST.pack(_START), 0)
            return
        self._oldest = self._end = max(_START, min(_OLDEST.unpack_from(head, _HEAD_SIZE)[0], size))
        for data, end in _frames(self._fd, self._oldest, size):
            self._end = end
            if data.startswith(_MARK):
                self._skip(json.loads(data)[0], end)
            else:
                self._count(_request(data))
        os.ftruncate(self._fd, self._end)
        if not self._by_rule:
            self._empty()

    def _compact(self) -> None:
        """Write a new file of what waits. If there is no room for it, the old one goes on."""
        assert self._path is not None
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            fd = _open(new)
            try:
                os.ftruncate(fd, 0)
                _write(fd, self._head + _OLDEST.pack(_START), 0)
                for at in range(self._oldest, self._end, _CHUNK):
                    chunk = os.pread(self._fd, min(_CHUNK, self._end - at), at)
                    _write(fd, chunk, at - self._oldest + _START)
                os.replace(new, self._path)
            except OSError:
                os.close(fd)
                raise
            self._close()
            self._hold(fd)
            moved = self._oldest - _START
            self._oldest, self._end = _START, self._end - moved
            self._dropped = {rule: end - moved for rule, end in self._dropped.items() if end > self._oldest + moved}


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _write(fd: int, data: bytes, at: int) -> None:
    """Write all of `data`. Raises OSError."""
    if os.pwrite(fd, data, at) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _framed(one: Postponed) -> bytes:
    request = one.request
    gather = None if request.gather is None else astuple(request.gather)
    return _frame_of(
        [
            request.key, request.rule, request.event, request.serialize_key, request.kernel_time_ns,
            request.created_ns, gather, request.snapshot, one.level, one.message,
        ]
    )  # fmt: skip


def _frame_of(content: object) -> bytes:
    data = json.dumps(content, separators=(",", ":")).encode()
    return _FRAME.pack(len(data), zlib.crc32(data)) + data


def _frames(fd: int, at: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Yield the contents of the frames from `at` on, each with where it ends, up to one that is not whole."""
    begin, chunk = at, b""
    while at + _FRAME.size <= end:
        if at + _FRAME.size > begin + len(chunk):
            begin, chunk = at, os.pread(fd, min(_CHUNK, end - at), at)
        length, checksum = _FRAME.unpack_from(chunk, at - begin)
        following = at + _FRAME.size + length
        if following > end:
            return
        if following > begin + len(chunk):
            begin, chunk = at, os.pread(fd, max(_CHUNK, following - at), at)
        data = chunk[at + _FRAME.size - begin : following - begin]
        if zlib.crc32(data) != checksum:
            return
        yield data, following
        at = following


def _rule_in(data: bytes) -> str:
    """Return the rule of a request without reading the rest. Neither its key nor its rule has a quotation mark."""
    return data.split(b'"', 4)[3].decode()


def _request(data: bytes) -> Postponed:
    key, rule, event, serialize_key, kernel_time_ns, created_ns, gather, snapshot, level, message = json.loads(data)
    record: JsonObject = event
    gathered = None if gather is None else Gather(*gather)
    request = JobRequest(key, rule, record, serialize_key, kernel_time_ns, created_ns, gathered, snapshot)
    return Postponed(request, level, message)
