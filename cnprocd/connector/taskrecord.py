"""Exit records of taskstats: bytes to values.

When a task ends, the kernel sends what it was, before anybody can reap it and before the connector's exit event: comm,
real uid and gid, parent, begin, CPU time, peak memory, I/O (kernel/taskstats.c taskstats_exit, called from do_exit).
Facts this decoder relies on (include/uapi/linux/taskstats.h; measured on 6.18):

- struct taskstats starts at byte 36 of the message and only ever grows at its end: but for version 15, which put new
  fields into its middle and was repaired by version 16. So 12, 13, 14 and 16+ are read by offset, 15 not at all.
- Since version 12 ac_flag bit AGROUP marks the record of a process's last thread, and ac_tgid names the process.
- Only that last record of a process that had threads carries a second struct, with the sums of the whole group.
- A record's comm is that thread's. The process's comm is the leader's, so a leader that ends first is kept too.
- CPU time is what the scheduler counted in nanoseconds (cpu_run_virtual_total). utime and stime are sampled by ticks,
  so a short process may show none; they serve where the kernel lacks delay accounting.
- With several threads dumping core the core flag may be on another thread's status than the last one's.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

TASKSTATS_CMD_NEW = 2
STRUCT_OFFSET = 36
MINIMUM_VERSION = 12
BROKEN_VERSIONS = frozenset({15})
_AGROUP = 0x20

# version ac_exitcode ac_flag | cpu_run_virtual_total | ac_comm | uid gid pid ppid | etime utime stime minflt majflt |
# hiwater_rss hiwater_vm read_char write_char | read_bytes write_bytes | btime64 | tgid tgetime exe_dev exe_inode
_STRUCT = struct.Struct("=H2xIB55x8xQ32s8x4I8x5Q16x4Q16x2Q80xQ16xI4x3Q")
_HEAD = struct.Struct("=IHHIIBBHHHHHIHH")  # nlmsghdr, genlmsghdr, AGGR_PID, PID, value, STATS
_GROUP_CPU = struct.Struct("=Q")
_GROUP_STRUCT = 16  # AGGR_TGID 4, TGID 4 + 4, STATS 4
_CPU_RUN_VIRTUAL_TOTAL = 72
assert _STRUCT.size == 400


class TaskRecord(NamedTuple):
    """What the kernel accounted to one task at its death. Ids are of the initial namespaces, times as named."""

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


class UnreadableRecordError(ValueError):
    """The message is not an exit record of a layout this version knows."""


def decode_record(message: memoryview | bytes, family: int) -> TaskRecord:
    """The task record in one netlink message. Raises UnreadableRecordError for anything else."""
    if len(message) < STRUCT_OFFSET + _STRUCT.size:
        raise UnreadableRecordError(f"{len(message)} bytes are too few for a record")
    head = _HEAD.unpack_from(message)
    aggregate_length = head[8]
    if head[1] != family or head[5] != TASKSTATS_CMD_NEW:
        raise UnreadableRecordError(f"netlink type {head[1]}, command {head[5]} is no exit record")
    values = _STRUCT.unpack_from(message, STRUCT_OFFSET)
    version, status, flag = values[:3]
    if version < MINIMUM_VERSION or version in BROKEN_VERSIONS:
        raise UnreadableRecordError(f"taskstats version {version} has another layout")
    if head[12] != values[7]:
        raise UnreadableRecordError("the record is not about the task it names")
    group = 20 + (aggregate_length + 3 & ~3)
    threaded = len(message) >= group + _GROUP_STRUCT + _CPU_RUN_VIRTUAL_TOTAL + 8
    cpu_time_us = values[3] // 1000 or values[10] + values[11]
    if threaded:
        group_cpu_ns = _GROUP_CPU.unpack_from(message, group + _GROUP_STRUCT + _CPU_RUN_VIRTUAL_TOTAL)[0]
        cpu_time_us = max(cpu_time_us, group_cpu_ns // 1000)
    return TaskRecord(
        pid=values[7],
        tgid=values[21],
        ppid=values[8],
        status=status,
        last=bool(flag & _AGROUP),
        threaded=threaded,
        comm=values[4].partition(b"\0")[0].decode("utf-8", "surrogateescape"),
        uid=values[5],
        gid=values[6],
        begin_time_s=values[20],
        lifetime_us=values[22],
        cpu_time_us=cpu_time_us,
        max_rss_kib=values[14],
        read_bytes=values[18],
        write_bytes=values[19],
        minor_faults=values[12],
        major_faults=values[13],
        exe_device=values[23],
        exe_inode=values[24],
    )
