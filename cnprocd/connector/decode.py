"""Decode datagrams into rows and events. PURE.

The listener receives into slots of SLOT_SIZE bytes, one datagram a slot. It passes on only slots whose sender was the
kernel and whose length was right. Three integer comparisons check the rest: the netlink header, the connector id and
the payload size are each read as one integer and compared with the only value that the kernel ever sends. `rows` makes
each comparison once for a whole batch, over every SLOT_SIZE bytes of the memory. Only if a batch differs, each datagram
is checked alone; one that differs is dropped and counted.

One struct format for every event type is faster than a format per type. The union of struct proc_event is six 32-bit
words in all types but comm, whose 16 bytes are packed again from four of them.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from cnprocd.connector import uapi
from cnprocd.connector.event import KNOWN, Ack, Event, Row, named

SLOT_SIZE = 80  # 76 bytes, rounded up to keep slots 8-byte aligned; the spare bytes show a datagram that is too long

_ROW = struct.Struct("=36xIIQ6I4x")  # what cpu timestamp_ns and the union as six words: see event.Row
_FRAME = struct.Struct("=Q8xQ4xIII")  # head(nlmsg len, type, flags) id(idx, val) ack size(len, flags) what
_SEQUENCE = struct.Struct("=24xI12xI36x")
assert _ROW.size == _SEQUENCE.size == SLOT_SIZE

_HEAD = int(struct.unpack("=Q", struct.pack("=IHH", uapi.DATAGRAM_SIZE, uapi.NLMSG_DONE, 0))[0])
_ID = int(struct.unpack("=Q", struct.pack("=II", uapi.CN_IDX_PROC, uapi.CN_VAL_PROC))[0])
_SIZE = int(struct.unpack("=I", struct.pack("=HH", uapi.PROC_EVENT_SIZE, 0))[0])

# What a batch is compared with: where each number begins and how far apart it is, in units of its own size.
_MOST = 1024  # slots of one comparison
_HEADS, _HEAD_AT, _QUADS = memoryview(array("Q", [_HEAD] * _MOST)), 0, SLOT_SIZE // 8
_IDS, _ID_AT = memoryview(array("Q", [_ID] * _MOST)), uapi.NLMSGHDR.size // 8
_SIZES, _SIZE_AT, _WORDS = memoryview(array("I", [_SIZE] * _MOST)), 32 // 4, SLOT_SIZE // 4
_WHAT_AT = uapi.OFFSET_WHAT // 4


@dataclass(slots=True)
class Rejects:
    """Counters of dropped datagrams, by reason. They only grow; the pipeline logs their growth as `spoofed`."""

    foreign_sender: int = 0  # nl_pid != 0: a process multicast it, not the kernel
    wrong_length: int = 0
    truncated: int = 0
    wrong_id: int = 0  # netlink header, cb_id or payload size are not those of the proc connector
    unknown_event: int = 0  # an event type that this version does not know
    acknowledgements: int = 0  # not rejected, and not events either

    def total(self) -> int:
        return self.foreign_sender + self.wrong_length + self.truncated + self.wrong_id + self.unknown_event


def rows(slots: memoryview | bytes, rejects: Rejects) -> list[Row]:
    """Return the events in `slots` (a whole number of SLOT_SIZE slots), in order. Others are counted in `rejects`.

    Where every slot holds an event of a known type, these are rows. Else they are named events.
    """
    view = memoryview(slots)
    count = len(view) // SLOT_SIZE
    quads, words = view.cast("Q"), view.cast("I")
    if (
        quads[_HEAD_AT::_QUADS] == _HEADS[:count]
        and quads[_ID_AT::_QUADS] == _IDS[:count]
        and words[_SIZE_AT::_WORDS] == _SIZES[:count]
        and KNOWN.issuperset(words[_WHAT_AT::_WORDS])
    ):
        return list(_ROW.iter_unpack(view))
    return [event for event in decode(view, rejects) if not isinstance(event, Ack)]


def decode(slots: memoryview | bytes, rejects: Rejects) -> list[Event]:
    """Return the events in `slots`, acknowledgements included, each checked alone. Others are counted in `rejects`."""
    events: list[Event] = []
    for at, row in zip(range(0, len(slots), SLOT_SIZE), _ROW.iter_unpack(slots), strict=True):
        head, id_, ack, size, what = _FRAME.unpack_from(slots, at)
        if head != _HEAD or id_ != _ID or size != _SIZE:
            rejects.wrong_id += 1
        elif what in KNOWN:
            events.append(named(row))
        elif what == uapi.PROC_EVENT_NONE:
            events.append(Ack(what, row[1], row[2], row[3], ack))
            rejects.acknowledgements += 1
        else:
            rejects.unknown_event += 1
    return events


def sequences(slots: memoryview | bytes) -> Iterator[tuple[int, int]]:
    """Return (seq, cpu) of every slot, for sequence.py. Worth its cost only while gaps mean loss (the full mask)."""
    return _SEQUENCE.iter_unpack(slots)
