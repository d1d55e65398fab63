"""What was read from the kernel and is not yet settled, kept where kill -9 cannot reach it.

A datagram cannot be read twice. Between recvmmsg() and the spool's commit it exists only in our memory, and a SIGKILL
in that millisecond would lose it although the socket itself is kept by the service manager. So the receive slots are a
file mapped MAP_SHARED in the state directory: what the kernel writes into them is in the page cache, which outlives the
process, at the price of no system call. When a batch is settled its slots are blanked; whoever starts next finds in
them exactly what was in hand. Handling something twice is harmless: a job's key is the same both times.

The file is for one boot: another boot id in its head means that its PIDs mean nothing any more. It survives the
process, not the machine, and needs neither fsync nor a disk. What it does not cover: the queue that an adopted socket
had is read before the acknowledgement and is in plain memory until the first drain; and a record that came before its
event is settled with its batch.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from cnprocd.connector import uapi
from cnprocd.connector.decode import SLOT_SIZE

EVENT_SLOTS = 512  # at 40 bytes an event in Python a batch's list stays in cache, and 512 need one system call
RECORD_SLOTS = 256
RECORD_SLOT_SIZE = 2048  # a record of version 16 with its group struct is 1172 bytes
_HEAD_SIZE = 64  # "cnprocd1" and the boot id
_MAGIC = b"cnprocd1"
_EVENTS_SIZE = EVENT_SLOTS * SLOT_SIZE
_SIZE = _HEAD_SIZE + _EVENTS_SIZE + RECORD_SLOTS * RECORD_SLOT_SIZE
_LENGTH = struct.Struct("=I")  # nlmsg_len, the first word of a slot; 0 where the slot is blank


@dataclass(frozen=True, slots=True)
class Leftover:
    """What the last process had in hand: event slots, and exit record messages."""

    events: bytes
    records: tuple[bytes, ...]


class InFlight:
    """The mapped slots. Without a path, or if there can be no file, plain memory: a kill then costs what is in hand."""

    def __init__(self, path: Path | None = None, boot_id: str = "") -> None:
        self.durable = False
        self._map = mmap.mmap(-1, _SIZE)
        head = (_MAGIC + boot_id.encode()).ljust(_HEAD_SIZE, b"\0")
        if path is not None:
            try:
                self._map = _map_file(path)
                self.durable = True
            except OSError:  # a full or read-only disk: the spool tells of it, and the work goes on
                self.durable = False
        if self._map[:_HEAD_SIZE] != head:
            self._map[:] = head + bytes(_SIZE - _HEAD_SIZE)
        # It stays in the file until it is settled: we may be killed as well.
        self.leftover = self._find_leftover()
        view = memoryview(self._map)
        self.events = view[_HEAD_SIZE : _HEAD_SIZE + _EVENTS_SIZE]
        self.records = view[_HEAD_SIZE + _EVENTS_SIZE :]

    def settle(self, event_slots: int, record_slots: int) -> None:
        """The first so many slots are settled: nobody need see them again."""
        if event_slots:
            self.events[: event_slots * SLOT_SIZE] = bytes(event_slots * SLOT_SIZE)
        for i in range(record_slots):
            _LENGTH.pack_into(self.records, i * RECORD_SLOT_SIZE, 0)

    def _find_leftover(self) -> Leftover:
        events = [
            bytes(self._map[at : at + SLOT_SIZE])
            for at in range(_HEAD_SIZE, _HEAD_SIZE + _EVENTS_SIZE, SLOT_SIZE)
            if _LENGTH.unpack_from(self._map, at)[0] == uapi.DATAGRAM_SIZE
        ]
        records = []
        for at in range(_HEAD_SIZE + _EVENTS_SIZE, _SIZE, RECORD_SLOT_SIZE):
            length = _LENGTH.unpack_from(self._map, at)[0]
            if 0 < length <= RECORD_SLOT_SIZE:
                records.append(bytes(self._map[at : at + length]))
        return Leftover(b"".join(events), tuple(records))


def _map_file(path: Path) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(fd, 0, _SIZE)  # ENOSPC here, not SIGBUS later
        return mmap.mmap(fd, _SIZE, mmap.MAP_SHARED)
    finally:
        os.close(fd)
