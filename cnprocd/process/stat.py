"""Parse the bytes of /proc files. PURE.

A process chooses some of the bytes. Its comm may hold spaces, parentheses and newlines, so /proc/PID/stat is split at
the last `)` (proc_pid_stat(5)). cmdline is the process's own memory and may hold any byte. Undecodable bytes become
lone surrogates.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_MAX_CMDLINE = 4096
_REMOVED = " (deleted)"
_STAT_FIELDS = 24  # of /proc/PID/stat, from the state to the start of the code; those after it are not split


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that matter here; `start_ticks` counts 1/100 s since boot (CLOCK_BOOTTIME)."""

    comm: str
    state: str
    ppid: int
    threads: int
    start_ticks: int
    is_executing: bool = False  # execve(2) is under way: its event is to come, and the comm may be the new one

    @property
    def is_dead(self) -> bool:
        """Whether every thread has ended. A zombie leader whose other threads live has a thread count above one."""
        return self.state in "ZX" and self.threads <= 1


def text(raw: bytes) -> str:
    """Return kernel bytes as str: UTF-8, with lone surrogates for other bytes."""
    return raw.decode("utf-8", "surrogateescape")


def parse_stat(raw: bytes) -> Stat:
    """Parse /proc/PID/stat. Raises ValueError if it is malformed.

    In execve(2) the new comm shows before the program is mapped and the event is sent (fs/binfmt_elf.c). Until then the
    process has memory, and its code begins at 0. (1 is shown if the reader may not know; a zombie has no memory.)
    """
    opening, closing = raw.find(b"("), raw.rfind(b")")
    fields = raw[closing + 1 :].split(maxsplit=_STAT_FIELDS)
    if opening < 0 or closing < opening or len(fields) < _STAT_FIELDS:
        raise ValueError("not a /proc/PID/stat line")
    return Stat(
        comm=text(raw[opening + 1 : closing]),
        state=fields[0].decode("ascii", "replace"),
        ppid=int(fields[1]),
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
        is_executing=fields[20] != b"0" and fields[23] == b"0",
    )


def parse_ids(raw: bytes) -> tuple[int, int]:
    """Return the real uid and gid of /proc/PID/status. Raises ValueError if they are missing.

    Only the start of a line matches. The kernel escapes comm (the Name: line), so it cannot forge such a line.
    """
    uid = gid = None
    for line in raw.split(b"\n"):
        if line.startswith(b"Uid:"):
            uid = _first_number(line)
        elif line.startswith(b"Gid:"):
            gid = _first_number(line)
            break
    if uid is None or gid is None:
        raise ValueError("no Uid: and Gid: in /proc/PID/status")
    return uid, gid


def parse_euid(raw: bytes) -> int | None:
    """Return the effective uid of /proc/PID/status; None if it has none."""
    found = re.search(rb"^Uid:\t[0-9]+\t([0-9]+)", raw, re.MULTILINE)
    return None if found is None else int(found[1])


def _first_number(line: bytes) -> int:
    words = line.split(maxsplit=2)
    if len(words) < 2:
        raise ValueError("no ids in an id line of /proc/PID/status")
    return int(words[1])


class Status(NamedTuple):
    """What /proc/PID/status shows of a process; a process cannot make that file wait."""

    comm: str
    ppid: int
    threads: int
    is_dead: bool
    uid: int  # real
    gid: int  # real
    euid: int | None
    has_memory: bool  # it has not ended, and is no kernel thread


def parse_status(raw: bytes) -> Status:
    """Return the fields of /proc/PID/status. Raises ValueError if one of them is missing."""
    fields: dict[bytes, bytes] = {}
    for line in raw.split(b"\n"):
        key, _, value = line.partition(b":\t")
        fields.setdefault(key, value)
    if not {b"Name", b"State", b"PPid", b"Threads"} <= fields.keys():
        raise ValueError("not a /proc/PID/status file")
    threads = int(fields[b"Threads"])
    comm = re.sub(rb"\\([n\\])", lambda found: b"\n" if found[1] == b"n" else b"\\", fields[b"Name"])
    is_dead = fields[b"State"][:1] in b"ZX" and threads <= 1
    return Status(
        text(comm), int(fields[b"PPid"]), threads, is_dead, *parse_ids(raw), parse_euid(raw), b"VmSize" in fields
    )


class Life(NamedTuple):
    """Whether a process lives, as far as /proc/PID/status shows."""

    is_dead: bool
    has_memory: bool  # as in Status


def parse_life(raw: bytes) -> Life:
    """Return this part of /proc/PID/status alone, for a tenth of the cost. Raises ValueError if it is missing."""
    # The name is the first line, and a line feed in it is escaped.
    state, threads = raw.find(b"\nState:\t"), raw.find(b"\nThreads:\t")
    if state < 0 or threads < 0:
        raise ValueError("not a /proc/PID/status file")
    is_dead = raw[state + 8 : state + 9] in b"ZX" and int(raw[threads + 10 :].partition(b"\n")[0]) <= 1
    return Life(is_dead, b"\nVmSize:\t" in raw)


def parse_cmdline(raw: bytes) -> str | None:
    """Return the arguments joined by spaces; None for a kernel thread or a zombie, which have none."""
    joined = raw[:_MAX_CMDLINE].rstrip(b"\0").replace(b"\0", b" ")
    return text(joined) if joined else None


def is_cut(raw: bytes) -> bool:
    """Whether `parse_cmdline` keeps only the beginning of these arguments."""
    return len(raw) >= _MAX_CMDLINE


class CgroupRoot(NamedTuple):
    """Where the paths of one hierarchy count from: `depth` levels below the root, at `own` (None: not known)."""

    depth: int = 0
    own: str | None = ""

    def absolute(self, path: str) -> str | None:
        """Return the path from the root of the hierarchy, or None if it is not known."""
        if not self.depth:
            return path
        parts = [part for part in path.split("/") if part]
        up = parts.count("..")
        if up == self.depth:
            return "/" + "/".join(parts[up:])
        if self.own is None or up > self.depth:
            return None
        return "/".join([*self.own.split("/")[: self.depth - up + 1], *parts[up:]])


class CgroupRoots(NamedTuple):
    """Where the paths of the unified hierarchy and of name=systemd count from."""

    unified: CgroupRoot
    named: CgroupRoot


HOST_CGROUPS = CgroupRoots(CgroupRoot(), CgroupRoot())


def cgroup_lines(raw: bytes) -> tuple[str | None, str | None]:
    """Return the paths of /proc/PID/cgroup in the unified hierarchy and in name=systemd."""
    unified = named = None
    for line in raw.split(b"\n"):
        hierarchy, _, rest = line.partition(b":")
        controllers, _, raw_path = rest.partition(b":")
        if hierarchy == b"0" and not controllers:
            unified = text(raw_path)
        elif controllers == b"name=systemd":
            named = text(raw_path)
    return unified, named


def parse_cgroup(raw: bytes, roots: CgroupRoots = HOST_CGROUPS) -> str | None:
    """Return the cgroup path that systemd uses: of the unified hierarchy, or of name=systemd on a hybrid system.

    A zombie's cgroup may have been removed; the kernel marks that (kernel/cgroup/cgroup.c proc_cgroup_show), and the
    mark is taken away here.
    """
    unified, named = cgroup_lines(raw)
    if named and (unified is None or not unified.strip("/.")):
        return roots.named.absolute(named.removesuffix(_REMOVED))
    return None if unified is None else roots.unified.absolute(unified.removesuffix(_REMOVED))
