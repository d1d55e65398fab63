"""Read /proc: one process, or all of them. The only module that opens those files.

A process can end, and its PID be reused, between any two reads. So stat is read first, and its start time is part of
the result; the caller compares it with what it knows. No function raises for a process that is gone; it returns None.
`exe` of another user's process needs CAP_SYS_PTRACE; stat, status, cmdline and cgroup do not (proc_pid_exe(5)).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import struct
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from cnprocd.process import lookup_child
from cnprocd.process.files import FileId, claim_of, verified_path
from cnprocd.process.host_view import cgroup_roots
from cnprocd.process.model import EVERYTHING, TICK_NS, Image, MoreIds, Process, Provenance, Wanted
from cnprocd.process.stat import (
    Life,
    Stat,
    Status,
    is_cut,
    parse_cgroup,
    parse_cmdline,
    parse_euid,
    parse_ids,
    parse_life,
    parse_stat,
    parse_status,
    text,
)

_CHUNK = 8192
_REMEMBERED_PROGRAMS = 1024
_PROGRAM = struct.Struct("=QQB")


def _read(tgid: int, name: str) -> bytes | None:
    try:
        fd = os.open(f"/proc/{tgid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, _CHUNK)
    except OSError:  # ESRCH: gone between open and read
        return None
    finally:
        os.close(fd)


def exists(tgid: int) -> bool:
    """Return whether /proc shows the process, alive or not reaped. It cannot make this wait."""
    return os.access(f"/proc/{tgid}", os.F_OK)


def read_stat(tgid: int) -> Stat | None:
    """Return /proc/PID/stat, or None if there is no such process."""
    raw = _read(tgid, "stat")
    try:
        return parse_stat(raw) if raw else None
    except ValueError:
        return None


def read_status(tgid: int) -> Status | None:
    """/proc/PID/status, or None if there is no such process. The process cannot make this wait (see lookups.py)."""
    raw = _read(tgid, "status")
    try:
        return parse_status(raw) if raw else None
    except ValueError:
        return None


def read_comm(tgid: int) -> str | None:
    """Return the name of a process, or None if it is gone. It cannot make this wait (fs/proc/base.c comm_show)."""
    raw = _read(tgid, "comm")
    return None if raw is None else sys.intern(text(raw.removesuffix(b"\n")))


def is_alive(tgid: int) -> bool:
    """Return whether any thread of the process still runs. A zombie is dead; a zombie leader with threads is alive."""
    life = _read_life(tgid)
    return life is not None and not life.is_dead


def _read_life(tgid: int) -> Life | None:
    raw = _read(tgid, "status")
    try:
        return parse_life(raw) if raw else None
    except ValueError:
        return None


def is_ending(tgid: int) -> bool:
    """Return whether a process whose last exit record was made may still be on its way to its exit event.

    It has given up its memory by then (kernel/exit.c do_exit: exit_mm follows taskstats_exit). A process with memory is
    the next owner of the PID.
    """
    life = _read_life(tgid)
    return life is not None and not life.is_dead and not life.has_memory


def zombie(tgid: int, ended_ns: int, wanted: Wanted) -> Process | None:
    """Return the zombie that ended then, with its cgroup and login session; None if it was reaped.

    A zombie cannot make a read wait. The unified hierarchy keeps the cgroup until the process is reaped. The older ones
    show every zombie in the root (kernel/cgroup/cgroup.c proc_cgroup_show), so the root means that it is unknown. The
    login session stays as well (fs/proc/base.c proc_loginuid_read).
    """
    cgroup = _read(tgid, "cgroup") if wanted.cgroup else None
    loginuid = _read(tgid, "loginuid") if wanted.loginuid else None
    life = _read_life(tgid) if cgroup or loginuid else None
    if life is None or not life.is_dead:
        return None
    stat = _read(tgid, "stat")  # only now: of a living process it can wait (see lookups.py)
    found = to_process(tgid, Files(stat, cgroup=cgroup, loginuid=loginuid), "zombie")
    if found is None or found.threads or (found.start_ns or 0) > ended_ns:
        return None  # the zombie of a later owner of this PID
    return found


def clock_offset_ns() -> int:
    """Return CLOCK_BOOTTIME minus CLOCK_MONOTONIC: the time suspended. /proc uses the first, events the second."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Files(NamedTuple):
    """The content of files in /proc/PID; None: not asked for, or not readable."""

    stat: bytes | None
    status: bytes | None = None
    program: bytes | None = None  # see lookup_child.program
    cmdline: bytes | None = None
    cgroup: bytes | None = None
    loginuid: bytes | None = None


def read_process(tgid: int, wanted: Wanted = EVERYTHING, source: Provenance = "procfs") -> Process | None:
    """Return a process as /proc shows it now, or None if it is gone. A zombie has no exe and no cmdline.

    Not for the daemon: a process can make this wait (see lookups.py).
    """
    files = Files(
        stat=_read(tgid, "stat"),
        status=_read(tgid, "status") if wanted.ids else None,
        program=lookup_child.read(tgid, "program") if wanted.exe else None,
        cmdline=_read(tgid, "cmdline") if wanted.cmdline else None,
        cgroup=_read(tgid, "cgroup") if wanted.cgroup else None,
        loginuid=_read(tgid, "loginuid") if wanted.loginuid else None,
    )
    return to_process(tgid, files, source)


def to_process(tgid: int, files: Files, source: Provenance) -> Process | None:
    """Return the process that these files show, or None if its `stat` does not show one."""
    try:
        stat = parse_stat(files.stat or b"")
    except ValueError:
        return None
    process = Process(
        tgid=tgid,
        ppid=stat.ppid,
        start_ns=stat.start_ticks * TICK_NS - clock_offset_ns(),
        comm=None if stat.is_executing else sys.intern(stat.comm),  # many processes run one program: one text for all
        comm_source="unknown" if stat.is_executing else source,
        threads=0 if stat.is_dead else max(1, stat.threads),
        threaded=stat.threads > 1,
        counted_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC),
    )
    if files.status:
        with contextlib.suppress(ValueError):
            process.uid, process.gid = parse_ids(files.status)
            process.ids_source = source
    process.more_ids = _more_ids(files)
    if files.program is not None and not stat.is_executing:
        process.exe, process.image = _program(files.program)
        process.image_source = source
    if files.cmdline:
        process.take_cmdline(parse_cmdline(files.cmdline), is_cut(files.cmdline), source)
    if files.cgroup:
        cgroup = parse_cgroup(files.cgroup, cgroup_roots())
        if cgroup is not None and not (stat.is_dead and cgroup == "/"):  # see zombie
            process.cgroup, process.cgroup_source = sys.intern(cgroup), source
    return process


def _more_ids(files: Files) -> MoreIds | None:
    if not (files.status or files.loginuid):
        return None
    loginuid = int(files.loginuid) if files.loginuid is not None and files.loginuid.isdigit() else None
    return MoreIds(parse_euid(files.status) if files.status else None, loginuid)


@lru_cache(maxsize=_REMEMBERED_PROGRAMS)  # of one program all processes have the same
def _program(raw: bytes) -> tuple[str | None, Image]:
    """Return the verified path of what a process executes, and what /proc claims of it (see files.py)."""
    device, inode, evidence = _PROGRAM.unpack_from(raw)
    file = FileId(device, inode)
    claim = claim_of(text(raw[_PROGRAM.size :]), file, file if evidence & lookup_child.AT_TEXT else None)
    at_path = file if evidence & lookup_child.AT_PATH else None
    exe = verified_path(claim, at_path, bool(evidence & lookup_child.HOST_MOUNT))
    return exe, Image(claim.path, claim.is_deleted, claim.file)


def unread_process(tgid: int, wanted: Wanted, source: Provenance) -> Process | None:
    """Return what can be known of a process whose `stat` does not return: not its start, exe and cmdline."""
    status = read_status(tgid)
    if status is None:
        return None
    process = Process(
        tgid=tgid,
        ppid=status.ppid,
        comm=status.comm,
        comm_source=source,
        uid=status.uid,
        gid=status.gid,
        ids_source=source,
        threads=0 if status.is_dead else max(1, status.threads),
        threaded=status.threads > 1,
        counted_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC),
    )
    process.more_ids = MoreIds(status.euid)
    if wanted.cgroup and (raw := _read(tgid, "cgroup")):
        process.cgroup, process.cgroup_source = parse_cgroup(raw, cgroup_roots()), source
    return process


def all_pids() -> list[int]:
    """Return the PID of every process, zombies included."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def scan(wanted: Wanted = EVERYTHING) -> Iterator[Process]:
    """Yield every living process, zombies excluded. Subscribe first and scan second, so that none is missed."""
    for tgid in all_pids():
        process = read_process(tgid, wanted)
        if process is not None and process.threads:
            yield process


def read_parent(tgid: int) -> Process | None:
    """Return a process with its name, parent and start."""
    return read_process(tgid, Wanted())


class ProcFs:
    """The real /proc, in the form that the pipeline needs (model.ProcScan). Tests use another machine's."""

    read = staticmethod(read_process)
    read_parent = staticmethod(read_parent)
    is_alive = staticmethod(is_alive)
    is_ending = staticmethod(is_ending)
    zombie = staticmethod(zombie)
    scan = staticmethod(scan)

    @staticmethod
    def user_name(uid: int) -> str:
        return user_name(uid)


@lru_cache(maxsize=256)
def user_name(uid: int) -> str:
    """Return the name of a user, or the number if it has none. Cached, because a directory service may be slow."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def boot_id() -> str:
    """Return this boot's random id (random(4)). With it a PID and a start time are unique across boots."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
