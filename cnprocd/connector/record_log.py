"""Keep the exit records that the receive slots have no room for (inflight.py), in a file that kill -9 does not lose.

After a standstill thousands of exit records are read before the events that they belong to. The file is a log: records
are appended as the kernel sent them, and so are marks that the exit of a thread is decided. It begins anew when no
record in it is needed any more. It is written and not mapped, so a full directory is an error and no SIGBUS.

A netlink message begins with its length (struct nlmsghdr). A mark has a length that no message has.
"""

from __future__ import annotations

import contextlib
import os
import struct
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

from cnprocd.connector.needed import Needed
from cnprocd.connector.taskrecord import RECORD_SLOT_SIZE

MOST_BYTES = 64 << 20  # about 100,000 records
_LEAST_COMPACTED = 1 << 20
_MARK = struct.Struct("=2I")  # what is decided, thread id
_OLDEST, _ALL = 1, 2  # the oldest record of the thread id, or all that come before the mark
_WORD = struct.Struct("=I")
TID_AT = 164  # ac_pid in a message (taskrecord.py)
LEAST_MESSAGE = TID_AT + _WORD.size


class RecordLog:
    """Exit records of threads whose exit is not decided. The file's head counts those that it had no room for."""

    def __init__(self, path: Path, head: bytes) -> None:
        """`head`: the first bytes of a file whose records are of this boot. Raises OSError if there can be no file."""
        self._path, self._head = path, head
        self._hold(_open(path))
        content = _content(self._fd)
        self.leftover: tuple[bytes, ...] = ()  # the records that the last daemon had in it
        self.lost = 0  # the records that it could not keep
        self._sizes: dict[int, list[int]] = {}  # thread id -> bytes of its records in the file that are needed
        self._bytes = 0  # of all of them
        if not content.startswith(head):
            os.ftruncate(self._fd, 0)
            self._write_head(0)
            self._size = self._start
            return
        found, self._size = _parse(content, self._start)
        os.ftruncate(self._fd, self._size)  # the last record may be cut
        self.leftover = tuple(found)
        self._note(found)
        with contextlib.suppress(struct.error):
            self.lost = _WORD.unpack_from(content, len(head))[0]

    def append(self, messages: Sequence[bytes]) -> None:
        """Keep these records. If there is no room, count them, for the next daemon to report."""
        data = b"".join(messages)
        if self._size + len(data) <= MOST_BYTES and self._append(data):
            self._note(messages)
        else:
            self._lose(len(messages))

    @property
    def is_empty(self) -> bool:
        """Whether it has no record that is needed."""
        return not self._sizes

    def forget(self, needed: Needed, exited: Iterable[int] = ()) -> list[int]:
        """Forget the records that are not needed. Return the entries of `decided` of which it has none.

        `exited`: the threads of the batch's exit events. Other threads among them do no harm.
        """
        marks: list[bytes] = []
        elsewhere: list[int] = []
        for tid in needed.decided:
            sizes = self._sizes.get(tid)
            if sizes is None:
                elsewhere.append(tid)
                continue
            marks.append(_MARK.pack(_OLDEST, tid))
            self._bytes -= sizes.pop(0)
            if not sizes:
                del self._sizes[tid]
        # In a flood the log has thousands of records: they are not all looked at for each batch.
        left = self._sizes if needed.left is None else self._sizes.keys() & {*needed.left, *exited}
        for tid in [tid for tid in left if tid not in needed.records]:
            marks.append(_MARK.pack(_ALL, tid))
            self._bytes -= sum(self._sizes.pop(tid))
        if not marks:
            return elsewhere
        if not self._sizes:
            self._clear()
        elif not self._append(b"".join(marks)):
            # A record without its event would be taken for a lost event, and its match reported twice.
            lost = sum(map(len, self._sizes.values()))
            self._clear()
            self._lose(lost)
        elif self._size > max(_LEAST_COMPACTED, 4 * self._bytes):
            self._compact()
        return elsewhere

    def _hold(self, fd: int) -> None:
        """Use a file, and close it with this object."""
        self._fd, self._close = fd, weakref.finalize(self, os.close, fd)

    @property
    def _start(self) -> int:
        return len(self._head) + _WORD.size

    def _note(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            self._sizes.setdefault(_tid(message), []).append(len(message))
            self._bytes += len(message)

    def _append(self, data: bytes) -> bool:
        """Append all or nothing. Return whether there was room."""
        with contextlib.suppress(OSError):
            if os.pwrite(self._fd, data, self._size) == len(data):
                self._size += len(data)
                return True
            os.ftruncate(self._fd, self._size)
        return False

    def _clear(self) -> None:
        os.ftruncate(self._fd, self._start)
        self._size, self._bytes = self._start, 0
        self._sizes.clear()

    def _lose(self, count: int) -> None:
        self.lost += count
        self._write_head(self.lost)

    def _write_head(self, lost: int) -> None:
        os.pwrite(self._fd, self._head + _WORD.pack(min(lost, 0xFFFFFFFF)), 0)

    def take_lost(self) -> int:
        """Return how many records could not be kept, once."""
        lost, self.lost = self.lost, 0
        if lost:
            self._write_head(0)
        return lost

    def _compact(self) -> None:
        """Write a new file of what is needed. If there is no room for it, the old one goes on."""
        found, _ = _parse(_content(self._fd), self._start)
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            fd = _open(new)
            data = self._head + _WORD.pack(self.lost) + b"".join(found)
            os.ftruncate(fd, 0)
            if os.pwrite(fd, data, 0) != len(data):
                os.close(fd)
                return
            os.replace(new, self._path)
            self._close()
            self._hold(fd)
            self._size = len(data)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _content(fd: int) -> bytes:
    return os.pread(fd, min(os.fstat(fd).st_size, 2 * MOST_BYTES), 0)


def _tid(message: bytes) -> int:
    tid: int = _WORD.unpack_from(message, TID_AT)[0]
    return tid


def _parse(content: bytes, at: int) -> tuple[list[bytes], int]:
    """Return the records that are needed, oldest first, and where the last whole entry ends."""
    needed: dict[bytes, None] = {}  # each once, because the slots may have had it as well
    by_tid: dict[int, list[bytes]] = {}
    while at + _MARK.size <= len(content):
        length, tid = _MARK.unpack_from(content, at)
        if length in (_OLDEST, _ALL):
            records = by_tid.get(tid, [])
            for message in records[: 1 if length == _OLDEST else None]:
                del needed[message]
                records.remove(message)
            length = _MARK.size
        elif LEAST_MESSAGE <= length <= RECORD_SLOT_SIZE and at + length <= len(content):
            message = content[at : at + length]
            if message not in needed:
                needed[message] = None
                by_tid.setdefault(_tid(message), []).append(message)
        else:
            break
        at += length
    return list(needed), at
