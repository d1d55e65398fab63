"""/proc as the daemon reads it: by a worker process, because a process can make its own files unreadable.

Which files a process can make wait for as long as it wishes, tried on Linux 6.18 (tests/kernel/test_edges.py) and read
in the kernel:

    stat exe           its exec_update_lock is held while execve(2) closes descriptors (fs/exec.c begin_new_exec), and
                       a FUSE server of its own may never answer FLUSH. Only newer kernels take it for stat and exe
    cmdline            its mmap_lock is held while mmap(2) of a FUSE file waits for a page (__access_remote_vm)
    status cgroup      take neither, nor do comm and loginuid; pidfd_open(2) and PIDFD_GET_INFO likewise. The daemon
                       reads them itself

A read that does not return within its deadline costs that process its attributes. Its PID is set aside: it is not read
again until it has ended or has called execve(2), which a pidfd and the exec event show. A user with SEVERAL such
processes is set aside as a whole for PENANCE_S. While many reads are late, their deadline shrinks, so that the loop
waits for at most a tenth of the time (`Patience`).
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from cnprocd.edge import Counters, Edge, Limits, Missed
from cnprocd.log import Log, ThrottledLog
from cnprocd.patience import Patience
from cnprocd.process import lookup_child, procfs
from cnprocd.process.files import FileId
from cnprocd.process.known_parents import KnownParents
from cnprocd.process.model import Process, Provenance, Wanted
from cnprocd.process.pidfd_watch import PidfdWatch
from cnprocd.process.procfs import Files, to_process, unread_process
from cnprocd.worker import ChildWorker

DEADLINE_S = 0.05
SHORTEST_S = 0.002  # what every read gets; one of a process that does not hang takes 0.00002
START_S = 5.0  # for the worker process
SCAN_S = 2.0  # that one scan may wait for processes that hang
MOST_SET_ASIDE = 256
SEVERAL, PENANCE_S = 3, 10.0
REPORT_EVERY_S = 10.0
MOST_NAMED = 20  # PIDs in a record
_LIMITS = Limits(deadline_s=DEADLINE_S, replacements=4, spares=1)
_LENGTH = struct.Struct("=H")
_FILE = struct.Struct("=QQ")
_MOST_REQUEST_BYTES = 64 * 1024
_STAT, _STATUS, _PROGRAM, _CMDLINE, _CGROUP, _LOGINUID = (1 << bit for bit in range(len(lookup_child.FILES)))


class Lookups:
    """Reads /proc for the daemon (process.model.ProcScan). Call prepare() before the first read, close() at the end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        user_name: Callable[[int], str | None],
        blame: Callable[[str, float], None] | None = None,
        start: Callable[[], ChildWorker] = lambda: ChildWorker(Path(lookup_child.__file__)),
    ) -> None:
        self.user_name = user_name
        self.skipped = 0  # reads of processes and users that are set aside
        self._loop = loop
        self._log = log
        self.edge: Edge[bytes, bytes] = Edge("proc", start, _LIMITS, loop, blame=blame)
        self._patience = Patience(DEADLINE_S, SHORTEST_S)
        self._throttled = ThrottledLog(log, REPORT_EVERY_S)
        self._set_aside: dict[int, int | None] = {}  # PID -> pidfd; None: there was no descriptor for one
        self._scan_wait_s = 0.0  # for processes that hang, in the current scan
        self._parents = KnownParents()
        self._late_by_user: dict[int, list[float]] = {}  # uid -> when reads of its processes were late

    @property
    def counters(self) -> Counters:
        return self.edge.counters

    @property
    def set_aside(self) -> int:
        """How many processes are set aside now."""
        return len(self._set_aside)

    def prepare(self) -> None:
        """Start the worker process, and wait until it is ready."""
        if not self.edge.prepare(START_S):
            self._log("error", "proc_unavailable", message="cannot start the process that reads /proc")

    def close(self) -> None:
        """End the worker process."""
        self.edge.close()
        self._parents.close()
        for tgid in list(self._set_aside):
            self._restore(tgid)

    def tick(self, now_s: float) -> None:
        """Report what was late, and forget what is over. About once a second."""
        self._throttled.flush_due(now_s)
        self._late_by_user = {
            uid: recent
            for uid, times in self._late_by_user.items()
            if (recent := [at for at in times if now_s - at < PENANCE_S])
        }
        for tgid in [tgid for tgid, pidfd in self._set_aside.items() if pidfd is None]:
            self._restore(tgid)

    # process.model.ProcScan

    def read(self, tgid: int, wanted: Wanted, source: Provenance) -> Process | None:
        """Return the process as /proc shows it now; None if it is gone or its files do not answer."""
        if source == "exec":
            self._restore(tgid)  # its execve(2) is over
        elif self._is_set_aside(tgid):
            self.skipped += 1
            return None
        if not procfs.exists(tgid):
            return None  # the most frequent case in a storm, and 3 us instead of 40
        found = self._ask([tgid], _bits(wanted))
        return None if isinstance(found, Missed) else to_process(tgid, found[0], source)

    def read_parent(self, tgid: int) -> Process | None:
        """Return a process with its name of now. Of one that was read before, the loop reads the name alone."""
        known = self._parents.read(tgid)
        if known is not None:
            return known
        try:
            watch = PidfdWatch(tgid)
        except OSError:  # gone, or there is no descriptor for it
            return self.read(tgid, Wanted(), "procfs")
        process = self.read(tgid, Wanted(), "procfs")
        self._parents.add(process, watch)
        return process

    def is_alive(self, tgid: int) -> bool:
        """Return whether any thread of the process still runs. Read by the loop: `status` does not wait."""
        return procfs.is_alive(tgid)

    def is_ending(self, tgid: int) -> bool:
        """Return whether a process with an exit record may still be on its way to its exit event. Read by the loop."""
        return procfs.is_ending(tgid)

    def zombie(self, tgid: int, ended_ns: int, wanted: Wanted) -> Process | None:
        """Return a process that ended and is not reaped yet. Read by the loop: it does not wait."""
        return procfs.zombie(tgid, ended_ns, wanted)

    def scan(self, wanted: Wanted) -> Iterator[Process]:
        """Yield every process that is alive now. Of one that hangs: what its `status` shows, and report it."""
        return chain.from_iterable(self.scan_in_groups(wanted))

    def scan_in_groups(self, wanted: Wanted, tgids: Iterable[int] | None = None) -> Iterator[list[Process]]:
        """Yield the living ones of these processes, or of all, as `scan`. Those of a group were read at once."""
        bits, pids = _bits(wanted), iter(procfs.all_pids() if tgids is None else tgids)
        unread: list[int] = []
        self._scan_wait_s = 0.0
        while batch := list(islice(pids, lookup_child.MOST_PIDS)):
            group = []
            for tgid, files in self._files_of(batch, bits):
                if files is None:
                    unread.append(tgid)
                    process = unread_process(tgid, wanted, "procfs")
                else:
                    process = to_process(tgid, files, "procfs")
                if process is not None and process.threads:
                    group.append(process)
            yield group
        if unread:
            self._log(
                "warning",
                "proc_unreadable",
                pids=[*unread[:MOST_NAMED]],
                count=len(unread),
                message=f"{len(unread)} processes do not let their files in /proc be read; exe and cmdline are unknown",
            )

    def file_ids(self, paths: Sequence[str]) -> list[FileId | None] | None:
        """Return the file of each path of the host, None for one that is not there; None if the answer is late."""
        found: list[FileId | None] = []
        for request in _path_requests(paths):
            now_s = time.monotonic()
            answer = self.edge.ask(request, self._patience.wait_s(now_s))
            if not isinstance(answer, bytes):
                self._patience.spend(time.monotonic() - now_s)
                return None
            found += [FileId(*file) if file[1] else None for file in _FILE.iter_unpack(answer)]
        return found

    # Asking.

    def _files_of(self, batch: list[int], bits: int) -> Iterator[tuple[int, Files | None]]:
        """Read a batch; if it is late, each process by itself. None: this one is late, or SCAN_S is used up."""
        allowed = [tgid for tgid in batch if not self._is_set_aside(tgid)]
        yield from ((tgid, None) for tgid in batch if tgid not in allowed)
        if not allowed or self._scan_wait_s >= SCAN_S:
            yield from ((tgid, None) for tgid in allowed)
            return
        began_s = time.monotonic()
        found = self.edge.ask(_request(allowed, bits))
        if isinstance(found, bytes):
            yield from zip(allowed, _parse(found), strict=True)
            return
        self._scan_wait_s += time.monotonic() - began_s
        for tgid in allowed:
            alone: list[Files] | Missed = Missed.STARVED
            while alone is Missed.STARVED and self._scan_wait_s < SCAN_S:
                began_s = time.monotonic()
                self.edge.prepare(max(0.0, SCAN_S - self._scan_wait_s))
                alone = self._ask([tgid], bits)
                if isinstance(alone, Missed):
                    self._scan_wait_s += time.monotonic() - began_s
            yield tgid, None if isinstance(alone, Missed) else alone[0]

    def _ask(self, tgids: list[int], bits: int) -> list[Files] | Missed:
        """Read one process; if it is late, set it aside."""
        began_s = time.monotonic()
        answer = self.edge.ask(_request(tgids, bits), self._patience.wait_s(began_s))
        if isinstance(answer, bytes):
            return _parse(answer)
        now_s = time.monotonic()
        if answer in (Missed.LATE, Missed.STARVED):
            self._patience.spend(now_s - began_s)
            for tgid in tgids if answer is Missed.LATE else ():
                self._put_aside(tgid, now_s)
            message = "reads of /proc did not return; the attributes of these processes are unknown"
        else:
            message = "the process that reads /proc is not there; attributes of processes are unknown"
        self._throttled.add(
            "warning", "proc_unreadable", now_s, {"count": len(tgids)}, message, pids=tgids, reason=answer.value
        )
        return answer

    # Processes and users that are set aside.

    def _is_set_aside(self, tgid: int) -> bool:
        if tgid in self._set_aside:
            return True
        if not self._late_by_user:
            return False
        uid = _uid(tgid)
        return uid != 0 and len(self._late_by_user.get(uid, ())) >= SEVERAL

    def _put_aside(self, tgid: int, now_s: float) -> None:
        uid = _uid(tgid)
        if uid >= 0:
            self._late_by_user.setdefault(uid, []).append(now_s)
        if tgid in self._set_aside:
            return
        if len(self._set_aside) >= MOST_SET_ASIDE:
            self._restore(next(iter(self._set_aside)))
        try:
            pidfd = os.pidfd_open(tgid)
        except ProcessLookupError:
            return
        except OSError:
            self._set_aside[tgid] = None
            return
        self._set_aside[tgid] = pidfd
        self._loop.add_reader(pidfd, self._restore, tgid)  # readable when the process has ended (pidfd_open(2))

    def _restore(self, tgid: int) -> None:
        pidfd = self._set_aside.pop(tgid, None)
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)


def _bits(wanted: Wanted) -> int:
    return (
        _STAT
        | (_STATUS if wanted.ids else 0)
        | (_PROGRAM if wanted.exe else 0)
        | (_CMDLINE if wanted.cmdline else 0)
        | (_CGROUP if wanted.cgroup else 0)
        | (_LOGINUID if wanted.loginuid else 0)
    )


def _request(tgids: list[int], bits: int) -> bytes:
    return struct.pack(f"=B{len(tgids)}I", bits, *tgids)


def _path_requests(paths: Sequence[str]) -> Iterator[bytes]:
    """Yield the paths in requests that a worker takes (worker.MOST_MESSAGE_BYTES)."""
    request = b""
    for path in paths:
        request += os.fsencode(path) + b"\0"
        if len(request) > _MOST_REQUEST_BYTES:
            yield bytes([lookup_child.PATHS]) + request
            request = b""
    if request:
        yield bytes([lookup_child.PATHS]) + request


def _parse(answer: bytes) -> list[Files]:
    """Return the files of each process."""
    parts: list[bytes | None] = []
    at = 0
    while at < len(answer):
        (length,) = _LENGTH.unpack_from(answer, at)
        at += _LENGTH.size
        parts.append(None if length == lookup_child.ABSENT else answer[at : at + length])
        at += 0 if length == lookup_child.ABSENT else length
    each = len(lookup_child.FILES)
    return [Files(*parts[first : first + each]) for first in range(0, len(parts), each)]


def _uid(tgid: int) -> int:
    """Return the effective uid of a process, 0 if it is not dumpable, -1 if it is gone. Does not wait (proc(5))."""
    try:
        return os.stat(f"/proc/{tgid}").st_uid
    except OSError:
        return -1
