"""One answer per process death, joined from exit records (taskstats) and exit events (connector). PURE.

Both come once per thread. The facts that make the join exact (measured on 6.18, each has a kernel test):

- A task's record is sent before its exit event. So whoever reads the connector first and taskstats second has, for
  every exit event in hand, the record too. They are joined by thread id.
- Exactly one record of a process is marked `last`. Its status is what waitpid() tells the parent: after exit_group or
  a fatal signal every thread shows the group's status, and otherwise the kernel takes the last thread's
  (kernel/exit.c synchronize_group_exit).
- One exception: after a core dump only the dumping thread's status carries the core flag, and its record may come a
  moment after the last one. A death by a core-dumping signal of a process that had threads is therefore held for a few
  milliseconds.
- comm is a thread's own. The process's is its leader's, whose record is kept when the leader ends first. It may also
  come a moment after the last one, and the death is held for it in the same way.
- exec by another thread than the leader ends the leader, with status 0, and gives its id to that thread: one thread id
  can have two records and two events in one batch. A record and its event show the same status. So a death whose
  leader's record says 0 is held as well: it may be the old leader's, and the new one's about to come.

A death whose event was lost is told without its time; one whose record was lost is told without its identity.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from cnprocd.connector.event import Exit
from cnprocd.connector.status import CORE_FLAG, CORE_SIGNALS, EVERY_STATUS, core_dumped
from cnprocd.connector.taskrecord import TaskRecord

_LEADERS_PRUNED_AT = 1024  # early leaders kept before those of dead processes are looked for
_TOGETHER_NS = 5_000_000  # threads of a group exit end within a few milliseconds of each other
HOLD_NS = 2_000_000  # how long after its event a death waits for the records of other threads
_REPORTED_NS = 1_000_000_000  # a second death of the same PID within this time, without records, is the same death


class Death(NamedTuple):
    """The end of a process. At least one of `event` and `record` is there."""

    tgid: int
    status: int
    event: Exit | None  # of the last thread
    record: TaskRecord | None  # of the last thread: usage of the whole process
    leader: TaskRecord | None  # identity of the process


Waiting = dict[int, tuple[TaskRecord, ...]]
"""Thread id -> records whose exit event is still to come."""


class Deaths:
    """The join. Feed records, then `release_held`, then exit events."""

    def __init__(self, is_alive: Callable[[int], bool], wanted: frozenset[int] = EVERY_STATUS.wait_statuses()) -> None:
        """`wanted`: the statuses whose records and events the kernel lets through, but for early leaders' records."""
        self.wanted = wanted
        self._is_alive = is_alive
        self._leaders: dict[int, TaskRecord] = {}  # tgid -> leader that ended before its process
        self._waiting: Waiting = {}
        self._gone: Waiting = {}  # who waited at the last `prune`, and was gone
        self._eventless: dict[int, int] = {}  # tgid -> status of a death that was told without its event
        self._caught_up = False
        self._dumped: dict[int, int] = {}  # tgid -> status of its thread that showed the core flag
        self._held: list[Death] = []
        self._reported: dict[int, int] = {}  # tgid -> time of a death that was told without a record
        self._prune_at = _LEADERS_PRUNED_AT
        self.without_record = 0

    def record(self, record: TaskRecord) -> None:
        """Take one exit record."""
        tid, waiting = record.pid, self._waiting
        waiting[tid] = (*waiting[tid], record) if tid in waiting else (record,)
        if record.last:
            if record.threaded:
                self._note_core(record.tgid, record.status)
            return
        if tid == record.tgid:
            self._leaders[tid] = record
        self._note_core(record.tgid, record.status)

    def exit(self, event: Exit) -> tuple[TaskRecord | None, Death | None]:
        """Take one exit event: the thread's record, and the death if this was the last thread and nothing may come."""
        tid = event.process_pid
        waiting = self._waiting.get(tid, ())
        if len(waiting) == 1:  # what nearly every exit comes to: one thread, one record, nothing else known of either
            only = waiting[0]
            alone = only.last and not (only.threaded or self._leaders or self._dumped)
            if alone and tid == only.tgid == event.process_tgid and only.status == event.exit_code:
                del self._waiting[tid]
                return only, Death(tid, only.status, event, only, only)
        record = self._joined(event)
        if record is None:
            return None, self._death_without_record(event)
        if not record.last:
            return record, None
        death = self._death(record, event)
        if record.threaded and self._is_incomplete(death):
            self._held.append(death)
            return record, None
        return record, death

    @property
    def has_held(self) -> bool:
        """A death waits for what a sibling's record tells: drain again after HOLD_NS."""
        return bool(self._held)

    @property
    def has_waiting(self) -> bool:
        """An exit record came whose event is still to come: whoever stops now leaves the event without its record."""
        return bool(self._waiting)

    @property
    def incomplete_tids(self) -> Collection[int]:
        """The thread ids of what is known by half, and by us alone."""
        if not self._held:
            return self._waiting
        held = {tid for death in self._held if death.event for tid in (death.event.process_pid, death.tgid)}
        return held | self._waiting.keys()

    def release_held(self, now_ns: int | None) -> list[Death]:
        """The deaths that were held and are complete by now, or have waited for long enough; None: all of them."""
        told: list[Death] = []
        waiting: list[Death] = []
        for death in self._held:
            late = self._leaders.get(death.tgid)
            if late is not None and not (late.status ^ death.status) & ~CORE_FLAG:  # else of the PID's next owner
                death = death._replace(leader=self._leaders.pop(death.tgid))
            death = self._with_core_flag(death)
            assert death.event is not None
            due_ns = death.event.timestamp_ns + HOLD_NS
            waits = now_ns is not None and now_ns < due_ns and self._is_incomplete(death)
            (waiting if waits else told).append(death)
        self._held = waiting
        return told

    def waiting(self) -> Waiting:
        """The records that wait for their event now."""
        return dict(self._waiting)

    def without_event(self, waited: Waiting) -> list[Death]:
        """The deaths of `waited` whose event was lost: it is still not there, and the process is gone.

        A record is made before the memory of a process is given back, which may take seconds, and its event after. So
        ask only when the events of all who were gone have been read. A leader's record without a death is forgotten.
        """
        lost: list[Death] = []
        for tid, records in waited.items():
            if self._waiting.get(tid) is not records or self._is_under_way(records):
                continue
            del self._waiting[tid]
            for record in records:
                if record.last:
                    self._eventless[record.tgid] = record.status
                    lost.append(self._death(record, None))
        return lost

    def _is_under_way(self, records: tuple[TaskRecord, ...]) -> bool:
        return any(record.last and self._is_alive(record.tgid) for record in records)

    def caught_up(self) -> None:
        """The queue of events was found empty."""
        self._caught_up = True

    def prune(self) -> list[Death]:
        """Forget what waits in vain, about once a second; returns the deaths whose event was lost without a word.

        In vain waits who was gone at the last `prune`, if the queue was found empty since. A leader that ended early
        may have an event that nobody asked for: most processes with threads leave one. A last thread's was asked for,
        and the kernel could not make it (cn_proc.c allocates without waiting, and tells nobody).
        """
        lost: list[Death] = []
        gone: Waiting = {}
        if self._caught_up:  # else we are behind: thousands may wait, and nobody in vain
            lost = self.without_event(self._gone)
            gone = {tid: records for tid, records in self._waiting.items() if not self._is_under_way(records)}
        self._gone, self._caught_up = gone, False
        if len(self._leaders) > self._prune_at:
            self._leaders = {tgid: r for tgid, r in self._leaders.items() if self._is_alive(tgid)}
            self._prune_at = max(_LEADERS_PRUNED_AT, 2 * len(self._leaders))
        for kept in (self._dumped, self._eventless):
            if len(kept) > _LEADERS_PRUNED_AT:
                kept.clear()
        return lost

    def _joined(self, event: Exit) -> TaskRecord | None:
        """The record of this very end; older ones of the same thread id, whose event was not asked for, are dropped."""
        tid, tgid, status = event.process_pid, event.process_tgid, event.exit_code
        waiting = self._waiting.get(tid, ())
        for number, record in enumerate(waiting, start=1):
            if record.tgid == tgid and record.status == status:
                if number < len(waiting):
                    self._waiting[tid] = waiting[number:]
                else:
                    del self._waiting[tid]
                return record
        return None

    def _death(self, record: TaskRecord, event: Exit | None) -> Death:
        tgid = record.tgid
        leader = self._leaders.pop(tgid, None) if self._leaders else None
        if record.pid == tgid:
            leader = record  # and a kept one is of before an exec by another thread, which took over the leader's id
        death = Death(tgid, record.status, event, record, leader)
        return self._with_core_flag(death) if self._dumped else death

    def _death_without_record(self, event: Exit) -> Death | None:
        tgid, now = event.process_tgid, event.timestamp_ns
        if self._eventless.get(tgid) == event.exit_code:
            del self._eventless[tgid]  # it came after all
            return None
        told = self._reported.get(tgid)
        if (told is not None and now - told < _REPORTED_NS) or self._is_alive(tgid):
            return None
        if len(self._reported) > _LEADERS_PRUNED_AT:
            self._reported.clear()
        self._reported[tgid] = now
        self.without_record += 1
        self._note_core(tgid, event.exit_code)
        # The leader's record is only looked at: a thread whose record nobody wanted may come here before the last one.
        return self._with_core_flag(Death(tgid, event.exit_code, event, None, self._leaders.get(tgid)))

    def _note_core(self, tgid: int, status: int) -> None:
        if core_dumped(status):
            self._dumped[tgid] = status

    def _with_core_flag(self, death: Death) -> Death:
        dumped = self._dumped.pop(death.tgid, None)
        if dumped is None or dumped & 0x7F != death.status & 0x7F:
            return death
        return death._replace(status=dumped)

    def _is_incomplete(self, death: Death) -> bool:
        """Whether the record of another thread may still tell the core flag, or who the process was."""
        record, leader = death.record, death.leader
        if record is None or not record.threaded:
            return False
        if leader is None or (leader is not record and leader.status == 0):
            return True  # one that ended with 0 may be of before an exec, whose successor's record is about to come
        return death.status & 0x7F in CORE_SIGNALS and not core_dumped(death.status)


class StatusEvidence(NamedTuple):
    """The status that tells a process's end, of its threads' so far, where no record says which thread was the last."""

    status: int
    at_ns: int
    of_leader: bool

    @classmethod
    def of(cls, event: Exit) -> StatusEvidence:
        return cls(event.exit_code, event.timestamp_ns, event.process_pid == event.process_tgid)

    def after(self, event: Exit) -> StatusEvidence:
        """This, or what another thread's end says.

        A signal ends all threads, so it comes first, and with its core flag, which only one of them shows. Of two
        codes the later tells, unless they came together: then one of them belongs to exit_group, and it is not the 0
        of a thread that was ending anyway, and rather the leader's than another's.
        """
        other = StatusEvidence.of(event)
        if self.status & 0x7F or other.status & 0x7F:
            first, second = (self, other) if self.status & 0x7F else (other, self)
            same_signal = first.status & 0x7F == second.status & 0x7F
            return first._replace(status=first.status | second.status & CORE_FLAG) if same_signal else first
        if abs(other.at_ns - self.at_ns) > _TOGETHER_NS:
            return max(self, other, key=_when)
        return max(self, other, key=_weight)


def _when(evidence: StatusEvidence) -> int:
    return evidence.at_ns


def _weight(evidence: StatusEvidence) -> tuple[bool, bool, int]:
    return evidence.status != 0, evidence.of_leader, evidence.at_ns
