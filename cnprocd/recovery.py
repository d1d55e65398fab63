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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from cnprocd.connector.source import Losses, Source
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.escape import printable
from cnprocd.log import Log
from cnprocd.process.holder import Ended, Holder
from cnprocd.process.model import Occurrence, Process, ProcScan
from cnprocd.process.tracker import Tracker
from cnprocd.rules.compile import Matcher

_IN_FLIGHT_NS = 2_000_000  # between a task's disappearance from /proc and its exit event (sent after reaping)
MOST_NAMED = 20  # processes in a record
_PIECE = 64  # records that are looked at between two looks at the clock
_RESYNC_EVERY_S = 1.0  # a scan of /proc per second is what a storm that never ends may cost


@dataclass(slots=True)
class _Resync:
    """A comparison with /proc that is under way."""

    scan: Iterator[Process]
    waiting: Iterator[tuple[int, tuple[TaskRecord, ...]]]  # records without their event at its beginning
    began_ns: int
    losses: Losses  # at its beginning
    scanned_ns: int | None = None
    ended: list[Ended] = field(default_factory=list)  # of the held processes, at the end of the scan
    living: set[int] = field(default_factory=set)
    found: list[Occurrence] = field(default_factory=list)
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
        self._resync: _Resync | None = None
        self._resynced_at_s = -_RESYNC_EVERY_S
        self._lost_reported = 0
        self._silent_count = 0  # exits that the loss hid, found outside a resync and not yet logged
        self._silent_named: list[Occurrence] = []  # the first of them

    def note_overrun(self) -> None:
        """Remember that the kernel dropped something, so that a resync is due."""
        self._pending = True

    @property
    def active(self) -> bool:
        """Whether a resync is under way."""
        return self._resync is not None

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
        scan = self._procfs.scan(tracking.wanted_anew) if tracking.table else ()
        self._source.count_losses()
        losses = replace(self._source.losses)  # what is lost from here on, the next resync reports
        waiting = iter(self._tracker.deaths.waiting().items())
        self._resync = _Resync(iter(scan), waiting, time.monotonic_ns(), losses)

    def go_on(self, seen_ns: int, budget_s: float) -> list[Occurrence]:
        """Continue for at most so long. Return exits that the loss hid. Evaluate them before the next call.

        Events up to `seen_ns` (CLOCK_MONOTONIC) have been evaluated. Their status is unknown, unless a pidfd shows it.
        """
        resync, deadline_s = self._resync, self._clock() + budget_s
        assert resync is not None
        if resync.scanned_ns is None:
            if not self._scan(resync, deadline_s):
                return []
            resync.ended = [] if self._holder is None else self._holder.ended()
            resync.scanned_ns = time.monotonic_ns()
        if seen_ns < resync.scanned_ns + _IN_FLIGHT_NS:
            return []
        found: list[Occurrence] = []
        while piece := dict(islice(resync.waiting, _PIECE)):
            found += self._tracker.without_event(piece)
            if self._clock() >= deadline_s:
                return self._recovered(resync, self._with_statuses(found, resync.ended))
        return self._finish(resync, found)

    def _scan(self, resync: _Resync, deadline_s: float) -> bool:
        """Take in processes until the time is up; return whether all are taken in.

        Each at once: what is read later than an event must not be overwritten by what was read before it.
        """
        for process in resync.scan:
            resync.living.add(process.tgid)
            resync.found += self._tracker.adopt([process])
            if self._clock() >= deadline_s:
                return False
        return True

    def _finish(self, resync: _Resync, found: list[Occurrence]) -> list[Occurrence]:
        tracker = self._tracker
        self._resync = None
        found = resync.found + found
        if tracker.tracking.table:
            found += tracker.missing(resync.living, resync.began_ns)
        found = self._with_statuses(found, resync.ended) + self._shown_by_pidfds(found, resync.ended)
        found = self._recovered(resync, found)
        self._report_losses(resync.losses)
        self._report_recovered(resync.named, resync.count, "ended while events were lost")
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
            self._report_recovered(named, count, "ended, and the kernel sent no event of it")

    def _note_silent(self, found: list[Occurrence]) -> None:
        self.recovered += len(found)
        self._silent_count += len(found)
        self._silent_named += found[: MOST_NAMED - len(self._silent_named)]

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

    def hold(self, processes: Iterable[Process], matcher: Matcher) -> None:
        """Open pidfds on those of these living processes whose exit a rule could match by comm."""
        if self._holder is None or not matcher.wants("exit", threads=False):
            return
        if self._holder.crowded:  # the exits of some were filtered in the kernel, so no event released them
            for ended in self._holder.ended():
                # An exit that no rule asks for may have been passed over.
                cares = matcher.cares("exit", False, ended.process.comm, ended.status)
                if not cares or ended.status not in self._source.wanted_exits:
                    self._holder.release(ended.process.tgid)
            self._holder.thinned()
        for process in processes:
            if _cares_for(matcher, process):
                self._holder.hold(process)

    def release(self, tgid: int) -> None:
        """Close the pidfd of a process whose exit was seen."""
        if self._holder is not None:
            self._holder.release(tgid)

    def _with_statuses(self, found: list[Occurrence], ended: list[Ended]) -> list[Occurrence]:
        """Add the statuses that the pidfds show."""
        by_tgid = {process.tgid: status for process, status in ended}
        for occurrence in found:
            if occurrence.status is None:
                occurrence.status = by_tgid.get(occurrence.process.tgid)
        return found

    def _shown_by_pidfds(self, found: list[Occurrence], ended: list[Ended]) -> list[Occurrence]:
        """Return the exits that the pidfds alone show.

        The event of one that ended has been evaluated since, if it came: then it is not held any more. With a table,
        one that ended after the scan had read it is left to the next resync, which is pending.
        """
        if self._tracker.tracking.table or self._holder is None:
            return []
        tgids = {occurrence.process.tgid for occurrence in found}
        alone = [(one, status) for one, status in ended if one.tgid not in tgids and self._holder.holds(one)]
        return [Occurrence("exit", process, process.tgid, status) for process, status in alone]

    def _report_losses(self, losses: Losses) -> None:
        """Log what the kernel had counted when the resync began, and no resync has reported."""
        lost, self._lost_reported = losses.total() - self._lost_reported, losses.total()
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


def _cares_for(matcher: Matcher, process: Process) -> bool:
    return matcher.cares("exit", False, process.comm)


def _overrun_message(lost: int, table: bool) -> str:
    what = f"{lost} events were lost: the receive buffer was full"
    return f"{what}; compared the table with /proc" if table else f"{what}; raise settings.receive_buffer"
