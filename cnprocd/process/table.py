"""The table of live processes, kept by fork, exec, comm, uid, gid and exit events and by a /proc scan. PURE.

It is kept only if a rule needs what exit records lack (exe, cmdline, cgroup, ancestry), or if this kernel has no exit
records. Facts and rules that keep it correct:

- Events are ordered per CPU only. An event older than the start of the entry with its PID is about the former process
  of that PID, so a late exit never removes the new owner.
- At fork a process inherits everything but its PID, and comm from the thread that forked. exec changes comm, exe and
  cmdline, and keeps real ids and cgroup.
- An ended process stays for a moment, as its children's parent and for late events. Its entry is marked, not removed.
- A leader that ends before its other threads looks like an ended process. `sweep` checks /proc before it removes an
  entry, and again until the other threads have ended, because no event may report that.
- Most processes are forked and exit without any rule asking for them. Until something asks, such a process is a birth:
  the time of its fork, and its parent's entry as it was then. So an entry that births refer to is never changed: a
  changed copy replaces it.
- FORK of a PID that is in the table and not ended means that its exit was lost. The former process is returned as
  vanished, unless it is the forked process itself, which a scan or an event of another CPU entered before its FORK. So
  does an EXEC of a process that started later than the entry.
- A scan shows the present, and seconds of events may still be queued. A FORK older than the entry's start is of an
  earlier owner of the PID, which is not entered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Set
from dataclasses import replace

from cnprocd.connector.event import Comm, Exit, Fork, Gid, Row, Uid
from cnprocd.process.doubt import forget_doubtful, sure
from cnprocd.process.model import TICK_NS, Process

_MAX_DEPTH = 64  # of ancestry; beyond it a chain is unknown
KEEP_NS = 2_000_000_000
START_TOLERANCE_NS = 3 * TICK_NS  # /proc rounds a start down to a tick, and the clocks are read one after the other


class Table:
    """tgid -> Process."""

    def __init__(self) -> None:
        self._processes: dict[int, Process] = {}
        self._births: dict[int, tuple[int, Process]] = {}  # tgid -> time of the fork, and the parent at that time
        self._ended: deque[tuple[int, int, int, bool]] = deque()  # (due_ns, ended_ns, tgid, certain), first due first
        self._leaderless: set[int] = set()  # tgids of processes whose leader ended before other threads

    def __len__(self) -> int:
        return len(self._births) + sum(process.ended_ns is None for process in self._processes.values())

    def known(self) -> tuple[Process, ...]:
        """Return every entry, also those of processes that ended a moment ago."""
        self.enter_births()
        return tuple(self._processes.values())

    def take_over(self, known: Iterable[Process], known_ns: int, scan: Iterable[Process]) -> list[Process]:
        """Enter what an earlier table had at `known_ns`. Return the processes of a scan that are to be adopted then.

        Every event since `known_ns` is queued. So a scan must not show what comes after these events: it adds only
        attributes that were not known, and processes that are older and were not handed on.
        """
        for process in sorted(known, key=lambda one: one.ended_ns or 0):
            self._processes[process.tgid] = process
            if process.ended_ns is not None:
                self._ended.append((process.ended_ns + KEEP_NS, process.ended_ns, process.tgid, False))
        left = []
        for found in scan:
            former = self._processes.get(found.tgid)
            if former is not None and same_process(former, found):
                _settle(former, found)
                former.fill_unknown(found)
            elif former is None and (found.start_ns or 0) + START_TOLERANCE_NS < known_ns:
                left.append(found)
        return left

    def get(self, tgid: int, at_ns: int | None = None) -> Process | None:
        """Return the process that had this PID at `at_ns` (default: now), if the table still has it."""
        process = self._entry(tgid)
        if process is None or (at_ns is not None and process.start_ns is not None and at_ns < process.start_ns):
            return None
        return process

    def _entry(self, tgid: int) -> Process | None:
        """Return the process with this PID. A birth becomes an entry."""
        process = self._processes.get(tgid)
        if process is None and tgid in self._births:
            fork_ns, parent = self._births.pop(tgid)
            process = self._processes[tgid] = parent.child(tgid, fork_ns)
        return process

    def own(self, process: Process) -> Process:
        """Return the entry of a process to change what children inherit: a copy of it if births refer to it."""
        if not process.is_shared:
            return process
        copy = replace(process, is_shared=False)
        if self._processes.get(process.tgid) is process:
            self._processes[process.tgid] = copy
        return copy

    # Births.

    def birth(self, fork: Row, comms: Set[str]) -> Process | None:
        """Enter a new process as a birth, if its parent is known and has one of these comms. Return the parent then."""
        _, _, at_ns, parent_pid, parent_tgid, child_pid, tgid = fork[:7]
        parent = self._processes.get(parent_tgid)
        if (
            parent is None
            or parent.comm not in comms
            or parent_pid != parent_tgid  # the child has the comm of the thread that forked it
            or child_pid != tgid
            or tgid in self._processes
            or tgid in self._births
            or parent.start_ns is None
            or parent.start_ns > at_ns
        ):
            return None
        parent.is_shared = True
        self._births[tgid] = at_ns, parent
        return parent

    def end_birth(self, tgid: int, at_ns: int) -> bool:
        """Remove a birth whose process ended. Return whether there was one."""
        birth = self._births.get(tgid)
        if birth is None or birth[0] > at_ns:
            return False
        del self._births[tgid]
        return True

    def enter_births(self) -> None:
        """Make an entry of every birth: other names count from now on."""
        for tgid in list(self._births):
            self._entry(tgid)

    def fork(self, event: Fork) -> tuple[Process, Process | None]:
        """Enter a new process. Return its entry, and the former owner of the PID if its exit event never came.

        If the PID has a later owner already, the entry returned is not in the table.
        """
        former = self._entry(event.child_tgid)
        if former is not None and former.ended_ns is None and _began_at(former, event.timestamp_ns):
            former.start_ns = event.timestamp_ns
            return former, None
        parent = self.get(event.parent_tgid, event.timestamp_ns)
        if parent is None:
            child = Process(event.child_tgid, event.parent_tgid, event.timestamp_ns)
        else:
            child = parent.child(event.child_tgid, event.timestamp_ns)
        if event.parent_pid != event.parent_tgid:
            child.comm, child.comm_source = None, "unknown"  # it inherits the comm of the thread that forked it
        if former is not None and _began_after(former, event.timestamp_ns):
            return child, None
        self._processes[event.child_tgid] = child
        if former is None or former.ended_ns is not None:
            return child, None
        if event.child_tgid in self._leaderless:
            # Its last exit was filtered in the kernel, so no rule could match it.
            self._leaderless.discard(event.child_tgid)
            return child, None
        return child, former

    def enter(self, process: Process) -> Process:
        """Enter a process that was read from /proc without an event. Return the entry that the table has now."""
        return self._entry(process.tgid) or self._processes.setdefault(process.tgid, process)

    def thread(self, event: Fork) -> None:
        """Count a new thread of a process."""
        process = self.get(event.child_tgid, event.timestamp_ns)
        if process is not None and event.timestamp_ns > process.counted_ns:
            process.threads += 1
            process.threaded = True

    def thread_exit(self, event: Exit) -> Process | None:
        """Count the end of a thread. Return its process if it was the last thread by this count."""
        process = self.get(event.process_tgid, event.timestamp_ns)
        if process is None:
            return None
        if event.timestamp_ns > process.counted_ns:
            process.threads -= 1
        return process if process.threads <= 0 else None

    def exec(self, tgid: int, at_ns: int, fresh: Process | None) -> tuple[Process, Process | None]:
        """Enter a new image. `fresh` is the process as /proc showed it after the event; None: it was gone.

        Return its entry, and the former owner of the PID if neither its exit event nor this process's FORK came.
        """
        process = self.get(tgid, at_ns)
        if process is None:
            process = self._processes[tgid] = fresh or Process(tgid)
        former = None
        if fresh is None or not same_process(process, fresh):
            if fresh is None or not is_later(fresh, process) or _began_after(fresh, at_ns):
                process = self._new_image(process, at_ns)
                process.forget_program()
                process.forget_no_login()
                return process, None
            former = process if process.ended_ns is None else None
            process = self._processes[tgid] = fresh
        process = self._new_image(process, at_ns)
        process.take_comm(fresh, "exec")
        process.take_image(fresh, "exec")
        if fresh.uid is not None:
            process.take_ids(fresh, "exec")
            process.unconfirmed = False
        if fresh.more_ids is not None:
            process.take_more_ids(fresh)
        if fresh.cgroup is not None:
            process.cgroup, process.cgroup_source = fresh.cgroup, "exec"
        return process, former

    def _new_image(self, process: Process, at_ns: int) -> Process:
        process = self.own(process)
        if process.in_doubt:
            forget_doubtful(process)
        process.ended_ns = None
        process.threads, process.threaded = 1, False  # exec ends every other thread; their exits came before this event
        process.counted_ns = at_ns
        return process

    def rename(self, event: Comm, comm: str) -> None:
        """Take a new comm. Only the leader's comm is the process's."""
        process = self.get(event.process_tgid, event.timestamp_ns)
        if process is not None and event.process_pid == event.process_tgid:
            process = self.own(process)
            process.comm, process.comm_source = comm, "event"

    def uid(self, event: Uid) -> bool:
        """Take the user ids of an event. Return whether they may be those of another program that is being executed.

        A program with the set-user-ID bit has its name and ids before its exec event is sent (fs/exec.c
        begin_new_exec). Without privilege, other calls give a process only user ids that it has or had.
        """
        process = self.get(event.process_tgid, event.timestamp_ns)
        if process is not None and event.process_pid == event.process_tgid:
            process = self.own(process)
            held = (process.uid, process.euid)
            process.take_user_ids(event.ruid, event.euid)
            return event.ruid == held[0] and event.euid not in held and 0 not in held
        return False

    def gid(self, event: Gid) -> None:
        process = self.get(event.process_tgid, event.timestamp_ns)
        if process is not None and event.process_pid == event.process_tgid:
            process = self.own(process)
            process.gid, process.ids_source = event.rgid, "event"

    def ancestors(
        self, process: Process, at_ns: int | None, parent_named: bool, parent_now: Callable[[int], int | None]
    ) -> tuple[Process, ...]:
        """Return the known ancestors, parent first.

        A child is younger than its parent; an older child means that the parent's PID was reused. Either start or both
        may be rounded to a tick. `parent_named`: the kernel named the parent of that moment, whatever became of it.
        Otherwise, if the parent has ended, another process has adopted the child, and only /proc (`parent_now`) shows
        which. None is guessed.
        """
        chain: list[Process] = []
        while process.ppid and len(chain) < _MAX_DEPTH:
            parent = self.get(process.ppid, at_ns)
            if parent is not None and (parent.start_ns or 0) > (process.start_ns or 1 << 62) + START_TOLERANCE_NS:
                parent = None
            if not parent_named and (parent is None or parent.ended_ns is not None):
                adopter = parent_now(process.tgid)
                if adopter is None:
                    process.ppid = None
                    break
                if adopter != process.ppid:
                    process.ppid = adopter
                    continue
            if parent is None:
                break
            chain.append(sure(parent))
            process, parent_named = parent, False
        return tuple(chain)

    def end(self, process: Process, at_ns: int, certain: bool = False) -> None:
        """Mark a process as ended; `sweep` removes it later. Unless `certain`, other threads may still live."""
        if process.ended_ns is None:
            process.ended_ns = at_ns
            self._ended.append((at_ns + KEEP_NS, at_ns, process.tgid, certain))

    def sweep(self, now_ns: int, is_alive: Callable[[int], bool]) -> None:
        """Remove the processes that ended over KEEP_NS ago. One with living threads has only lost its leader."""
        while self._ended and self._ended[0][0] < now_ns:
            _, ended_ns, tgid, certain = self._ended.popleft()
            process = self._processes.get(tgid)
            if process is None or process.ended_ns != ended_ns:
                continue  # the PID has a new owner, or an exec event came later
            if certain:
                del self._processes[tgid]
            elif is_alive(tgid):
                process.ended_ns = None
                self._leaderless.add(tgid)
            else:  # its last thread may have just ended, and that event needs the entry
                self._ended.append((now_ns + KEEP_NS, ended_ns, tgid, True))
        for tgid in list(self._leaderless):
            process = self._processes.get(tgid)
            if process is None or process.ended_ns is not None:
                self._leaderless.discard(tgid)
            elif not is_alive(tgid):
                self._leaderless.discard(tgid)
                self.end(process, now_ns)

    def adopt(self, snapshot: Iterable[Process]) -> list[Process]:
        """Enter a /proc scan (first half of a resync). Return former owners of reused PIDs.

        Their exits may be queued. So they stay until the events of before the scan were evaluated: see `replace`.
        """
        former = []
        for found in snapshot:
            known = self.renew(found)
            if known is None or not is_later(found, known):
                continue
            if known.ended_ns is None:
                former.append(known)
            else:
                self._processes[found.tgid] = found
        return former

    def replace(self, found: Process) -> None:
        """Enter what /proc shows of a process now, in the place of an earlier owner of its PID."""
        known = self.renew(found)
        if known is not None and is_later(found, known):
            self._processes[found.tgid] = found

    def still_has(self, former: Process) -> bool:
        """Return whether no end and no new owner of this process's PID was seen since."""
        entry = self._entry(former.tgid)
        return entry is not None and entry.ended_ns is None and entry.start_ns == former.start_ns

    def renew(self, found: Process) -> Process | None:
        """Enter what /proc shows of a process now. If its PID had an owner before it, leave and return that entry."""
        known = self._entry(found.tgid)
        if known is None:
            self._processes[found.tgid] = found
        elif not same_process(known, found):
            return known
        else:
            known = self.own(known)
            known.threads, known.counted_ns, known.ppid = found.threads, found.counted_ns, found.ppid
            known.threaded = known.threaded or found.threaded
            known.ended_ns = None  # its leader may have ended before it
            _settle(known, found)
            known.take_newer(found)
        return None

    def doubt(self) -> None:
        """Events were lost: each entry is out of date until its process is read again, and what its children have."""
        for process in self._processes.values():
            process.in_doubt = True
        for _, parent in self._births.values():
            parent.in_doubt = True

    def started_since(self, at_ns: int) -> list[int]:
        """Return the PIDs of the living processes that started then or later."""
        births = [tgid for tgid, (fork_ns, _) in self._births.items() if fork_ns >= at_ns]
        return births + [
            process.tgid
            for process in self._processes.values()
            if process.ended_ns is None and (process.start_ns or 0) >= at_ns
        ]

    def unseen(self, living: Container[int], scan_began_ns: int) -> list[Process]:
        """Return the processes that are gone without an exit event (second half of a resync).

        Call it after the events that came during the scan were read. `living` are the PIDs of the scan. A process that
        started after the scan began cannot be in it.
        """
        for tgid in [tgid for tgid in self._births if tgid not in living]:
            self._entry(tgid)
        return [
            process
            for process in self._processes.values()
            if process.ended_ns is None and (process.start_ns or 0) < scan_began_ns and process.tgid not in living
        ]

    def remove(self, unseen: Iterable[Process]) -> list[Process]:
        """Remove these processes. Return those that were still in the table: the end of others was seen since."""
        return [self._processes.pop(one.tgid) for one in unseen if self.still_has(one)]

    def clear(self) -> None:
        self._processes.clear()
        self._births.clear()
        self._ended.clear()
        self._leaderless.clear()


def _settle(known: Process, found: Process) -> None:
    """The process was read again: forget what may be out of date. What was read then takes its place."""
    if known.in_doubt:
        forget_doubtful(known, found.exe_file is not None and found.exe_file == known.exe_file)


def _began_at(process: Process, at_ns: int) -> bool:
    return process.start_ns is not None and abs(process.start_ns - at_ns) <= START_TOLERANCE_NS


def _began_after(process: Process, at_ns: int) -> bool:
    """Return whether a process was known at a later time than that of a fork, and is not known to be the forked one."""
    if process.start_ns is None:
        return process.counted_ns >= at_ns
    return process.start_ns > at_ns + START_TOLERANCE_NS


def is_later(found: Process, known: Process) -> bool:
    """Return whether a process is another one than the known one with its PID, and started later."""
    return not same_process(found, known) and (known.start_ns or 0) < (found.start_ns or 0)


def same_process(one: Process, other: Process) -> bool:
    """Return whether two entries with one PID are one process: their starts agree within the resolution of /proc."""
    if one.start_ns is None or other.start_ns is None:
        return True
    return abs(one.start_ns - other.start_ns) <= START_TOLERANCE_NS
