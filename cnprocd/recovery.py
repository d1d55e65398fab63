"""After an overrun: count what was lost, find the processes that vanished unseen, report both.

The order of a resync decides that nothing is missed and nothing reported twice: scan /proc, read the events that came
during the scan, then compare. A process that the table still has and /proc has not has vanished without an event.

Pidfds on the processes that rules care about are a second source of exit statuses (process/holder.py). Without a table
they are the only one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from cnprocd.connector.source import Source
from cnprocd.log import Log
from cnprocd.process.holder import Holder
from cnprocd.process.model import Occurrence, Process, ProcScan
from cnprocd.process.tracker import Tracker
from cnprocd.rules.compile import Matcher

_IN_FLIGHT_S = 0.002  # between a task's disappearance from /proc and its exit event (cn_proc.c: sent after reaping)
_SCANS = 3  # of one resync, while the buffer overruns again during the scan
_RESYNC_EVERY_S = 1.0  # a scan of /proc per second is what a storm that never ends may cost


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
        self._resynced_at_s = -_RESYNC_EVERY_S
        self._lost_reported = 0

    def note_overrun(self) -> None:
        """Remember that the kernel dropped something, so that a resync is due."""
        self._pending = True

    @property
    def due(self) -> bool:
        """Whether to resync as soon as the queue is empty."""
        return self._pending and self._clock() - self._resynced_at_s >= _RESYNC_EVERY_S

    def check_losses(self) -> bool:
        """Read the kernel's counters; return whether a resync is needed, now or from an overrun before."""
        self._source.count_losses()
        return self._pending or self._source.losses.total() != self._lost_reported

    def resync(self, read_queue: Callable[[], None]) -> list[Occurrence]:
        """Count a loss, and return the exits that it hid: of unknown status, unless a pidfd shows the status.

        `read_queue` evaluates everything that is queued, and calls `note_overrun` if there was another one. Then the
        scan is repeated, a bounded number of times; a later resync goes on from there.
        """
        self._resynced_at_s = self._clock()
        self.resyncs += 1
        tracker, table = self._tracker, self._tracker.tracking.table
        found: list[Occurrence] = []
        for _ in range(_SCANS):
            self._pending = False
            waiting = tracker.deaths.waiting()
            scan_began_ns = time.monotonic_ns()
            snapshot = list(self._procfs.scan(tracker.tracking.wanted_anew)) if table else []
            found += tracker.adopt(snapshot)
            time.sleep(_IN_FLIGHT_S)
            read_queue()
            found += tracker.without_event(waiting)
            if table:
                found += tracker.missing({process.tgid for process in snapshot}, scan_began_ns)
            if not self._pending:
                break
        found = [occurrence for occurrence in self._with_statuses(found) if occurrence.kind in tracker.tracking.kinds]
        for occurrence in found:
            occurrence.recovered = True
        self.recovered += len(found)
        self._report_losses()
        self._log("warning", "recovered", count=len(found), tracked=len(tracker.table))
        return found

    def report_silent(self, missed: Iterable[Occurrence]) -> None:
        """Count and log the recovered ones of these exits: the kernel sent no event, and raised no error for it."""
        count = sum(occurrence.recovered for occurrence in missed)
        if not count:
            return
        self.recovered += count
        self._log(
            "warning",
            "recovered",
            count=count,
            tracked=len(self._tracker.table),
            message=f"the kernel sent no event of {count} exits; they were recovered from their exit records",
        )

    # Pidfds, the second source of exit statuses.

    def hold(self, processes: Iterable[Process], matcher: Matcher) -> None:
        """Open pidfds on those of these living processes whose exit a rule could match by comm."""
        if self._holder is None or not matcher.wants("exit", threads=False):
            return
        if self._holder.crowded:  # the exits of some were filtered in the kernel, so no event released them
            for ended in self._holder.ended():
                if ended.status not in self._source.wanted_exits or not _cares_for(matcher, ended.process):
                    self._holder.release(ended.process.tgid)
            self._holder.thinned()
        for process in processes:
            if _cares_for(matcher, process):
                self._holder.hold(process)

    def release(self, tgid: int) -> None:
        """Close the pidfd of a process whose exit was seen."""
        if self._holder is not None:
            self._holder.release(tgid)

    def _with_statuses(self, found: list[Occurrence]) -> list[Occurrence]:
        """Add the statuses that the pidfds show; without a table, also the exits that they alone show."""
        if self._holder is None:
            return found
        by_tgid = {occurrence.process.tgid: occurrence for occurrence in found}
        for process, status in self._holder.ended():
            occurrence = by_tgid.get(process.tgid)
            if occurrence is None:
                found.append(Occurrence("exit", process, process.tgid, status))
            elif occurrence.status is None:
                occurrence.status = status
        return found

    def _report_losses(self) -> None:
        """Log what the kernel counted since the last report. Exact, because the queue has just been read empty."""
        self._source.count_losses()
        losses = self._source.losses
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
