"""Hold pidfds on the processes that rules can match: their exit status survives a loss of events.

A pidfd that was opened while the process lived shows its exit status even after the process was reaped: ioctl
PIDFD_GET_INFO with PIDFD_INFO_EXIT, since Linux 6.15 (fs/pidfs.c; include/uapi/linux/pidfd.h). On older kernels the
request fails or leaves the bit unset, and no pidfd is held. Pidfds are a second source only: they are read after an
overrun and at no other time.

The number of descriptors is bounded, first come first served. The pipeline asks for one a second after a process
started, so processes that live long get them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import struct
from collections.abc import Callable
from typing import NamedTuple

from cnprocd.process.model import Process

_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info of 64 bytes)
_PIDFD_INFO_EXIT = 1 << 3
_INFO = struct.Struct("=QQ11Ii")  # mask, cgroupid, pid tgid ppid, eight ids, exit_code
MOST_HELD = 4096
_CROWDED_AT = 64
_SPARE_DESCRIPTORS = 256  # left for sockets, hooks and the spool


class Ended(NamedTuple):
    """A held process that is gone, and its wait status as waitpid() returns it."""

    process: Process
    status: int


def kernel_reports_exit_status() -> bool:
    """Return whether this kernel reports the status of a reaped process; tried on a child of this process."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        os.waitpid(pid, 0)
        return False
    try:
        os.waitpid(pid, 0)
        return exit_status(fd) is not None
    finally:
        os.close(fd)


def exit_status(fd: int) -> int | None:
    """Return the wait status of the process of a pidfd; None while it lives or if the kernel does not report it."""
    request = bytearray(_INFO.pack(_PIDFD_INFO_EXIT, 0, *[0] * 12))
    try:
        fcntl.ioctl(fd, _PIDFD_GET_INFO, request)
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(request)
    return int(status) if mask & _PIDFD_INFO_EXIT else None


class Holder:
    """tgid -> pidfd, bounded."""

    def __init__(self, limit: int | None = None) -> None:
        room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_DESCRIPTORS
        self._limit = max(0, min(MOST_HELD, room)) if limit is None else limit
        self._held: dict[int, tuple[int, Process]] = {}
        self._crowded_at = _CROWDED_AT

    def __len__(self) -> int:
        return len(self._held)

    @property
    def full(self) -> bool:
        return len(self._held) >= self._limit

    @property
    def crowded(self) -> bool:
        """Whether to release ended processes: the number has doubled since the last release, or reached the limit."""
        return self.full or len(self._held) >= self._crowded_at

    def thinned(self) -> None:
        """Note that the ended processes that need not be held were released."""
        self._crowded_at = max(_CROWDED_AT, 2 * len(self._held))

    def hold(self, process: Process) -> None:
        """Hold a living process, if the limit allows. The caller has just checked that the PID is that process."""
        if process.tgid in self._held or self.full:
            return
        with contextlib.suppress(OSError):  # gone, or out of descriptors
            self._held[process.tgid] = os.pidfd_open(process.tgid), process

    def release_all(self, is_spare: Callable[[Process], bool], most: int = MOST_HELD) -> None:
        """Close the pidfds of so many processes for which this returns True, the oldest first."""
        spare = [tgid for tgid, (_, process) in self._held.items() if is_spare(process)]
        for tgid in spare[:most]:
            self.release(tgid)

    @property
    def room(self) -> int:
        """How many more can be held."""
        return max(0, self._limit - len(self._held))

    def release(self, tgid: int) -> None:
        """Close the pidfd of a process whose exit was reported."""
        held = self._held.pop(tgid, None)
        if held is not None:
            os.close(held[0])

    def holds(self, process: Process) -> bool:
        """Return whether this very process is held, and not a later one with its PID."""
        held = self._held.get(process.tgid)
        return held is not None and held[1] is process

    def ended(self) -> list[Ended]:
        """Return the held processes that are gone. They stay held until they are released."""
        statuses = ((process, exit_status(fd)) for fd, process in self._held.values())
        return [Ended(process, status) for process, status in statuses if status is not None]

    def close(self) -> None:
        for tgid in list(self._held):
            self.release(tgid)
