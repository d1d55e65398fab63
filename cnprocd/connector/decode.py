"""Decode datagrams into events: the hottest code here, about half a microsecond an event. PURE.

The listener receives into slots of SLOT_SIZE bytes, one datagram a slot. It passes on only slots whose sender was the
kernel and whose length was right. Three integer comparisons check the rest: the netlink header, the connector id and
the payload size are each read as one integer and compared with the only value that the kernel ever sends. A datagram
that differs is dropped and counted.

struct.iter_unpack with one format for every event type is faster than a format per type. The union of struct
proc_event is six 32-bit words in all types but comm, whose 16 bytes are packed again from four of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from cnprocd.connector import uapi
from cnprocd.connector.event import Ack, Comm, Coredump, Event, Exec, Exit, Fork, Gid, Ptrace, Sid, Uid

SLOT_SIZE = 80  # 76 bytes, rounded up to keep slots 8-byte aligned; the spare bytes show a datagram that is too long

# head(nlmsg len, type, flags) id(idx, val) seq ack size(len, flags) what cpu timestamp_ns and the union as six words.
_SLOT = struct.Struct("=Q8xQIIIIIQ6I4x")
_SEQUENCE = struct.Struct("=24xI12xI36x")
_WORDS4 = struct.Struct("=4I")
assert _SLOT.size == _SEQUENCE.size == SLOT_SIZE

_HEAD = int(struct.unpack("=Q", struct.pack("=IHH", uapi.DATAGRAM_SIZE, uapi.NLMSG_DONE, 0))[0])
_ID = int(struct.unpack("=Q", struct.pack("=II", uapi.CN_IDX_PROC, uapi.CN_VAL_PROC))[0])
_SIZE = int(struct.unpack("=I", struct.pack("=HH", uapi.PROC_EVENT_SIZE, 0))[0])

_WORDS = 8  # a row's fields 5, 6, 7 are what, cpu and timestamp_ns; the union's words start here

# Event type and the end of its fields in a row: a slice of the row is the event.
_SHAPES: dict[int, tuple[type[tuple[int, ...]], int]] = {
    uapi.PROC_EVENT_FORK: (Fork, _WORDS + 4),
    uapi.PROC_EVENT_EXEC: (Exec, _WORDS + 2),
    uapi.PROC_EVENT_UID: (Uid, _WORDS + 4),
    uapi.PROC_EVENT_GID: (Gid, _WORDS + 4),
    uapi.PROC_EVENT_SID: (Sid, _WORDS + 2),
    uapi.PROC_EVENT_PTRACE: (Ptrace, _WORDS + 4),
    uapi.PROC_EVENT_COREDUMP: (Coredump, _WORDS + 4),
    uapi.PROC_EVENT_EXIT: (Exit, _WORDS + 6),
}


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


def decode(slots: memoryview | bytes, rejects: Rejects) -> list[Event]:
    """Return the events in `slots` (a whole number of SLOT_SIZE slots), in order. Others are counted in `rejects`."""
    events: list[Event] = []
    append = events.append
    new = tuple.__new__
    shapes = _SHAPES
    for row in _SLOT.iter_unpack(slots):
        if row[0] != _HEAD or row[1] != _ID or row[4] != _SIZE:
            rejects.wrong_id += 1
            continue
        shape = shapes.get(row[5])
        if shape is not None:
            append(new(shape[0], row[5 : shape[1]]))  # type: ignore[arg-type]  # a slice of the row is that NamedTuple
        elif row[5] == uapi.PROC_EVENT_COMM:
            comm = _WORDS4.pack(*row[_WORDS + 2 : _WORDS + 6]).partition(b"\0")[0]
            append(Comm(row[5], row[6], row[7], row[8], row[9], comm))
        elif row[5] == uapi.PROC_EVENT_NONE:
            append(Ack(row[5], row[6], row[7], row[8], row[3]))
            rejects.acknowledgements += 1
        else:
            rejects.unknown_event += 1
    return events


def sequences(slots: memoryview | bytes) -> Iterator[tuple[int, int]]:
    """Return (seq, cpu) of every slot, for sequence.py. Worth its cost only while gaps mean loss (the full mask)."""
    return _SEQUENCE.iter_unpack(slots)
