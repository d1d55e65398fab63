"""Datagrams of the proc connector: receive slots -> eventslots.py -> decode -> tracker.take.

Invariant: a datagram gives no event and is counted in exactly one counter if its sender is not the kernel, its length
is not 76, it was truncated, or a fixed header word differs (netlink length, type, flags; connector id; payload length
and flags). Every other datagram gives exactly the event that struct reads at the offsets of the C header, in order, or
is counted as unknown. The tracker does not raise. It returns only kinds that the rules need, and never a status that no
event of that process had. Its memory is bounded by the number of processes in the events.

One execution is one datagram: each is mutated on its own, and its expected event or counter is computed independently
and compared. They pass a replacement of recvmmsg and decode in batches, because the code takes batches.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
from dataclasses import replace
from itertools import count as numbers
from typing import Any, cast

from fuzz.target import Target
from unit.connector.wire import WHAT, datagram, proc_event

from cnprocd.connector.decode import SLOT_SIZE, Rejects, decode, rows
from cnprocd.connector.event import Ack, Comm, Coredump, Exec, Exit, Fork, Gid, Ptrace, Sid, Uid, named
from cnprocd.connector.eventslots import EventSlots
from cnprocd.connector.recvmmsg import HEADER_SIZE
from cnprocd.connector.request import Features
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.model import EVERYTHING, Process, Wanted
from cnprocd.process.tracker import Tracker
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleFileModel
from cnprocd.rules.plan import make_plan

BATCH = 512
_MSG_TRUNC = 0x20
_NAME = struct.Struct("=HHII")  # struct sockaddr_nl
_LEN_AT, _FLAGS_AT = 56, 48  # in struct mmsghdr of a 64-bit machine: msg_len, msg_hdr.msg_flags
_VALID = datagram(proc_event("fork"))
_FIXED = tuple((at, _VALID[at : at + size]) for at, size in ((0, 8), (16, 8), (32, 4)))
_LAYOUT = {  # what -> its event and, from byte 36, its fields in the C header's words
    WHAT["fork"]: (Fork, struct.Struct("=IIQIIII")),
    WHAT["exec"]: (Exec, struct.Struct("=IIQII")),
    WHAT["uid"]: (Uid, struct.Struct("=IIQIIII")),
    WHAT["gid"]: (Gid, struct.Struct("=IIQIIII")),
    WHAT["sid"]: (Sid, struct.Struct("=IIQII")),
    WHAT["ptrace"]: (Ptrace, struct.Struct("=IIQIIII")),
    WHAT["coredump"]: (Coredump, struct.Struct("=IIQIIII")),
    WHAT["exit"]: (Exit, struct.Struct("=IIQIIIIII")),
    WHAT["comm"]: (Comm, struct.Struct("=IIQII16s")),
    WHAT["ack"]: (Ack, struct.Struct("=IIQI")),
}
_WHATS = tuple(WHAT.values())
_EVENT = struct.Struct("=IIQ6I")
_WORDS = (0, 1, 2, 3, 4, 40, 76, 80, 0x20000000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF)
_ALL_KINDS = "fork exec uid gid sid ptrace comm coredump exit".split()


def expected(slot: bytes) -> tuple[type, tuple] | str:
    """Return the result that decode must give for a slot: a type and its fields, or the name of the counter."""
    if any(slot[at : at + len(fixed)] != fixed for at, fixed in _FIXED):
        return "wrong_id"
    found = _LAYOUT.get(int.from_bytes(slot[36:40], sys.byteorder))
    if found is None:
        return "unknown_event"
    kind, layout = found
    fields = layout.unpack_from(slot, 36)
    if kind is Comm:
        fields = (*fields[:-1], fields[-1].split(b"\0")[0])
    elif kind is Ack:
        fields = (*fields, int.from_bytes(slot[28:32], sys.byteorder))
    return kind, fields


class Proc:
    """A /proc with random answers."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng.random

    def read(self, tgid, wanted, source):
        if self._random() < 0.5:
            return None
        return Process(tgid, 1, None if self._random() < 0.3 else 5, "p\udcff", source, 0, 0, source, threads=1)

    def read_parent(self, tgid):
        return self.read(tgid, Wanted(), "procfs")

    def zombie(self, tgid, ended_ns, wanted):
        return None

    def is_alive(self, tgid):
        return self._random() < 0.5

    is_ending = is_alive


class Datagrams(Target):
    name = "datagrams"
    executions = 5_000_000

    def __init__(self) -> None:
        super().__init__()
        self._slots = EventSlots(BATCH)
        inner = self._slots._slots
        self._view, self._names, self._headers = inner.view, inner.names, inner.headers
        self._clean_headers = bytes(inner.headers)
        self._clean_names = _NAME.pack(socket.AF_NETLINK, 0, 0, 1) * BATCH
        self._batch: tuple[bytes, dict[int, tuple[int, int, int]]] = (b"", {})
        inner._recvmmsg = cast(Any, self._received)  # in place of the kernel
        rules = [
            {"name": "processes", "events": "all"},
            {"name": "threads", "events": "all", "threads": True},
        ]
        matcher = Matcher(plain(RuleFileModel.model_validate({"rules": rules}).rules))
        self._trackings = [
            replace(make_plan(matcher, Features(taskstats=records)).tracking, table=table, wanted=EVERYTHING)
            for records, table in ((True, True), (False, True), (True, False))
        ]
        self._rounds = numbers()

    def made(self) -> list[bytes]:
        return [datagram(proc_event(member, 1, 10**12)).ljust(SLOT_SIZE, b"\0") for member in WHAT]

    # One datagram.

    def check(self, data: bytes) -> None:
        slot = data[:SLOT_SIZE].ljust(SLOT_SIZE, b"\0")
        self._decoded(slot, [expected(slot)], {})

    def mutated(self, rng: random.Random) -> bytes:
        chance, bits = rng.random(), rng.getrandbits
        if chance < 0.45:  # a valid one; few PIDs, so that histories overlap
            pids = [bits(32) if rng.random() < 0.02 else 1 + bits(5) for _ in range(4)]
            if chance < 0.2:
                pids[1] = pids[0]
                pids[3] = pids[2]
            what = _WHATS[int(rng.random() * len(_WHATS))]
            if what == 0x80000000:
                pids[2], pids[3] = bits(16) if bits(1) else (9, 11 | 0x80, 256, 0)[bits(2)], 17
            event = _EVENT.pack(
                what, bits(4), 10**12 + bits(34), *pids, 1 + bits(5), bits(32) if bits(1) else 1 + bits(5)
            )
            return _VALID[:36] + event + rng.randbytes(4)
        raw = bytearray(self.seeds[int(rng.random() * len(self.seeds))])
        if chance < 0.65:
            raw[int(rng.random() * 76)] ^= 1 << bits(3)
        elif chance < 0.8:
            at = 4 * int(rng.random() * 19)
            value = _WORDS[int(rng.random() * len(_WORDS))] if bits(1) else bits(32)
            raw[at : at + 4] = value.to_bytes(4, sys.byteorder)
        elif chance < 0.95:
            at, length = int(rng.random() * 76), 1 + bits(4)
            raw[at : at + length] = rng.randbytes(length)
            del raw[SLOT_SIZE:]
        else:
            raw[:] = rng.randbytes(SLOT_SIZE)
        return bytes(raw)

    # A batch of them.

    def run(self, rng: random.Random) -> int:
        number = next(self._rounds)
        if number % 40 == 0:
            self._begin(rng)
        mutated = self.mutated
        size = BATCH if rng.random() < 0.5 else 1 + int(rng.random() * BATCH)
        slots = [mutated(rng) for _ in range(size)]
        odd = {}
        if number & 1:
            for i in (int(rng.random() * size) for _ in range(int(rng.random() * 40))):
                odd[i] = self._odd(rng)
        self.last = data = b"".join(slots)
        events = self._decoded(data, [expected(slot) for slot in slots], odd)
        if number % 4 == 0:
            self._tracked(events, rng)
        return size

    @staticmethod
    def _odd(rng: random.Random) -> tuple[int, int, int]:
        """Return sender, flags and length of a datagram that (usually) differs from those of the kernel."""
        sender = rng.getrandbits(32) if rng.getrandbits(1) else 0
        flags = _MSG_TRUNC if rng.random() < 0.3 else 0
        return sender, flags, int(rng.random() * (SLOT_SIZE + 1)) if rng.getrandbits(1) else 76

    def _received(self, fd, headers, count, flags, timeout) -> int:
        """Replace recvmmsg(): write data, names, lengths and flags of the filled slots only."""
        data, odd = self._batch
        filled = len(data) // SLOT_SIZE
        self._view[: len(data)] = data
        self._headers[: filled * HEADER_SIZE] = self._clean_headers[: filled * HEADER_SIZE]
        self._names[: filled * _NAME.size] = self._clean_names[: filled * _NAME.size]
        for i, (sender, cut, length) in odd.items():
            _NAME.pack_into(self._names, i * _NAME.size, socket.AF_NETLINK, 0, sender, 1)
            struct.pack_into("=i", self._headers, i * HEADER_SIZE + _FLAGS_AT, cut)
            struct.pack_into("=I", self._headers, i * HEADER_SIZE + _LEN_AT, length)
        return filled

    def _decoded(self, data: bytes, wanted: list, odd: dict) -> list:
        rejects, counted, told = Rejects(), Rejects(), []
        for i, one in enumerate(wanted):
            reason = one if isinstance(one, str) else None
            if i in odd:
                sender, cut, length = odd[i]
                outside = (
                    "foreign_sender" if sender else "truncated" if cut else "wrong_length" if length != 76 else None
                )
                reason = outside or reason
            if reason is None:
                told.append(one)
                counted.acknowledgements += one[0] is Ack
            else:
                setattr(counted, reason, getattr(counted, reason) + 1)
        self._batch = data, odd
        view = self._slots.receive(-1, rejects)
        assert view is not None
        events = decode(view, rejects)
        assert [(type(event), tuple(event)) for event in events] == told
        assert rejects == counted, f"{rejects} {counted}"
        assert [named(row) for row in rows(view, Rejects())] == [event for event in events if type(event) is not Ack]
        return events

    # The tracker behind it.

    def _begin(self, rng: random.Random) -> None:
        self._tracking = self._trackings[int(rng.random() * len(self._trackings))]
        self._tracker = Tracker(self._tracking, Proc(rng), 31)
        self._statuses: dict[int, set[int]] = {}
        self._heard: set[int] = set()

    def _tracked(self, events: list, rng: random.Random) -> None:
        records = [record for event in events if type(event) is Exit for record in self._records(event, rng)]
        for event in events:
            if type(event) is Exit:
                self._statuses.setdefault(event.process_tgid, set()).add(event.exit_code & ~0x80)
        for record in records:
            self._statuses.setdefault(record.tgid, set()).add(record.status & ~0x80)
            self._heard.add(record.tgid)
        self._heard.update(event[6] if type(event) is Fork else event[4] for event in events if type(event) is not Ack)
        tracker, tracking = self._tracker, self._tracking
        latest = max((event.timestamp_ns for event in events), default=0)
        for occurrence in tracker.take(list(events), records, latest if rng.getrandbits(1) else None):
            self._occurred(occurrence, tracking)
        if rng.random() < 0.2:
            for occurrence in [*tracker.without_event(tracker.deaths.waiting()), *tracker.sweep(latest)]:
                self._occurred(occurrence, tracking)
        assert len(tracker.table) <= len(self._heard)

    def _occurred(self, occurrence, tracking) -> None:
        kinds = tracking.thread_kinds if occurrence.of_thread else tracking.kinds
        assert occurrence.kind in kinds
        assert occurrence.kind in _ALL_KINDS
        if occurrence.kind == "exit" and not occurrence.recovered:
            assert occurrence.status & ~0x80 in self._statuses[occurrence.process.tgid]
        assert occurrence.lifetime_s is None or occurrence.lifetime_s >= 0

    @staticmethod
    def _records(event: Exit, rng: random.Random) -> list[TaskRecord]:
        if rng.random() < 0.4:
            return []
        last, threaded = rng.random() < 0.7, rng.random() < 0.5
        status = event.exit_code if rng.random() < 0.9 else rng.getrandbits(16)
        ids = (event.process_pid, event.process_tgid, event.parent_tgid)
        return [TaskRecord(*ids, status, last, threaded, "a\udcff", 0, 0, 1, rng.getrandbits(40), *[0] * 8)]
