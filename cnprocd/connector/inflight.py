"""What was read from the kernel and is not yet settled, kept where kill -9 cannot reach it.

A datagram cannot be read twice. Between recvmmsg() and the spool's commit it exists only in our memory, and a SIGKILL
in that millisecond would lose it although the socket itself is kept by the service manager. So the receive slots are a
file mapped MAP_SHARED in the state directory: what the kernel writes into them is in the page cache, which outlives the
process, at the price of no system call. When a batch is settled its slots are blanked; whoever starts next finds in
them exactly what was in hand. Handling something twice is harmless: a job's key is the same both times.

Half of a death may come a batch before the other half: an exit record before its event, or a death that waits for what
a sibling thread's record will tell. The slots of those tasks are kept, moved to the front, until they are settled too.

The file is for one boot: another boot id in its head means that its PIDs mean nothing any more. It survives the
process, not the machine, and needs neither fsync nor a disk. What it does not cover: a leader that ended long before
its process, whose record is in memory alone; and halves of more tasks than half the slots.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cnprocd.connector import uapi
from cnprocd.connector.decode import SLOT_SIZE

EVENT_SLOTS = 512  # at 40 bytes an event in Python a batch's list stays in cache, and 512 need one system call
RECORD_SLOTS = 512
RECORD_SLOT_SIZE = 2048  # a record of version 16 with its group struct is 1172 bytes
_HEAD_SIZE = 64  # "cnprocd1" and the boot id
_MAGIC = b"cnprocd1"
_EVENTS_SIZE = EVENT_SLOTS * SLOT_SIZE
_SIZE = _HEAD_SIZE + _EVENTS_SIZE + RECORD_SLOTS * RECORD_SLOT_SIZE
_LENGTH = struct.Struct("=I")  # nlmsg_len, the first word of a slot; 0 where the slot is blank
_EXITED_SLOT = struct.Struct("=36xI12xI24x")  # what, and for an exit the thread id (uapi.py)
_RECORDED = struct.Struct("=164xI")  # ac_pid (taskrecord.py)


@dataclass(frozen=True, slots=True)
class Leftover:
    """What the last process had in hand: event slots, and exit record messages."""

    events: bytes
    records: tuple[bytes, ...]


class InFlight:
    """The mapped slots. Without a path, or if there can be no file, plain memory: a kill then costs what is in hand."""

    def __init__(self, path: Path | None = None, boot_id: str = "") -> None:
        self.durable = False
        self._map: mmap.mmap | None = None
        # It stays in the file until it is settled: we may be killed as well.
        self.leftover = Leftover(b"", ())
        self.leftover_slots = 0, 0  # events and records: new ones go behind these
        if path is not None:
            try:
                self._map, before = _map_file(path, (_MAGIC + boot_id.encode()).ljust(_HEAD_SIZE, b"\0"))
            except OSError:  # a full or read-only disk: the spool tells of it, and the work goes on
                pass
            else:
                self.durable = True
                self._find_leftover(before)
        view = memoryview(self._map or mmap.mmap(-1, _SIZE))
        self.events = view[_HEAD_SIZE : _HEAD_SIZE + _EVENTS_SIZE]
        self.records = view[_HEAD_SIZE + _EVENTS_SIZE :]

    def blank(self, event_slots: int, record_slots: int, keep: Collection[int] = ()) -> tuple[int, int]:
        """The first so many slots are settled, but for what tells of the exits of the threads in `keep`.

        Returns how many slots of each kind are kept, at the front.
        """
        if not keep:
            if event_slots:
                self.events[: event_slots * SLOT_SIZE] = bytes(event_slots * SLOT_SIZE)
            for i in range(record_slots):
                _LENGTH.pack_into(self.records, i * RECORD_SLOT_SIZE, 0)
            return 0, 0
        exits = [
            i
            for i, (what, tid) in enumerate(_EXITED_SLOT.iter_unpack(self.events[: event_slots * SLOT_SIZE]))
            if what == uapi.PROC_EVENT_EXIT and tid in keep
        ]
        records = [
            i for i in range(record_slots) if _RECORDED.unpack_from(self.records, i * RECORD_SLOT_SIZE)[0] in keep
        ]
        return (
            _keep(self.events, SLOT_SIZE, event_slots, exits[-EVENT_SLOTS // 2 :]),
            _keep(self.records, RECORD_SLOT_SIZE, record_slots, records[-RECORD_SLOTS // 2 :]),
        )

    def _find_leftover(self, file: bytes) -> None:
        events: list[bytes] = []
        records: dict[bytes, None] = {}
        event_slots = record_slots = 0
        for i, at in enumerate(range(_HEAD_SIZE, _HEAD_SIZE + _EVENTS_SIZE, SLOT_SIZE)):
            if _LENGTH.unpack_from(file, at)[0] == uapi.DATAGRAM_SIZE:
                events.append(file[at : at + SLOT_SIZE])
                event_slots = i + 1
        for i, at in enumerate(range(_HEAD_SIZE + _EVENTS_SIZE, _SIZE, RECORD_SLOT_SIZE)):
            length = _LENGTH.unpack_from(file, at)[0]
            if 0 < length <= RECORD_SLOT_SIZE:
                # Once each: a slot may have been on its way to the front when the process was killed.
                records[file[at : at + length]] = None
                record_slots = i + 1
        self.leftover = Leftover(b"".join(dict.fromkeys(events)), tuple(records))
        self.leftover_slots = event_slots, record_slots


def _keep(slots: memoryview, size: int, used: int, wanted: list[int]) -> int:
    """Move the wanted slots of the used ones to the front, in order, and blank the others. Returns how many there are.

    A kill at any instruction leaves a slot whole, twice or blank: its length is taken away first and given last.
    """
    head = _LENGTH.size
    for to, at in enumerate(wanted):
        if to != at:
            _LENGTH.pack_into(slots, to * size, 0)
            slots[to * size + head : (to + 1) * size] = slots[at * size + head : (at + 1) * size]
            slots[to * size : to * size + head] = slots[at * size : at * size + head]
    for i in range(len(wanted), used):
        _LENGTH.pack_into(slots, i * size, 0)
    return len(wanted)


def _map_file(path: Path, head: bytes) -> tuple[mmap.mmap, bytes]:
    """The file in memory, and what it holds now; made new if it is of another boot or no such file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.pread(fd, _HEAD_SIZE, 0) != head or os.fstat(fd).st_size != _SIZE:
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, _SIZE)  # ENOSPC here, not SIGBUS later
            os.pwrite(fd, head, 0)
        # Read, not looked at through the map: pages that are never received into never become ours.
        return mmap.mmap(fd, _SIZE, mmap.MAP_SHARED), os.pread(fd, _SIZE, 0)
    finally:
        os.close(fd)
