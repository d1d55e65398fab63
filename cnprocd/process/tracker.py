"""Join events and exit records with processes: events and records in, occurrences out. PURE.

/proc is read through `ProcLookup`, so that a test can play any machine. One `take` handles the events and records of
one drain. It sorts the events by their timestamps, because the kernel orders them per CPU only.

Most events are forks and exits of processes that no rule asks for. They are handled as rows (unasked.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from cnprocd.connector.ahead import Ahead, nothing_ahead
from cnprocd.connector.event import Ack, Comm, Coredump, Event, Exec, Exit, Fork, Gid, Ptrace, Row, Sid, Uid, named
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.failures import Failures
from cnprocd.process.completion import lives, read_zombie
from cnprocd.process.death import Death, Waiting, thread_of
from cnprocd.process.deaths import Deaths
from cnprocd.process.doubt import forget_at_death, sure
from cnprocd.process.executed_file import take_executed_file
from cnprocd.process.executions import Executions
from cnprocd.process.family import HookFamily
from cnprocd.process.inheritance import confirmed, take_uid
from cnprocd.process.model import KINDS_OF_LASTING_COMM, FileLookup, Kind, Occurrence, Process, ProcLookup, Wanted
from cnprocd.process.table import Table
from cnprocd.process.thread_count import ThreadCount
from cnprocd.process.tracking import Tracking
from cnprocd.process.unasked import Cares, Unasked, about_everything

_by_time = itemgetter(2)


class Tracker:
    """Keeps the table, joins deaths, and follows the family of hooks."""

    def __init__(
        self,
        tracking: Tracking,
        procfs: ProcLookup,
        own_tgid: int,
        cares: Cares = about_everything,
        files: FileLookup | None = None,
        failures: Failures | None = None,
    ) -> None:
        """`files`: those that exit records name. `failures`: gets unexpected exceptions; None: they are raised."""
        self._failures = failures
        self._files = files
        self.table = Table()
        self._thread_count = ThreadCount(self.table, procfs)
        self.deaths = Deaths(procfs.is_alive, procfs.is_ending)
        self.family = HookFamily(own_tgid)
        self._cares, self._procfs = cares, procfs
        self.newcomers: set[int] = set()  # tgids that started or changed their comm since the last tick, with a table
        self.use(tracking, cares)
        self._executions = Executions(procfs)
        self._cores: dict[int, int] = {}  # tgid -> time of its coredump event: one dump is one occurrence
        self._handlers: dict[type, Callable[[Any], Iterable[Occurrence]]] = {
            Fork: self._fork, Exec: self._exec, Uid: self._uid, Gid: self._gid, Sid: self._sid, Ptrace: self._ptrace,
            Comm: self._comm, Coredump: self._coredump, Exit: self._exit, Ack: lambda event: (),
        }  # fmt: skip

    def use(self, tracking: Tracking, cares: Cares = about_everything) -> None:
        """Use another plan from the next event on."""
        if cares != self._cares:  # else the processes that were passed over still need no answer
            self.deaths.forget_passed()
        self.tracking, self._cares = tracking, cares
        self._of_thread_forks = "fork" in tracking.thread_kinds
        self.deaths.wanted = tracking.statuses.wait_statuses()
        if tracking.records:
            self._thread_count = ThreadCount(self.table, self._procfs)  # nothing of it is kept up to date
        if tracking.table:
            self.table.enter_births()
        else:
            self.table.clear()
        self.unasked = Unasked(self.table, self.deaths, self.family, self.newcomers, tracking, cares)

    def take(
        self,
        events: list[Row],
        records: Iterable[TaskRecord],
        now_ns: int | None = None,
        passed: list[int] | None = None,
        look_ahead: Callable[[], Ahead] = nothing_ahead,
    ) -> Iterator[Occurrence]:
        """Yield the occurrences in order. `records` must have been drained after `events`.

        `now_ns` (CLOCK_MONOTONIC) bounds how long an incomplete death is held; None: until this call. `passed`: the
        processes whose record was passed over. `look_ahead` returns the events that are queued behind this batch.

        Evaluate each occurrence at once. It shows the state at the time of its event, and only until the next one is
        taken, because its processes are the table's own, not copies.
        """
        if not events:
            self.deaths.caught_up()
        self._executions.begin(events, self.tracking, look_ahead)
        if passed:
            self.deaths.pass_over(passed)
        for record in records:
            try:
                self.deaths.record(record)
            except Exception:
                self._failed(record)
        yield from self.all_died(self.deaths.release_held(now_ns))
        events.sort(key=_by_time)
        handlers, takes = self._handlers, self.unasked.takes
        for row in events:
            try:
                if takes(row):
                    continue  # the most frequent case
                event = named(row)
                if found := handlers[type(event)](event):
                    yield from found
            except Exception:
                self._failed(row)

    def _failed(self, subject: object) -> None:
        if self._failures is None:
            raise  # noqa: PLE0704  # the exception that is being handled
        self._failures.note("identify", named(subject) if type(subject) is tuple else subject)

    def sweep(self, now_ns: int) -> list[Occurrence]:
        """Remove dead processes, about once a second. Return the deaths that the count of threads had missed."""
        is_alive = self._procfs.is_alive
        self.table.sweep(now_ns, is_alive)
        self.deaths.prune()
        found: list[Occurrence] = []
        if len(self._cores) > 64:
            self._cores = {tgid: at for tgid, at in self._cores.items() if at > now_ns - 60_000_000_000}
        self.family.sweep(is_alive)
        for process, event in self._thread_count.sweep(now_ns, is_alive):
            found += self._counted_out(process, event)
        return found

    def all_died(self, deaths: Iterable[Death]) -> Iterator[Occurrence]:
        """Yield the exits of these deaths."""
        for death in deaths:
            try:
                yield from self._died(death)
            except Exception:
                self._failed(death)

    # Recovery: see recovery.py for the order of these calls.

    def adopt(self, snapshot: Sequence[Process]) -> list[Process]:
        """Enter a /proc scan. Return the processes whose PID already has a new owner: see Table.adopt."""
        for process in snapshot:
            self._learn(process)
        return self.table.adopt(snapshot)

    def renew(self, group: Iterable[Process]) -> None:
        """Enter processes that were read just now, while no event is lost: each end has been evaluated or is queued."""
        for process in group:
            self._learn(process)
            if self.tracking.table:
                self.table.renew(process)

    def _learn(self, process: Process | None) -> None:
        if process is not None and process.exe is not None and self._files is not None:
            self._files.learn(process)

    def missing(self, unseen: Sequence[Process]) -> list[Occurrence]:
        """Return the exits of processes that vanished without an event: of unknown status, unless a record has come.

        `unseen`: from Table.unseen.
        """
        found = self.without_event(self.deaths.waiting_of(unseen))
        return found + [self._vanished(process) for process in self.table.remove(unseen)]

    def without_event(self, waited: Waiting) -> list[Occurrence]:
        """Return the deaths whose exit event was lost but whose record came. See Deaths.without_event."""
        return list(self.all_died(self.deaths.without_event(waited)))

    # One handler per event type.

    def _fork(self, event: Fork) -> Iterable[Occurrence]:
        tgid = event.child_tgid
        is_process = event.child_pid == tgid
        if is_process and (self.family.hooks or event.parent_tgid in self.family.roots):
            self.family.fork(event.parent_tgid, tgid)
        child = former = None
        if self.tracking.table:
            if not is_process:
                self.table.thread(event)
            else:
                child, former = self.table.fork(event)
                self.newcomers.add(tgid)
                if self._executions.is_in_doubt(event.parent_tgid, event.timestamp_ns):
                    child.forget_program()
                if child.comm is None:
                    self._fill(child, event.timestamp_ns)
                elif not (former or self._of_thread_forks or self._cares("fork", False, child.comm)):
                    self.unasked.remember(child.comm)
                    return ()
        found = self._occurrences(
            "fork", tgid, event.child_pid, event, is_process, {}, known=child, parent_tgid=event.parent_tgid
        )
        return found if former is None else [*self._lost_exit(former), *found]

    def _exec(self, event: Exec) -> Iterable[Occurrence]:
        tgid = event.process_tgid
        if not self.tracking.records:
            self._thread_count.executed(tgid)
        process = former = None
        if self.tracking.table:
            program = self._executions.program(tgid, event.timestamp_ns)
            self._learn(program)
            process, former = self.table.exec(tgid, event.timestamp_ns, program)
            self.newcomers.add(tgid)
            if program is not None and program.uid is None and process.unconfirmed and process.uid == 0:
                process = confirmed(process, self._procfs, self.tracking, self.deaths.record_of, is_gone=False)
        found = self._occurrences("exec", tgid, event.process_pid, event, True, {}, known=process)
        return found if former is None else [*self._lost_exit(former), *found]

    def _uid(self, event: Uid) -> Iterable[Occurrence]:
        by_exec = self.tracking.table and take_uid(event, self.table, self._procfs, self.tracking)
        details = {"ruid": event.ruid, "euid": event.euid}
        found = self._occurrences("uid", event.process_tgid, event.process_pid, event, None, details)
        for occurrence in found:  # a thread's own, or no table: /proc shows those of a moment later
            occurrence.process = occurrence.process.with_user_ids(event.ruid, event.euid, by_exec)
        return found

    def _gid(self, event: Gid) -> Iterable[Occurrence]:
        if self.tracking.table:
            self.table.gid(event)
        details = {"rgid": event.rgid, "egid": event.egid}
        found = self._occurrences("gid", event.process_tgid, event.process_pid, event, None, details)
        for occurrence in found:
            if occurrence.process.gid != event.rgid:
                occurrence.process = replace(occurrence.process, gid=event.rgid, ids_source="event")
        return found

    def _sid(self, event: Sid) -> Iterable[Occurrence]:
        return self._occurrences("sid", event.process_tgid, event.process_pid, event, True, {})

    def _ptrace(self, event: Ptrace) -> Iterable[Occurrence]:
        details = {"tracer_pid": event.tracer_tgid, "tracer_tid": event.tracer_pid}
        return self._occurrences("ptrace", event.process_tgid, event.process_pid, event, None, details)

    def _comm(self, event: Comm) -> Iterable[Occurrence]:
        comm = event.comm.decode("utf-8", "surrogateescape")
        if self.tracking.table:
            self.table.rename(event, comm)
            self.newcomers.add(event.process_tgid)
        if not (self._cares("comm", False, comm) or self._cares("comm", True, comm)):
            return ()  # without a look at /proc: a process can rename itself a million times a second
        found = self._occurrences("comm", event.process_tgid, event.process_pid, event, None, {})
        for occurrence in found:
            if occurrence.of_thread or event.process_pid == event.process_tgid:
                # A copy: a thread's comm must not become its process's in the table.
                occurrence.process = replace(occurrence.process, comm=comm, comm_source="event")
        return found

    def _coredump(self, event: Coredump) -> Iterable[Occurrence]:
        tgid = event.process_tgid
        first = event.timestamp_ns - self._cores.get(tgid, -(1 << 62)) > 1_000_000_000
        self._cores[tgid] = event.timestamp_ns
        of_process = True if first else None
        return self._occurrences(
            "coredump", tgid, event.process_pid, event, of_process, {}, not first, parent_tgid=event.parent_tgid
        )

    def _exit(self, event: Exit) -> Iterable[Occurrence]:
        found: list[Occurrence] = []
        if self.tracking.records:
            if event.exit_code in self.deaths.wanted:
                record, death = self.deaths.exit(event)
                if "exit" in self.tracking.thread_kinds:
                    found.append(self._thread_end(event, record))
                if death is not None:
                    found += self._died(death)
                    return found
            if self.tracking.table and event.process_pid == event.process_tgid:
                # The leader may have ended early: `sweep` checks /proc before it removes the process.
                process = self.table.get(event.process_tgid, event.timestamp_ns)
                if process is not None:
                    self.table.end(process, event.timestamp_ns)
        elif self.tracking.table:
            if "exit" in self.tracking.thread_kinds:
                found.append(self._thread_end(event, None))
            process = self._thread_count.exited(event)
            if process is not None:
                found += self._counted_out(process, event)
        return found

    def _counted_out(self, process: Process, event: Exit) -> Iterable[Occurrence]:
        status = self._thread_count.take_status(event)
        self.table.end(process, event.timestamp_ns, certain=not process.threaded)
        if "exit" in self.tracking.kinds:
            occurrence = Occurrence("exit", sure(process), event.process_pid, status, event.timestamp_ns, event.cpu)
            read_zombie(occurrence, self._procfs, self.tracking.wanted)
            yield self._placed(occurrence, event.parent_tgid)

    # From events to occurrences.

    def _died(self, death: Death) -> list[Occurrence]:
        """Return the exit of a process from its exit record or, if that was lost, from its event alone."""
        if death.is_passed_over:
            self.unasked.ended(death.tgid, None)
            return []
        event, record, leader, at_ns = death.event, death.record, death.leader, death.at_ns
        known = self.table.get(death.tgid, at_ns) if self.tracking.table else None
        if known is not None and event is None and lives(known, self._procfs):
            known = None  # the record is of an earlier owner of the PID
        if known is not None:
            # Without an event the time is unknown: the next sweep removes it.
            self.table.end(known, at_ns or known.start_ns or 0, certain=record is not None)
        comm = leader.comm if leader is not None else known.comm if known is not None else None
        if "exit" not in self.tracking.kinds or not self._cares("exit", False, comm, death.status):
            if known is not None and leader is not None:
                self.table.own(known).take_comm(leader, "taskstats")  # it may be the parent of the next process to end
            return []
        process = self.table.own(known) if known is not None else Process(death.tgid)
        forget_at_death(process, record, self._files)
        process.take_exit_records(record, leader, at_ns)
        occurrence = Occurrence("exit", process, death.tid, death.status, at_ns, death.cpu, usage=record)
        occurrence.recovered = event is None
        # cn_proc.c names no parent of a released task. A thread is always released; its process may be a zombie.
        occurrence.reaped = event is not None and event.parent_tgid == 0 and event.process_pid == death.tgid
        if self.tracking.exe_files and record is not None and self._files is not None:
            take_executed_file(process, record, self._files)
        read_zombie(occurrence, self._procfs, self.tracking.wanted)
        self._placed(occurrence, event.parent_tgid if event is not None else 0)
        if record is not None and record.ppid in self.family:  # its fork event may have been lost with a daemon
            occurrence.from_hook = True
        return [occurrence]

    def _thread_end(self, event: Exit, record: TaskRecord | None) -> Occurrence:
        """Return the exit of one thread. Its comm is the thread's own."""
        known = self.table.get(event.process_tgid, event.timestamp_ns) if self.tracking.table else None
        process = thread_of(known, event, record)
        occurrence = Occurrence(
            "exit", process, event.process_pid, event.exit_code, event.timestamp_ns, event.cpu, usage=record
        )
        occurrence.of_thread = True
        return self._placed(occurrence, event.parent_tgid)

    def _occurrences(
        self,
        kind: Kind,
        tgid: int,
        tid: int,
        event: Event,
        of_process: bool | None,
        details: dict[str, int],
        only_threads: bool = False,
        known: Process | None = None,
        parent_tgid: int = 0,
    ) -> list[Occurrence]:
        """Return the occurrences of an event that is not an exit: one for process rules, one for thread rules.

        `of_process`: whether the event is about the process as a whole; None: it is if the thread is the leader.
        `parent_tgid`: the parent that the event names; 0 if it names none.
        """
        at_ns, whole = event.timestamp_ns, tid == tgid if of_process is None else of_process
        for_process = whole and not only_threads and kind in self.tracking.kinds
        for_threads = kind in self.tracking.thread_kinds
        found: list[Occurrence] = []
        if not (for_process or for_threads):
            return found
        process = sure(known or self._living(tgid, kind, at_ns))
        if kind not in KINDS_OF_LASTING_COMM and self._executions.is_in_doubt(tgid, at_ns):
            process = process.without_program()
        for of_thread in (False, True):
            if not (for_threads if of_thread else for_process):
                continue
            # A comm event matches by the new comm, which the process does not have yet.
            if kind != "comm" and not self._cares(kind, of_thread, process.comm):
                continue
            if process.unconfirmed and process.uid == 0 and kind != "fork" and (kind != "exec" or process.comm is None):
                process = confirmed(process, self._procfs, self.tracking, self.deaths.record_of, kind == "exec")
            occurrence = Occurrence(kind, process, tid, None, at_ns, event.cpu, of_thread=of_thread, details=details)
            found.append(self._placed(occurrence, parent_tgid))
        return found

    def _living(self, tgid: int, kind: Kind, at_ns: int) -> Process:
        """Return a process that is believed alive: from the table, or from /proc."""
        known = self.table.get(tgid, at_ns) if self.tracking.table else None
        if known is not None:
            return known
        if kind == "exec":
            return self._executions.program(tgid, at_ns) or Process(tgid)
        fresh = self._procfs.read(tgid, self.tracking.wanted_anew, "procfs") or Process(tgid)
        return fresh if kind in KINDS_OF_LASTING_COMM else fresh.without_program()

    def _fill(self, child: Process, forked_ns: int) -> None:
        """Read a new process from /proc whose comm is not that of a known process."""
        fresh = self._executions.born(child.tgid, forked_ns, self.tracking.wanted_anew)
        if fresh is not None:
            child.fill_unknown(fresh)

    def _lost_exit(self, former: Process) -> list[Occurrence]:
        return [self._vanished(former)] if "exit" in self.tracking.kinds else []

    def _vanished(self, process: Process) -> Occurrence:
        return self._placed(Occurrence("exit", sure(process), process.tgid, recovered=True), 0)

    def _placed(self, occurrence: Occurrence, parent_tgid: int) -> Occurrence:
        """Add the parent and the ancestors, and whether a hook started the process."""
        process = occurrence.process
        if parent_tgid:
            process.ppid = parent_tgid
        family, ppid = self.family, process.ppid
        occurrence.from_hook = process.tgid in family or (ppid in family.roots and family.is_root(ppid))
        if self.tracking.table:
            named = bool(parent_tgid) or occurrence.usage is not None
            occurrence.ancestors = self.table.ancestors(process, occurrence.kernel_time_ns, named, self._parent_now)
        return occurrence

    def _parent_now(self, tgid: int) -> int | None:
        return None if (fresh := self._procfs.read(tgid, Wanted(), "procfs")) is None else fresh.ppid
