"""The ten event types of cn_proc.h and the acknowledgement, in the header's own terms. PURE.

The hot path handles rows: what struct.iter_unpack yields for a datagram, a plain tuple of nine numbers. `named` makes
an event of a row where its fields are needed by name. An event is a tuple too, with the fields of its row in the same
places, so code that reads a row by number takes an event as well. The exception is Comm, whose text is four numbers of
a row. Every event starts with the same three fields:

    what          the PROC_EVENT_* bit
    cpu           the CPU the event was sent from
    timestamp_ns  CLOCK_MONOTONIC nanoseconds (ktime_get_ns)

The names are the kernel's: its tgid is the PID of user space, its pid is the thread ID.
Source: include/uapi/linux/cn_proc.h, drivers/connector/cn_proc.c.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from cnprocd.connector import uapi


class Ack(NamedTuple):
    """The answer to LISTEN or IGNORE. `err` is 0 or a positive errno; `ack` is that of the request plus one."""

    what: int
    cpu: int
    timestamp_ns: int
    err: int
    ack: int


class Fork(NamedTuple):
    """A new task. child_pid == child_tgid means a new process, else a new thread of child_tgid.

    The parent is real_parent: for a new thread (and with CLONE_PARENT) that is the parent of the process, not the
    task that called clone().
    """

    what: int
    cpu: int
    timestamp_ns: int
    parent_pid: int
    parent_tgid: int
    child_pid: int
    child_tgid: int


class Exec(NamedTuple):
    """A process replaced its image. The event does not carry the new comm, and no Comm event comes with it."""

    what: int
    cpu: int
    timestamp_ns: int
    process_pid: int
    process_tgid: int


class Uid(NamedTuple):
    """A task changed its user ids; ids are of the initial user namespace."""

    what: int
    cpu: int
    timestamp_ns: int
    process_pid: int
    process_tgid: int
    ruid: int
    euid: int


class Gid(NamedTuple):
    """A task changed its group ids; ids are of the initial user namespace."""

    what: int
    cpu: int
    timestamp_ns: int
    process_pid: int
    process_tgid: int
    rgid: int
    egid: int


class Sid(NamedTuple):
    """A process called setsid()."""

    what: int
    cpu: int
    timestamp_ns: int
    process_pid: int
    process_tgid: int


class Ptrace(NamedTuple):
    """A tracer attached, or it detached (both tracer ids are 0)."""

    what: int
    cpu: int
    timestamp_ns: int
    process_pid: int
    process_tgid: int
    tracer_pid: int
    tracer_tgid: int


class Comm(NamedTuple):
    """A task renamed itself; `comm` is the raw 16 bytes up to the first NUL, chosen by the process."""

    what: int
    cpu: int
    timestamp_ns: int
    process_pid: int
    process_tgid: int
    comm: bytes


class Coredump(NamedTuple):
    """A task starts to dump core. Sent before the dump is written, and also if no core will be written."""

    what: int
    cpu: int
    timestamp_ns: int
    process_pid: int
    process_tgid: int
    parent_pid: int
    parent_tgid: int


class Exit(NamedTuple):
    """A task (thread) ended. `exit_code` is this thread's wait status: code << 8 | core 0x80 | signal.

    Sent after the parent was woken, so the process may have been reaped already. The parent ids are 0 if the task was
    released before the event was made.
    """

    what: int
    cpu: int
    timestamp_ns: int
    process_pid: int
    process_tgid: int
    exit_code: int
    exit_signal: int
    parent_pid: int
    parent_tgid: int


Event = Ack | Fork | Exec | Uid | Gid | Sid | Ptrace | Comm | Coredump | Exit

Row = tuple[Any, ...]
"""what, cpu, timestamp_ns, and the six words of the event's union, all int (uapi.py); or an event."""

_UNION = 3  # the first word of the union in a row
_WORDS4 = struct.Struct("=4I")

_SHAPES: dict[int, tuple[type[Any], int]] = {
    uapi.PROC_EVENT_FORK: (Fork, _UNION + 4),
    uapi.PROC_EVENT_EXEC: (Exec, _UNION + 2),
    uapi.PROC_EVENT_UID: (Uid, _UNION + 4),
    uapi.PROC_EVENT_GID: (Gid, _UNION + 4),
    uapi.PROC_EVENT_SID: (Sid, _UNION + 2),
    uapi.PROC_EVENT_PTRACE: (Ptrace, _UNION + 4),
    uapi.PROC_EVENT_COREDUMP: (Coredump, _UNION + 4),
    uapi.PROC_EVENT_EXIT: (Exit, _UNION + 6),
}
"""The type of each event, and how many numbers of a row it has."""

KNOWN = frozenset({*_SHAPES, uapi.PROC_EVENT_COMM})
"""The event types (`what`) that `named` knows."""


def named(row: Row) -> Event:
    """Return a row of a KNOWN type as an event. An event is returned as it is."""
    if isinstance(row, Event):
        return row
    what = row[0]
    if what == uapi.PROC_EVENT_COMM:
        comm = _WORDS4.pack(*row[_UNION + 2 : _UNION + 6]).partition(b"\0")[0]
        return Comm(what, row[1], row[2], row[_UNION], row[_UNION + 1], comm)
    kind, end = _SHAPES[what]
    event: Event = tuple.__new__(kind, row[:end])
    return event
