"""Join exit records (taskstats) and exit events (connector) into one death per process. PURE.

Both come once per thread. The facts that make the join exact (measured on 6.18, each has a kernel test):

- The kernel sends a task's record before its exit event. So if the connector is read first and taskstats second, the
  record of every exit event in the batch is in the batch as well. They are joined by thread id.
- Exactly one record of a process is marked `last`. Its status is the one that waitpid() returns: after exit_group or a
  fatal signal every thread shows the group's status, and otherwise the kernel takes the last thread's
  (kernel/exit.c synchronize_group_exit).
- The exception: after a core dump only the dumping thread's status carries the core flag, and its record may come a
  moment after the last one. So a death by a core-dumping signal of a process that had threads is held for a few
  milliseconds.
- A record's comm is that thread's. The process's comm is its leader's, whose record is kept if the leader ends first.
  That record may also come a moment after the last one, and the death is held for it in the same way.
- exec by another thread than the leader ends the leader, with status 0, and gives its id to that thread. So one thread
  id can have two records and two events in one batch. A record and its event show the same status. A death whose
  leader's record shows 0 is held as well: it may be the old leader's record, and the new leader's may be about to come.

A death whose event was lost is reported without its time; one whose record was lost is reported without its identity.

Most records are of whole processes that no rule asks for. Such a record is passed over (connector/taskrecord.py): only
its process id comes here, and waits for the exit event as PASSED, so that the event needs no answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice

from cnprocd.connector.event import Exit
from cnprocd.connector.needed import Needed, Union
from cnprocd.connector.status import CORE_FLAG, CORE_SIGNALS, EVERY_STATUS, core_dumped
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.death import COUNTED, PASSED, PASSED_OVER, Death, Waiting
from cnprocd.process.model import Process

_LEADERS_PRUNED_AT = 1024  # early leaders that are kept before those of dead processes are removed
MOST_LOOKED_FOR = 5_000  # processes that one `prune` looks for in /proc: about 20 ms
_TOGETHER_US = 1_000_000  # the records of two threads of a group exit; under load one may be made much later
HOLD_NS = 2_000_000  # how long after its event a death waits for the records of other threads
_REPORTED_NS = 1_000_000_000  # without records, a second death of the same PID within this time is the same death


class Deaths:
    """The join. Feed records, then `release_held`, then exit events."""

    def __init__(
        self,
        is_alive: Callable[[int], bool],
        is_ending: Callable[[int], bool] | None = None,
        wanted: frozenset[int] = EVERY_STATUS.wait_statuses(),
    ) -> None:
        """`is_ending`: whether a process is between its last record and its event; None: it is if it is alive.

        `wanted`: the statuses whose records and events the kernel passes; early leaders' records always pass.
        """
        self.wanted = wanted
        self._is_alive = is_alive
        self._is_ending = is_ending or is_alive
        self._leaders: dict[int, TaskRecord] = {}  # tgid -> leader that ended before its process, which lives on
        self._leader_of: dict[TaskRecord, TaskRecord] = {}  # a last thread's record -> its leader's
        self._lasts: dict[int, TaskRecord] = {}  # tgid -> a last thread's record; its leader's may be about to come
        self._waiting: Waiting = {}
        self._gone_leaders: dict[int, TaskRecord] = {}  # early leaders whose process was gone at the last `prune`
        self._gone: Waiting = {}  # records that waited at the last `prune`, of processes that were gone
        self._eventless: dict[int, int] = {}  # tgid -> status of a death that was reported without its event
        self._caught_up = False
        self._dumped: dict[int, tuple[int, int]] = {}  # tgid -> status and id of the thread that showed the core flag
        self._held: list[Death] = []
        self._lost: OrderedDict[int, tuple[TaskRecord, ...]] = OrderedDict()  # that wait, and whose event was lost
        self._overtaken: list[TaskRecord] = []  # of last threads: their event was lost, and the id has ended again
        self._reported: dict[int, int] = {}  # tgid -> time of a death that was reported without a record
        self._prune_at = _LEADERS_PRUNED_AT
        self._decided: list[int] = []  # threads with more records waiting, once for each that waits no more
        self._left: list[int] = []  # threads that may be needed no more, without those of exit events
        self._others_left = True  # any other thread may be needed no more as well
        self.without_record = 0

    def record(self, record: TaskRecord) -> None:
        """Take one exit record."""
        tid, waiting = record.pid, self._waiting
        if record.status in self.wanted:  # else its event is filtered, and it must not wait into another plan
            waiting[tid] = (*waiting[tid], record) if tid in waiting else (record,)
        if record.last:
            if record.threaded or self._leaders:
                self._take_last(record)
            return
        if tid == record.tgid:
            self._take_leader(record)
        self._note_core(record.tgid, record.status, tid)

    def _take_last(self, record: TaskRecord) -> None:
        """A process ends with this record: from now on leaders of its PID are another process's, or late."""
        leader = self._leaders.pop(record.tgid, None)  # of the leader itself: from before an exec by another thread
        if record.threaded:
            self._note_core(record.tgid, record.status, record.pid)
        if record.pid != record.tgid and record.status in self.wanted:
            self._lasts[record.tgid] = record
            if leader is not None:
                self._leader_of[record] = leader
        elif leader is not None:
            self._replaced(leader)

    def _take_leader(self, leader: TaskRecord) -> None:
        """Keep a leader's record for the end of its process; if that has come, it may be late by a moment."""
        last = self._lasts.get(leader.pid)
        if last is None or not _ended_together(leader, last):
            former = self._leaders.get(leader.pid)
            if former is not None:
                self._replaced(former)
            self._leaders[leader.pid] = leader
        else:
            self._leader_of[last] = leader

    def _replaced(self, leader: TaskRecord) -> None:
        """A thread that took over the leader's id has ended as well: the record was needed until now."""
        self._left.append(leader.pid)
        if leader not in self._waiting.get(leader.pid, ()):
            self._decided.append(leader.pid)

    def pass_over(self, tgids: list[int], mark: tuple[TaskRecord, ...] = PASSED) -> None:
        """Take the records of single-threaded processes that no rule asks for. `mark`: or COUNTED."""
        waiting = self._waiting
        if waiting.keys().isdisjoint(tgids):
            waiting.update(dict.fromkeys(tgids, mark))
        else:
            waiting.update({tgid: (*waiting.get(tgid, ()), *mark) for tgid in tgids})

    def take_passed(self, tid: int) -> bool:
        """Return whether this exit is of a process that was passed over; it is forgotten."""
        records = self._waiting.get(tid)
        if records is not PASSED and records is not COUNTED:
            return False
        del self._waiting[tid]
        return True

    def forget_passed(self) -> None:
        """Forget the processes that were passed over and whose exit has not come: other rules may ask for them."""
        waiting = self._waiting.items()
        self._waiting = {tid: one for tid, one in waiting if one is COUNTED or PASSED_OVER not in one}
        self._others_left = True

    def is_early_leader(self, tgid: int) -> bool:
        """Return whether the leader of a process ended, and other threads of it go on."""
        return tgid in self._leaders

    def exit(self, event: Exit) -> tuple[TaskRecord | None, Death | None]:
        """Take one exit event. Return the thread's record, and the death if it was the last thread and is complete."""
        tid = event.process_pid
        waiting = self._waiting.get(tid, ())
        if len(waiting) == 1:  # the most frequent case: one thread, one record, and no other state
            only = waiting[0]
            alone = only.last and not (only.threaded or self._leaders or self._dumped)
            if alone and tid == only.tgid == event.process_tgid and only.status == event.exit_code:
                del self._waiting[tid]
                return only, Death(tid, only.status, event, only, only)
        record = self._joined(event)
        if record is None:
            return None, self._death_without_record(event)
        if not record.last or record is PASSED_OVER:
            return record, None
        death = self._death(record, event)
        if record.threaded and self._is_incomplete(death):
            self._held.append(death)
            return record, None
        self._forget(record)
        return record, death

    @property
    def has_held(self) -> bool:
        """Whether a death is held for the record of a sibling thread: drain again after HOLD_NS."""
        return bool(self._held)

    @property
    def has_waiting(self) -> bool:
        """Whether an exit record waits for its event. After a stop now the next daemon would lack the record."""
        return bool(self._waiting)

    def take_needed(self) -> Needed:
        """Return what the next daemon would need of what was read. Call it after each batch, and after `lost`.

        It needs the records that wait for their event, both halves of the deaths that are held, and until a process
        ends, the records of its leader and of the thread that dumped core. A leader's record will wait for its event
        again: without it, it would take the event of a thread that took over its id.
        """
        decided, self._decided = self._decided, []
        left = None if self._others_left else self._left
        self._left, self._others_left = [], False
        if not (self._held or self._overtaken or self._leaders or self._leader_of or self._dumped):
            return Needed(frozenset(), self._waiting.keys(), decided, left)
        held = {tid for death in self._held if death.event for tid in (death.event.process_pid, death.tgid)}
        ended = {tid for tid, one in self._leaders.items() if one.status in self.wanted and tid not in self._waiting}
        kept = {leader.pid for leader in self._leader_of.values()} | self._leaders.keys()
        kept |= {tid for _, tid in self._dumped.values()}
        kept |= {tid for record in self._overtaken for tid in (record.pid, record.tgid)}
        return Needed(held | ended, Union(held | kept, self._waiting.keys()), decided, left)

    def release_held(self, now_ns: int | None) -> list[Death]:
        """Return the held deaths that are complete, or were held for HOLD_NS. `now_ns` None: return all of them."""
        released: list[Death] = []
        waiting: list[Death] = []
        for death in self._held:
            event, record = death.event, death.record
            assert event is not None and record is not None
            death = self._with_core_flag(death._replace(leader=self._leader_of.get(record, death.leader)))
            due_ns = event.timestamp_ns + HOLD_NS
            if now_ns is not None and now_ns < due_ns and self._is_incomplete(death):
                waiting.append(death)
            else:
                self._forget(record)
                released.append(death)
        self._held = waiting
        return released

    def record_of(self, tgid: int) -> TaskRecord | None:
        """Return a record of this process's leader that waits for its event."""
        record = self._waiting.get(tgid, (None,))[-1]
        return None if record is PASSED_OVER else record

    def waiting(self) -> Waiting:
        """Return the records that wait for their event now."""
        return dict(self._waiting)

    def waiting_of(self, processes: Iterable[Process]) -> Waiting:
        """Return the records of these processes that wait for their event now."""
        tgids = {process.tgid for process in processes}
        return {
            tid: records for tid, records in self._waiting.items() if any((r.tgid or tid) in tgids for r in records)
        }

    def without_event(self, waited: Waiting) -> list[Death]:
        """Return the deaths of `waited` whose event was lost: it has not come, and the process is gone.

        The kernel makes a record before it frees the memory of the process, which may take seconds, and the event
        after. So call this only after the events of all processes that were gone have been read. A leader's record
        without a death is dropped.
        """
        lost: list[Death] = []
        for tid, records in waited.items():
            if not self._is_under_way(tid, records):
                lost += self._lose(tid, records)
        return lost

    def lost(self, most: int) -> list[Death]:
        """Return deaths whose event was lost, as `prune` or the next end of the same thread id shows.

        Looks at `most` of those that `prune` found.
        """
        records, self._overtaken = self._overtaken, []
        found = [self._death_without_event(record) for record in records]
        for _ in range(min(most, len(self._lost))):
            found += self._lose(*self._lost.popitem(last=False))
        return found

    @property
    def has_lost(self) -> bool:
        """Whether `lost` has something to return."""
        return bool(self._lost or self._overtaken)

    def _lose(self, tid: int, records: tuple[TaskRecord, ...]) -> list[Death]:
        """Take these records out of those that wait, if they still do. Return the deaths among them."""
        waiting = self._waiting.get(tid, ())
        left = tuple(record for record in waiting if not _is_in(record, records))
        if left:
            self._waiting[tid] = left
        else:
            self._waiting.pop(tid, None)
            self._left.append(tid)
        found = [record for record in waiting if _is_in(record, records)]
        self._decided += [tid] * (len(found) if left else 0)
        return [
            Death(tid, 0, None, record, None) if record is PASSED_OVER else self._death_without_event(record)
            for record in found
            if record.last
        ]

    def _death_without_event(self, record: TaskRecord) -> Death:
        self._eventless[record.tgid] = record.status
        death = self._death(record, None)
        self._forget(record)
        return death

    def _is_under_way(self, tid: int, records: tuple[TaskRecord, ...]) -> bool:
        """Return whether the process still ends. A newer record of the same thread id shows that it is gone."""
        waiting = self._waiting.get(tid, ())
        if not waiting or not _is_in(waiting[-1], records):
            return False
        return any(record.last and self._is_ending(record.tgid or tid) for record in records)

    def early_leaders(self) -> list[TaskRecord]:
        """Return the records of leaders whose processes go on."""
        return list(self._leaders.values())

    def adopt(self, leaders: Iterable[TaskRecord]) -> None:
        """Take the early leaders that an earlier daemon knew."""
        self._leaders |= {leader.tgid: leader for leader in leaders}

    def caught_up(self) -> None:
        """Note that the queue of events was found empty."""
        self._caught_up = True

    def prune(self) -> None:
        """Find abandoned records, about once a second. Then call `lost` until it returns nothing.

        A record is abandoned if its process was gone at the last `prune` and the queue has been found empty since. The
        event of a leader that ended early may not have been asked for; most processes with threads leave such a record.
        The event of a last thread was asked for, and the kernel could not make it (cn_proc.c allocates without waiting,
        and raises no error).
        """
        if self._caught_up:  # else the daemon is behind: thousands of records may wait and none is abandoned
            self._lost |= self._gone
            undecided = (one for one in self._waiting.items() if one[0] not in self._lost)
            first = islice(undecided, MOST_LOOKED_FOR)
            self._gone = {tid: records for tid, records in first if not self._is_under_way(tid, records)}
            gone = self._gone_leaders
            self._leaders = {tgid: one for tgid, one in self._leaders.items() if one is not gone.get(tgid)}
            oldest = islice(self._leaders.items(), MOST_LOOKED_FOR)
            self._gone_leaders = {tgid: one for tgid, one in oldest if not self._is_alive(tgid)}
        self._caught_up = False
        if len(self._leaders) > self._prune_at:
            self._leaders = {tgid: r for tgid, r in self._leaders.items() if self._is_alive(tgid)}
            self._prune_at = max(_LEADERS_PRUNED_AT, 2 * len(self._leaders))
        for kept in (self._dumped, self._eventless):
            if len(kept) > _LEADERS_PRUNED_AT:
                kept.clear()
        self._others_left = True

    def _joined(self, event: Exit) -> TaskRecord | None:
        """Return the record of this exit.

        The events of older ones of the same thread id were lost, because events come in their order. Those of last
        threads are deaths. That of a leader that ended early may come all the same, as the next one: it is no death.
        """
        tid, tgid, status = event.process_pid, event.process_tgid, event.exit_code
        waiting = self._waiting.get(tid, ())
        abandoned = (*self._gone.get(tid, ()), *self._lost.get(tid, ()))
        matching = [
            number
            for number, record in enumerate(waiting)
            if record is PASSED_OVER or (record.tgid == tgid and record.status == status)
        ]
        if not matching:
            return None
        number = next((n for n in matching if not _is_in(waiting[n], abandoned)), matching[-1])
        if waiting[number].last and any(not waiting[n].last for n in matching if n < number):
            self._eventless[tgid] = status
        self._overtaken += [older for older in waiting[:number] if older.last and older is not PASSED_OVER]
        if number + 1 < len(waiting):
            self._waiting[tid] = waiting[number + 1 :]
            self._decided += [tid] * (number + 1)
        else:
            del self._waiting[tid]
        return waiting[number]

    def _death(self, record: TaskRecord, event: Exit | None) -> Death:
        leader = record if record.pid == record.tgid else self._leader_of.get(record)
        death = Death(record.tgid, record.status, event, record, leader)
        return self._with_core_flag(death) if self._dumped else death

    def _forget(self, last: TaskRecord) -> None:
        """The death of this record is reported."""
        self._left += (last.pid, last.tgid)
        self._leader_of.pop(last, None)
        if self._lasts.get(last.tgid) is last:
            del self._lasts[last.tgid]

    def _death_without_record(self, event: Exit) -> Death | None:
        tgid, now = event.process_tgid, event.timestamp_ns
        if self._eventless.get(tgid) == event.exit_code:
            del self._eventless[tgid]  # this is the event that was taken for lost
            return None
        reported_ns = self._reported.get(tgid)
        if (reported_ns is not None and now - reported_ns < _REPORTED_NS) or self._is_alive(tgid):
            return None
        if len(self._reported) > _LEADERS_PRUNED_AT:
            self._reported.clear()
        self._reported[tgid] = now
        self.without_record += 1
        self._note_core(tgid, event.exit_code, event.process_pid)
        # The leader's record is not removed: a thread whose record was filtered may come here before the last thread.
        return self._with_core_flag(Death(tgid, event.exit_code, event, None, self._leaders.get(tgid)))

    def _note_core(self, tgid: int, status: int, tid: int) -> None:
        if core_dumped(status):
            self._left.append(self._dumped.get(tgid, (status, tid))[1])
            self._dumped[tgid] = status, tid

    def _with_core_flag(self, death: Death) -> Death:
        dumped, dumper = self._dumped.get(death.tgid, (None, 0))
        if dumped is None:
            return death
        had_threads = death.record is None or death.record.threaded  # else its own record shows whether it dumped core
        lacks_it = had_threads and dumped & 0x7F == death.status & 0x7F and not core_dumped(death.status)
        if lacks_it or dumper not in self._waiting:  # else the next owner of the PID dumped core, and ends after it
            del self._dumped[death.tgid]
            self._left.append(dumper)
        return death._replace(status=dumped) if lacks_it else death

    def _is_incomplete(self, death: Death) -> bool:
        """Return whether the record of another thread may still bring the core flag or the process's comm."""
        record, leader = death.record, death.leader
        if record is None or not record.threaded:
            return False
        if leader is None or (leader is not record and leader.status == 0):
            return True  # one with status 0 may be from before an exec, and the new leader's record may be to come
        return death.status & 0x7F in CORE_SIGNALS and not core_dumped(death.status)


def _is_in(record: TaskRecord, records: tuple[TaskRecord, ...]) -> bool:
    return any(record is one for one in records)


def _ended_together(leader: TaskRecord, last: TaskRecord) -> bool:
    """Whether two records can be of one process whose threads ended together, and not of two owners of one PID."""
    same_status = not (leader.status ^ last.status) & ~CORE_FLAG
    return same_status and abs(leader.lifetime_us - last.lifetime_us) <= _TOGETHER_US
