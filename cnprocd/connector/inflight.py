"""Keep the datagrams in flight, read from the kernel and not yet handled, where kill -9 does not lose them.

A datagram cannot be read twice. Between recvmmsg() and the spool's commit it exists only in the daemon's memory, and a
SIGKILL in that millisecond would lose it although the service manager keeps the socket. So the receive slots are a file
in the runtime directory, mapped MAP_SHARED: the kernel writes into the page cache, which outlives the process, without
an extra system call. That directory is in memory, because a write to a page of a file on a frozen disk waits
(ext4_page_mkwrite). When a batch has been handled its slots are blanked. The next daemon finds in the file exactly the
datagrams that were in flight. Handling one twice is harmless, because a job's key is the same both times.

One half of a death may come a batch before the other: an exit record before its event, or a death that waits for the
record of a sibling thread. The slots of those tasks are kept, moved to the front, until the death is complete; those of
records of leaders until their process ends. What is needed is named by thread id (needed.py). With many exits queued an
id can be there twice, so it is also named which records of it are decided.

The file is for one boot: with another boot id in its head its PIDs are meaningless. It survives the process, not the
machine, so it needs neither fsync nor a disk. Exit records of more tasks than half the slots go to a log beside it
(record_log.py). Of more deaths than half the event slots that wait for a sibling's record, the record alone is kept:
the next daemon takes the event for lost.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from cnprocd.connector import uapi
from cnprocd.connector.decode import SLOT_SIZE
from cnprocd.connector.needed import NOTHING_NEEDED, Needed
from cnprocd.connector.record_log import LEAST_MESSAGE, TID_AT, RecordLog
from cnprocd.connector.taskrecord import RECORD_SLOT_SIZE

EVENT_SLOTS = 512  # at 40 bytes an event in Python a batch's list stays in cache, and 512 need one system call
RECORD_SLOTS = 512
_HEAD_SIZE = 64  # "cnprocd1" and the boot id
_MAGIC = b"cnprocd1"
_EVENTS_SIZE = EVENT_SLOTS * SLOT_SIZE
_SIZE = _HEAD_SIZE + _EVENTS_SIZE + RECORD_SLOTS * RECORD_SLOT_SIZE
_LENGTH = struct.Struct("=I")  # nlmsg_len, the first word of a slot; 0 where the slot is blank
_WORD = 4
_BLANK = memoryview(array("I", [0] * RECORD_SLOTS))
_EXITED_TID_AT = uapi.OFFSET_DATA  # in a slot of an exit event


@dataclass(frozen=True, slots=True)
class Leftover:
    """The datagrams that the last daemon had in flight: event slots, and exit record messages."""

    events: bytes
    records: tuple[bytes, ...]


class InFlight:
    """The mapped slots. Without a path, or if there can be no file, plain memory, which a kill loses."""

    def __init__(self, path: Path | None = None, boot_id: str = "") -> None:
        self.durable = False
        self._map: mmap.mmap | None = None
        self._log: RecordLog | None = None  # only with the map: without it, a kill loses everything
        # It stays in the file until it has been handled, because this daemon may be killed as well.
        self.leftover = Leftover(b"", ())
        self.leftover_slots = 0, 0  # events and records; new ones are received behind these
        if path is not None:
            head = (_MAGIC + boot_id.encode()).ljust(_HEAD_SIZE, b"\0")
            try:
                log = RecordLog(path.with_name(f"{path.name}-records"), head)
                self._map, before = _map_file(path, head)
            except OSError:  # a full or read-only disk: the spool reports it, and the daemon works without the file
                pass
            else:
                self.durable, self._log = True, log
                self._find_leftover(before, log.leftover)
        view = memoryview(self._map or mmap.mmap(-1, _SIZE))
        self.events = view[_HEAD_SIZE : _HEAD_SIZE + _EVENTS_SIZE]
        self.records = view[_HEAD_SIZE + _EVENTS_SIZE :]

    def blank(
        self, event_slots: int, record_slots: int, needed: Needed = NOTHING_NEEDED, ahead: int = 0
    ) -> tuple[int, int]:
        """Blank the first `event_slots` and `record_slots`, except for what is needed.

        Return how many slots of each kind are kept. They are moved to the front, and behind them the next `ahead` event
        slots. Records go first: if the daemon is killed in between, the next one finds an event alone, whose job has
        the same key, and no record alone.
        """
        end = event_slots + ahead
        events, records = self.events[: end * SLOT_SIZE], self.records[: record_slots * RECORD_SLOT_SIZE]
        kept_records, decided = 0, needed.decided
        if self._log is not None and not self._log.is_empty:
            decided = self._log.forget(needed, _numbers(events, _EXITED_TID_AT, SLOT_SIZE).tolist())
        if needed.records and record_slots:
            wanted = _wanted_records(records, needed.records, decided)
            if len(wanted) > RECORD_SLOTS // 2:
                self._log_records(records, wanted[: -RECORD_SLOTS // 2])
            kept_records = _move_to_front(records, RECORD_SLOT_SIZE, wanted[-RECORD_SLOTS // 2 :])
        _blank(records, RECORD_SLOT_SIZE, kept_records)
        handled = self.events[: event_slots * SLOT_SIZE]
        wanted = _wanted_events(handled, needed.events) if needed.events and event_slots else []
        kept_events = _move_to_front(events, SLOT_SIZE, [*wanted[-EVENT_SLOTS // 2 :], *range(event_slots, end)])
        _blank(events, SLOT_SIZE, kept_events)
        return kept_events - ahead, kept_records

    def make_room(self) -> None:
        """Keep what is in the record slots in the log, and blank them: every slot is used, and more records come."""
        self._log_records(self.records, range(RECORD_SLOTS))
        _blank(self.records, RECORD_SLOT_SIZE, 0)

    def take_lost(self) -> int:
        """Return how many exit records the last daemons could not keep here, once."""
        return 0 if self._log is None else self._log.take_lost()

    def _log_records(self, slots: memoryview, numbers: Iterable[int]) -> None:
        if self._log is None:
            return
        lengths = _numbers(slots, 0, RECORD_SLOT_SIZE).tolist()
        whole = [i for i in numbers if LEAST_MESSAGE <= lengths[i] <= RECORD_SLOT_SIZE]
        self._log.append([bytes(slots[i * RECORD_SLOT_SIZE :][: lengths[i]]) for i in whole])

    def _find_leftover(self, file: bytes, logged: Iterable[bytes]) -> None:
        events: list[bytes] = []
        records = dict.fromkeys(logged)
        event_slots = record_slots = 0
        for i, at in enumerate(range(_HEAD_SIZE, _HEAD_SIZE + _EVENTS_SIZE, SLOT_SIZE)):
            if _LENGTH.unpack_from(file, at)[0] == uapi.DATAGRAM_SIZE:
                events.append(file[at : at + SLOT_SIZE])
                event_slots = i + 1
        for i, at in enumerate(range(_HEAD_SIZE + _EVENTS_SIZE, _SIZE, RECORD_SLOT_SIZE)):
            length = _LENGTH.unpack_from(file, at)[0]
            if 0 < length <= RECORD_SLOT_SIZE:
                # Once each: the daemon may have been killed while it moved a slot to the front.
                records[file[at : at + length]] = None
                record_slots = i + 1
        self.leftover = Leftover(b"".join(dict.fromkeys(events)), tuple(records))
        self.leftover_slots = event_slots, record_slots


def _wanted_records(slots: memoryview, keep: Set[int], decided: Sequence[int]) -> list[int]:
    """Return the numbers of the slots with records of these threads, without the oldest one for each of `decided`."""
    tids = _numbers(slots, TID_AT, RECORD_SLOT_SIZE).tolist()
    wanted = [i for i, tid in enumerate(tids) if tid in keep]
    for tid in decided:
        oldest = next((i for i in wanted if tids[i] == tid), None)
        if oldest is not None:
            wanted.remove(oldest)
    return wanted


def _wanted_events(slots: memoryview, keep: Set[int]) -> list[int]:
    """Return the numbers of the slots with the newest exit event of each of these threads."""
    tids = _numbers(slots, _EXITED_TID_AT, SLOT_SIZE).tolist()
    if keep.isdisjoint(tids):
        return []
    whats = _numbers(slots, uapi.OFFSET_WHAT, SLOT_SIZE).tolist()
    numbers = range(len(tids))
    exits = [(tid, i) for i, what, tid in zip(numbers, whats, tids, strict=True) if what == uapi.PROC_EVENT_EXIT]
    return sorted({tid: i for tid, i in exits if tid in keep}.values())


def _numbers(slots: memoryview, at: int, size: int) -> memoryview:
    """Return the 32-bit number at `at` of each slot."""
    return slots.cast("I")[at // _WORD :: size // _WORD]


def _blank(slots: memoryview, size: int, first: int) -> None:
    """Clear the lengths of the slots from the `first` on."""
    lengths = _numbers(slots, 0, size)[first:]
    if len(lengths):
        lengths[:] = _BLANK[: len(lengths)]


def _move_to_front(slots: memoryview, size: int, wanted: list[int]) -> int:
    """Move the wanted slots to the front, in order. Return how many these are.

    A kill at any instruction leaves a slot whole, twice or blank, because its length is cleared first and set last.
    """
    head = _LENGTH.size
    for to, at in enumerate(wanted):
        if to != at:
            _LENGTH.pack_into(slots, to * size, 0)
            slots[to * size + head : (to + 1) * size] = slots[at * size + head : (at + 1) * size]
            slots[to * size : to * size + head] = slots[at * size : at * size + head]
    return len(wanted)


def _map_file(path: Path, head: bytes) -> tuple[mmap.mmap, bytes]:
    """Return the mapped file and its content. The file is created anew if it is missing or of another boot."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.pread(fd, _HEAD_SIZE, 0) != head or os.fstat(fd).st_size != _SIZE:
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, _SIZE)  # ENOSPC here, not SIGBUS later
            os.pwrite(fd, head, 0)
        # Read, not copied from the map: pages that nothing is received into never become resident.
        return mmap.mmap(fd, _SIZE, mmap.MAP_SHARED), os.pread(fd, _SIZE, 0)
    finally:
        os.close(fd)
