"""Decode the exit records of taskstats. PURE.

When a task ends, the kernel sends its comm, real uid and gid, parent, begin, CPU time, peak memory and I/O, before its
parent can reap it and before the connector's exit event (kernel/taskstats.c taskstats_exit, called from do_exit).
Facts that this decoder relies on (include/uapi/linux/taskstats.h; measured on 6.18):

- struct taskstats starts at byte 36 of the message and grows only at its end. The exception is version 15, which put
  new fields into the middle; version 16 reverted that. So 12, 13, 14 and 16+ are read by offset, and 15 not at all.
- Since version 12 ac_flag bit AGROUP marks the record of a process's last thread, and ac_tgid names the process.
- Only that last record of a process that had threads carries a second struct, with the sums of the whole group.
- A record's comm is that thread's. The process's comm is the leader's, so the record of a leader that ends first is
  kept as well.
- CPU time is the scheduler's count in nanoseconds (cpu_run_virtual_total). utime and stime are sampled by ticks, so
  they may be 0 for a short process; they are used if the kernel lacks delay accounting.
- If a process with threads dumps core, the core flag may be on another thread's status than the last one's.

Most records are of whole processes whose name no rule asks for. RecordReader looks at a few fields of a record first
and passes over such a record: only its process id is returned, so that its exit event is known to need no answer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TASKSTATS_CMD_NEW = 2
STRUCT_OFFSET = 36
MINIMUM_VERSION = 12
BROKEN_VERSIONS = frozenset({15})
_AGROUP = 0x20

# nlmsg type and flags | command | head of AGGR_PID | head of PID | PID | head of STATS, and of the struct:
# version ac_exitcode ac_flag | cpu_run_virtual_total | ac_comm | uid gid pid ppid | utime stime minflt majflt |
# hiwater_rss | read_bytes write_bytes | btime64 | tgid tgetime exe_dev exe_inode
_MESSAGE = struct.Struct("=4xI8x5I" + "H2xIB55x8xQ32s8x4I16x4Q16xQ40x2Q80xQ16xI4x3Q")
_TYPE_PID, _TYPE_STATS, _TYPE_AGGR_PID, _TYPE_AGGR_TGID = 1, 3, 4, 5
_TYPE_MASK = 0x3FFF  # the two bits above are flags of netlink, not part of the attribute type
_WORD, _PAIR = struct.Struct("=I"), struct.Struct("=HH")
_GROUP_HEAD = struct.Struct("=2xH")
_GROUP_CPU = struct.Struct("=Q")
_GROUP_STRUCT = 16  # AGGR_TGID 4, TGID 4 + 4, STATS 4
_CPU_RUN_VIRTUAL_TOTAL = 72
_GROUP_MINIMUM = _GROUP_STRUCT + _CPU_RUN_VIRTUAL_TOTAL + 8
assert _MESSAGE.size == STRUCT_OFFSET + 400
RECORD_SLOT_SIZE = 2048  # a record of version 16 with its group struct is 1172 bytes
# Of every slot: nlmsg type and flags | command and heads of AGGR_PID and PID | PID | head of STATS and version |
# ac_exitcode | ac_flag | ac_comm | pid | tgid
_LOOK = struct.Struct("=4x4s8x12sI6s2xIB71x32s16xI236xI1640x")
assert _LOOK.size == RECORD_SLOT_SIZE
_WHO = struct.Struct("=116x32s8x8s4xI248x16s")  # ac_comm | uid gid | ppid | exe_dev exe_inode
_IDS, _FILE = struct.Struct("=2I"), struct.Struct("=2Q")
assert _WHO.size == _MESSAGE.size
_REMEMBERED_COMMS = 4096


class TaskRecord(NamedTuple):
    """The kernel's accounting of one task at its death. Ids are of the initial namespaces."""

    pid: int  # thread id
    tgid: int
    ppid: int
    status: int  # this thread's wait status
    last: bool  # the process's last thread
    threaded: bool  # the process had more than one thread
    comm: str  # undecodable bytes as lone surrogates
    uid: int  # real
    gid: int  # real
    begin_time_s: int  # seconds since 1970
    lifetime_us: int  # of the process, up to now
    cpu_time_us: int  # user and system, of all its dead threads if `last`
    max_rss_kib: int
    read_bytes: int  # from storage
    write_bytes: int  # to storage
    minor_faults: int
    major_faults: int
    exe_device: int
    exe_inode: int


class Who(NamedTuple):
    """Who ended, as far as one look at its exit record shows. The bytes are those of the record."""

    comm: bytes  # filled up with zeros
    ids: bytes  # real user and group
    ppid: int
    file: bytes  # device and inode of the program

    @classmethod
    def in_message(cls, message: bytes | memoryview, at: int = 0) -> Who:
        """Look at the record that begins at this byte."""
        return cls._make(_WHO.unpack_from(message, at))

    @classmethod
    def of(cls, record: TaskRecord) -> Who:
        """Return what a look at this record has shown."""
        comm = record.comm.encode("utf-8", "surrogateescape").ljust(32, b"\0")
        ids, file = _IDS.pack(record.uid, record.gid), _FILE.pack(record.exe_device, record.exe_inode)
        return cls(comm, ids, record.ppid, file)


class UnreadableRecordError(ValueError):
    """The message is not an exit record of a layout this version knows."""


_Heads = tuple[int, int, int, int, int, int, int]
_GROUP_OFFSETS: dict[_Heads, int] = {}
"""Offset of the second struct, by the heads of a message that was found valid. A kernel has one or two."""


def decode_record(message: memoryview | bytes, family: int) -> TaskRecord:
    """Return the task record in one netlink message. Raises UnreadableRecordError for anything else."""
    if len(message) < _MESSAGE.size:
        raise UnreadableRecordError(f"{len(message)} bytes are too few for a record")
    (
        kind, command, aggregate, pid_head, named, stats_head, version, status, flag, cpu_ns, comm, uid, gid, pid, ppid,
        utime_us, stime_us, minor_faults, major_faults, max_rss_kib, read_bytes, write_bytes, begin_time_s, tgid,
        lifetime_us, exe_device, exe_inode,
    ) = _MESSAGE.unpack_from(message)  # fmt: skip
    heads = (family, kind, command, aggregate, pid_head, stats_head, version)
    group = _GROUP_OFFSETS.get(heads)
    if group is None:
        group = _GROUP_OFFSETS[heads] = _group_offset(heads)
    if named != pid:
        raise UnreadableRecordError("the record is not about the task it names")
    cpu_time_us = cpu_ns // 1000 or utime_us + stime_us
    threaded = len(message) >= group + _GROUP_MINIMUM and (
        _GROUP_HEAD.unpack_from(message, group)[0] & _TYPE_MASK == _TYPE_AGGR_TGID
    )
    if threaded:
        group_cpu_ns = _GROUP_CPU.unpack_from(message, group + _GROUP_STRUCT + _CPU_RUN_VIRTUAL_TOTAL)[0]
        cpu_time_us = max(cpu_time_us, group_cpu_ns // 1000)
    # A third of the cost of TaskRecord(...) with names. The order is that of its fields.
    return tuple.__new__(
        TaskRecord,
        (
            pid, tgid, ppid, status, flag & _AGROUP != 0, threaded,
            comm.partition(b"\0")[0].decode("utf-8", "surrogateescape"), uid, gid, begin_time_s, lifetime_us,
            cpu_time_us, max_rss_kib, read_bytes, write_bytes, minor_faults, major_faults, exe_device, exe_inode,
        ),
    )  # fmt: skip


class Shed(NamedTuple):
    """A process whose end is counted by a look at its record."""

    pid: int
    counted_as: Any
    message: bytes  # its record


@dataclass(slots=True)
class ReadRecords:
    """The exit records of some messages."""

    records: list[TaskRecord] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)  # PIDs of whole processes that ended and that no rule asks for
    shed: list[Shed] = field(default_factory=list)  # of those that are passed over as well, because `sheds` said so
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.records) + len(self.passed)

    def keep_shed(self, decode: Callable[[bytes], TaskRecord], pids: Collection[int] | None = None) -> None:
        """Return the records that were shed to the others: what decided about them does not hold. `pids`: of these."""
        kept = [one for one in self.shed if pids is None or one.pid in pids]
        gone = {one.pid for one in kept}
        self.passed = [pid for pid in self.passed if pid not in gone]
        self.shed = [one for one in self.shed if one.pid not in gone]
        self.records += [decode(one.message) for one in kept]

    def add(self, other: ReadRecords) -> None:
        """Add later ones."""
        self.records += other.records
        self.passed += other.passed
        self.shed += other.shed
        self.unreadable += other.unreadable


AsksFor = Callable[[str, int], bool]
"""Whether the record of a whole process with this comm and wait status is needed."""
Sheds = Callable[[int, int, Who], Any]
"""Given PID, wait status and look of a whole process: what its end is counted as, or None if its record is needed."""


class RecordReader:
    """Reads exit records, and passes over those of whole processes whose name no rule asks for."""

    def __init__(self, family: int) -> None:
        self._family = family
        self._asks_for: AsksFor | None = None
        self._unasked: set[bytes] = set()  # comms as records have them
        self._unasked_successes: set[bytes] = set()  # comms of processes that are asked for only if they fail
        self._frame: tuple[bytes, bytes, bytes, int] | None = None  # heads and length of a single-threaded process's
        self.sheds: Sheds | None = None  # in a flood

    def pass_over(self, asks_for: AsksFor | None) -> None:
        """Pass over processes for whose comm and status this returns False. None: read every record."""
        self._asks_for = asks_for
        self._unasked.clear()
        self._unasked_successes.clear()

    def read(self, slots: memoryview, lengths: Sequence[int]) -> ReadRecords:
        """Return the records in slots of RECORD_SLOT_SIZE bytes. A length of 0 marks a slot without one."""
        found = ReadRecords()
        at, frame, pass_over = 0, self._frame, found.passed.append
        unasked, unasked_successes, sheds = self._unasked, self._unasked_successes, self.sheds
        for (kind, heads, named, stats, status, flag, comm, pid, tgid), length in zip(
            _LOOK.iter_unpack(slots), lengths, strict=True
        ):
            is_unasked = comm in unasked or (status == 0 and comm in unasked_successes)
            # A leader that was the last thread, in a record laid out as a valid one was.
            is_whole = (is_unasked or sheds) and named == pid == tgid and flag & _AGROUP
            if (
                is_whole
                and (kind, heads, stats, length) == frame
                and (is_unasked or _is_shed(found, sheds, pid, status, slots, at))
            ):
                pass_over(pid)
            elif length:
                self._decode(slots[at : at + length], found)
                frame = self._frame
            at += RECORD_SLOT_SIZE
        if found.passed and is_repeated(found):
            return self.decode([slots[i * RECORD_SLOT_SIZE :][:length] for i, length in enumerate(lengths) if length])
        return found

    def decode(self, messages: Iterable[memoryview | bytes]) -> ReadRecords:
        """Return every record of these messages, in order."""
        found = ReadRecords()
        for message in messages:
            self._decode(message, found)
        return found

    def decode_one(self, message: bytes) -> TaskRecord:
        """Decode a record that was looked at. Raises UnreadableRecordError."""
        return decode_record(message, self._family)

    def _decode(self, message: memoryview | bytes, found: ReadRecords) -> None:
        try:
            record = decode_record(message, self._family)
        except UnreadableRecordError:
            found.unreadable += 1
            return
        found.records.append(record)
        asks_for = self._asks_for
        if not record.last or record.threaded or asks_for is None:
            return
        is_unasked = not asks_for(record.comm, record.status)
        if is_unasked or self._frame is None:
            kind, heads, _, stats, _, _, comm, _, _ = _LOOK.unpack_from(bytes(message).ljust(RECORD_SLOT_SIZE, b"\0"))
            self._frame = kind, heads, stats, len(message)
        if is_unasked:
            if len(self._unasked) + len(self._unasked_successes) >= _REMEMBERED_COMMS:
                self._unasked.clear()
                self._unasked_successes.clear()
            (self._unasked_successes if record.status == 0 else self._unasked).add(comm)


def _is_shed(found: ReadRecords, sheds: Sheds | None, pid: int, status: int, slots: memoryview, at: int) -> bool:
    """Return whether the record in the slot at this offset is not needed, and keep what the end is counted as."""
    counted_as = sheds(pid, status, Who.in_message(slots, at)) if sheds is not None else None
    if counted_as is None:
        return False
    found.shed.append(Shed(pid, counted_as, bytes(slots[at : at + _MESSAGE.size])))
    return True


def is_repeated(found: ReadRecords) -> bool:
    """Return whether a PID was reused within a batch: then the order of its records counts."""
    passed = set(found.passed)
    return len(passed) < len(found.passed) or not passed.isdisjoint([record.pid for record in found.records])


def _group_offset(heads: _Heads) -> int:
    """Check the heads, which are the same in all messages of one kernel. Raises UnreadableRecordError."""
    family, kind, command, aggregate, pid_head, stats_head, version = heads
    netlink_type, genl_command = _PAIR.unpack(_WORD.pack(kind))[0], _WORD.pack(command)[0]
    if netlink_type != family or genl_command != TASKSTATS_CMD_NEW:
        raise UnreadableRecordError(f"netlink type {netlink_type}, command {genl_command} is not an exit record")
    lengths, types = zip(*(_PAIR.unpack(_WORD.pack(head)) for head in (aggregate, pid_head, stats_head)), strict=True)
    if (
        [kind & _TYPE_MASK for kind in types] != [_TYPE_AGGR_PID, _TYPE_PID, _TYPE_STATS]
        or lengths[1] != 8
        or lengths[2] < 4 + _MESSAGE.size - STRUCT_OFFSET
        or lengths[0] < 12 + lengths[2]
    ):  # such as a kernel that pads before the struct: then no field is at its offset
        raise UnreadableRecordError("its attributes are not those of one exit record")
    if version < MINIMUM_VERSION or version in BROKEN_VERSIONS:
        raise UnreadableRecordError(f"taskstats version {version} has another layout")
    if len(_GROUP_OFFSETS) > 64:
        _GROUP_OFFSETS.clear()
    return int(20 + (lengths[0] + 3 & ~3))
