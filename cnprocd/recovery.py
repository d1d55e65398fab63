"""After an overrun: count what was lost, find the processes that vanished unseen, report both.

The order of a resync decides that nothing is missed and nothing reported twice: scan /proc, evaluate the events that
happened up to the end of the scan, then compare. A process that the table still has and /proc has not has vanished
without an event. A resync is done in small steps between batches of events: a scan takes 30 us a process, and a storm
may have filled the queue again.

Pidfds on the processes that rules care about are a second source of exit statuses (process/holder.py). Without a table
they are the only one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

from cnprocd.connector.source import Batch, Losses, Source
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.escape import printable
from cnprocd.log import Log
from cnprocd.process.holder import Ended, Holder
from cnprocd.process.model import Occurrence, Process, ProcScan
from cnprocd.process.table import is_later
from cnprocd.process.tracker import Tracker
from cnprocd.rules.compile import Matcher

_IN_FLIGHT_NS = 2_000_000  # between a task's disappearance from /proc and its exit event (sent after reaping)
MOST_NAMED = 20  # processes in a record
_PIECE = 64  # records or processes that are looked at between two looks at the clock
_RESYNC_EVERY_S = 1.0  # a scan of /proc per second is what a storm that never ends may cost


@dataclass(slots=True)
class _Resync:
    """A comparison with /proc that is under way."""

    scan: Iterator[Sequence[Process]] | None  # None: there is no table to compare
    waiting: Iterator[tuple[int, tuple[TaskRecord, ...]]]  # records without their event at its beginning
    began_ns: int
    losses: Losses  # at its beginning
    scanned_ns: int | None = None
    is_reached: bool = False  # whether the events up to the end of the scan are evaluated
    has_records: bool = False  # whether all exit records were read after that
    pieces: Iterator[list[Occurrence]] = field(default_factory=lambda: iter(()))  # what is left to return, then
    living: set[int] = field(default_factory=set)
    former: list[Process] = field(default_factory=list)  # earlier owners of PIDs that the scan found with a new one
    named: list[Occurrence] = field(default_factory=list)  # of the exits that were returned, those for the log
    count: int = 0  # of these exits


class Recovery:
    """Notes losses, and finds the exits that they hid."""

    def __init__(
        self,
        source: Source,
        tracker: Tracker,
        procfs: ProcScan,
        holder: Holder | None,
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`holder`: None on kernels that do not report the exit status of a reaped process by its pidfd."""
        self.resyncs = 0
        self.recovered = 0
        self._source = source
        self._tracker = tracker
        self._procfs = procfs
        self._holder = holder
        self._log = log
        self._clock = clock
        self._pending = False
        self._is_losing = False  # events were lost, and the queue was not empty since
        self._doubted = 0  # of the lost events: those that were counted when the last resync began
        self._resync: _Resync | None = None
        self._resynced_at_s = -_RESYNC_EVERY_S
        self._lost_reported = 0
        self._silent_count = 0  # exits that the loss hid, found outside a resync and not yet logged
        self._silent_named: list[Occurrence] = []  # the first of them

    def note(self, batch: Batch) -> None:
        """Remember whether the kernel dropped something, so that a resync is due. Call it before the batch is taken.

        It drops all events from the overrun on until the queue was read empty. So what was read of a process before
        that is in doubt as well.
        """
        self._pending = self._pending or batch.overrun
        self._is_losing = self._is_losing or batch.events_lost
        if batch.events_lost or (self._is_losing and not batch.more):
            self._tracker.table.doubt()
            self._pending = self._pending or self._tracker.tracking.table  # a scan since the overrun came too early
            self._is_losing = batch.more

    @property
    def active(self) -> bool:
        """Whether a resync is under way."""
        return self._resync is not None

    @property
    def needs_records(self) -> bool:
        """Whether to read all exit records that are queued: those of vanished processes show their status.

        Tens of thousands may be queued, and are kept in memory until their events come. So they are read once, if there
        is a table to compare, and when no older event waits: in a storm that can be long after the scan.
        """
        resync = self._resync
        return resync is not None and resync.scan is not None and resync.is_reached and not resync.has_records

    def begin_if_due(self) -> None:
        """Begin a resync after an overrun, at most one a second."""
        if self._pending and self._clock() - self._resynced_at_s >= _RESYNC_EVERY_S:
            self.begin()

    def check_losses(self) -> bool:
        """Read the kernel's counters; return whether a resync is needed, now or from an overrun before."""
        self._source.count_losses()
        return self._pending or self._source.losses.total() != self._lost_reported

    def begin(self) -> None:
        """Begin a resync. Call `go_on` until it is not active any more; other events may be evaluated in between."""
        if self._resync is not None:
            return
        self._resynced_at_s = self._clock()
        self._pending = False
        self.resyncs += 1
        tracking = self._tracker.tracking
        scan = self._procfs.scan_in_groups(tracking.wanted_anew) if tracking.table else None
        self._source.count_losses()
        losses = replace(self._source.losses)  # what is lost from here on, the next resync reports
        events_lost = losses.connector_drops + losses.sequence_gaps
        if events_lost != self._doubted:
            self._doubted = events_lost
            self._tracker.table.doubt()
        waiting = iter(self._tracker.deaths.waiting().items())
        self._resync = _Resync(scan, waiting, time.monotonic_ns(), losses)

    def go_on(self, seen_ns: int, budget_s: float) -> list[Occurrence]:
        """Continue for at most so long. Return exits that the loss hid. Evaluate them before the next call.

        Events up to `seen_ns` (CLOCK_MONOTONIC) have been evaluated. Their status is unknown, unless a pidfd shows it.
        """
        resync, deadline_s = self._resync, self._clock() + budget_s
        assert resync is not None
        if resync.scanned_ns is None:
            if not self._scan(resync, deadline_s):
                return []
            resync.pieces = self._compare(resync, [] if self._holder is None else self._holder.ended())
            resync.scanned_ns = time.monotonic_ns()
        if seen_ns < resync.scanned_ns + _IN_FLIGHT_NS and not resync.is_reached:
            return []
        if resync.scan is not None and not resync.is_reached:
            resync.is_reached = True
            return []  # the next drain reads the records
        resync.has_records = True
        found: list[Occurrence] = []
        for piece in resync.pieces:
            found += self._recovered(resync, piece)
            if len(found) >= _PIECE or self._clock() >= deadline_s:
                return found
        self._resync = None
        if self._report_losses(resync.losses) or resync.count:
            self._report_recovered(resync.named, resync.count, "ended while events were lost")
        return found

    def _scan(self, resync: _Resync, deadline_s: float) -> bool:
        """Take in processes until the time is up; return whether all are taken in.

        Each group at once: what an event changes must not be overwritten by what was read before it, and a process
        whose end was evaluated must not return to the table.
        """
        for group in resync.scan or ():
            if not self._tracker.tracking.table:  # other rules need none
                return True
            resync.living.update(process.tgid for process in group)
            resync.former += self._tracker.adopt(group)
            if self._clock() >= deadline_s:
                return False
        return True

    def _compare(self, resync: _Resync, ended: list[Ended]) -> Iterator[list[Occurrence]]:
        """Yield the exits that the loss hid, a few at a time: thousands may have been lost."""
        tracker, statuses = self._tracker, {process.tgid: status for process, status in ended}
        tgids: set[int] = set()  # of these exits: those that were not evaluated yet are still held
        for found in self._without_status(resync):
            for occurrence in found:
                tgids.add(occurrence.process.tgid)
                if occurrence.status is None:
                    occurrence.status = statuses.get(occurrence.process.tgid)
            yield found
        if not tracker.tracking.table:
            yield from _pieces(self._shown_by_pidfds([one for one in ended if one.process.tgid not in tgids]))

    def _without_status(self, resync: _Resync) -> Iterator[list[Occurrence]]:
        tracker = self._tracker
        while waiting := dict(islice(resync.waiting, _PIECE)):
            yield tracker.without_event(waiting)
        yield from map(self._replaced, _pieces(resync.former))
        if tracker.tracking.table and resync.scan is not None:  # a reload may have changed the plan since the beginning
            yield from map(tracker.missing, _pieces(tracker.table.unseen(resync.living, resync.began_ns)))

    def _replaced(self, former: list[Process]) -> list[Occurrence]:
        """Return the exits of these processes that the loss hid, and enter the new owners of their PIDs."""
        tracker, found = self._tracker, list[Occurrence]()
        for process in former:
            owner = self._procfs.read(process.tgid, tracker.tracking.wanted_anew, "procfs")
            is_replaced = owner is not None and owner.threads > 0 and is_later(owner, process)
            # A record that waits may be that of an owner which is gone as well.
            if tracker.table.still_has(process) and (is_replaced or not tracker.deaths.waiting_of([process])):
                found += tracker.missing([process])
            if owner is not None and is_replaced:
                tracker.table.replace(owner)
        return found

    def _recovered(self, resync: _Resync, found: list[Occurrence]) -> list[Occurrence]:
        """Mark and count recovered exits. Return those that rules ask for."""
        found = [occurrence for occurrence in found if occurrence.kind in self._tracker.tracking.kinds]
        for occurrence in found:
            occurrence.recovered = True
        self.recovered += len(found)
        resync.count += len(found)
        resync.named += found[: MOST_NAMED - len(resync.named)]
        return found

    def lost(self) -> list[Occurrence]:
        """Return some exits whose event was lost, and that no resync has found. Evaluate them at once."""
        deaths = self._tracker.deaths
        if not deaths.has_lost:
            return []
        found = list(self._tracker.all_died(deaths.lost(_PIECE)))
        self._note_silent(found)
        return found

    def report_silent(self) -> None:
        """Log what `lost` has returned since the last call."""
        count, self._silent_count = self._silent_count, 0
        named, self._silent_named = self._silent_named, []
        if count:
            self._report_recovered(named, count, "ended, and their events were lost")

    def _note_silent(self, found: list[Occurrence]) -> None:
        self.recovered += len(found)
        self._silent_count += len(found)
        self._silent_named += found[: MOST_NAMED - len(self._silent_named)]

    def report_handover(self) -> None:
        """Log how many exit records the last daemon had read and could not keep for this one."""
        lost = self._source.take_lost_records()
        if lost:
            message = (
                f"no room for {lost} exit records of the last daemon in the runtime directory: their names are lost"
            )
            self._log("warning", "handover_incomplete", count=lost, message=message)

    def _report_recovered(self, first: list[Occurrence], count: int, how: str) -> None:
        """Log how many processes were recovered, and which: the first of them."""
        named = [occurrence.process for occurrence in first]
        comms = [printable(process.comm) if process.comm is not None else None for process in named]
        names = [f"{comm or 'unknown'}[{process.tgid}]" for comm, process in zip(comms, named, strict=True)]
        names += [f"{count - MOST_NAMED} more"] if count > MOST_NAMED else []
        self._log(
            "warning",
            "recovered",
            count=count,
            pids=[process.tgid for process in named],
            comms=comms,
            tracked=len(self._tracker.table),
            message=f"{count} processes {how}{': ' if names else ''}{', '.join(names)}",
        )

    # Pidfds, the second source of exit statuses.

    def hold(self, processes: Iterable[Process], matcher: Matcher, successor: Matcher | None = None) -> None:
        """Open pidfds on those of these living processes whose exit a rule could match by comm.

        `successor`: the rules that come into force next. What they ask for has precedence: after a reload as many
        processes are held as after a start.
        """
        if self._holder is None or not matcher.wants("exit", threads=False):
            return
        if self._holder.crowded:  # the exits of some were filtered in the kernel, so no event released them
            for ended in self._holder.ended():
                # An exit that no rule asks for may have been passed over.
                cares = matcher.cares("exit", False, ended.process.comm, ended.status)
                if not cares or ended.status not in self._source.wanted_exits:
                    self._holder.release(ended.process.tgid)
            self._holder.thinned()
        wanted = [process for process in processes if _cares_for(matcher, process)]
        if successor is not None:
            wanted.sort(key=lambda one: not _cares_for(successor, one))
            missing = sum(_cares_for(successor, one) for one in wanted) - self._holder.room
            self._holder.release_all(lambda held: not _cares_for(successor, held), max(0, missing))
        for process in wanted:
            self._holder.hold(process)

    def let_go(self, matcher: Matcher) -> None:
        """Close the pidfds of processes that no rule asks for any more."""
        if self._holder is not None:
            self._holder.release_all(lambda held: not _cares_for(matcher, held))

    def release(self, tgid: int) -> None:
        """Close the pidfd of a process whose exit was seen."""
        if self._holder is not None:
            self._holder.release(tgid)

    def _shown_by_pidfds(self, ended: list[Ended]) -> list[Occurrence]:
        """Return the exits that the pidfds alone show.

        The event of one that ended has been evaluated since, if it came: then it is not held any more. With a table,
        one that ended after the scan had read it is left to the next resync, which is pending.
        """
        holder = self._holder
        alone = [] if holder is None else [(one, status) for one, status in ended if holder.holds(one)]
        return [Occurrence("exit", process, process.tgid, status) for process, status in alone]

    def _report_losses(self, losses: Losses) -> bool:
        """Log what the kernel had counted when the resync began, and no resync has reported. Return whether it had."""
        lost, self._lost_reported = losses.total() - self._lost_reported, losses.total()
        if not lost:
            return False
        self._log(
            "warning",
            "overrun",
            lost=lost,
            lost_total=losses.total(),
            connector_drops_total=losses.connector_drops,
            taskstats_drops_total=losses.taskstats_drops,
            sequence_gaps_total=losses.sequence_gaps,
            message=_overrun_message(lost, self._tracker.tracking.table),
        )
        return True


_T = TypeVar("_T")


def _pieces(everything: list[_T]) -> Iterator[list[_T]]:
    return (everything[at : at + _PIECE] for at in range(0, len(everything), _PIECE))


def _cares_for(matcher: Matcher, process: Process) -> bool:
    return matcher.cares("exit", False, process.comm)


def _overrun_message(lost: int, table: bool) -> str:
    what = f"{lost} events were lost: the receive buffer was full"
    return f"{what}; compared the table with /proc" if table else f"{what}; raise settings.receive_buffer"
