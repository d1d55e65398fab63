"""One event, straight down: drain, who was it, which rules, log it and spool the job. The hot line of the daemon.

    kernel -> source.drain -> tracker.take -> matcher.match -> deliver (jobs durable first, then the records)

Everything in `turn` is synchronous and done batch by batch, so the order of effects is the order of this file: a job is
in the spool before its record is logged and before the next batch is looked at. The daemon calls `turn` until it says
that nothing is left or its budget is spent.

Losses are handled in the same straight way by `resync`: read what is queued, scan /proc, read what came meanwhile, and
whoever the table still has and /proc has not has vanished unseen.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cnprocd.connector.source import Batch, Source
from cnprocd.connector.status import describe
from cnprocd.log import Log
from cnprocd.output.record import Record, match_record
from cnprocd.process.completion import complete
from cnprocd.process.holder import Holder
from cnprocd.process.model import Occurrence, Process, ProcScan
from cnprocd.process.tracker import Tracker
from cnprocd.rules.compile import Match, Matcher
from cnprocd.rules.plan import Plan

_IN_FLIGHT_S = 0.002  # between a task's disappearance from /proc and its exit event (cn_proc.c: sent after reaping)
_RESYNC_TRIES = 3
_RESYNC_EVERY_S = 1.0  # a scan of /proc per second is what a storm that never ends may cost
_MOST_TURNS = 64  # of one drain: a storm must not keep a reload or a stop waiting for ever
_SPOOFED_EVERY_S = 10.0
_NAMELESS_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class RecordedMatch:
    """A match and its record."""

    match: Match
    record: Record
    sources: Mapping[str, str] | None  # where each attribute of the process came from, if debug records want it


class Turn(NamedTuple):
    """How many events and records one batch held, and whether the queue may hold more."""

    seen: int
    more: bool


class Delivery(Protocol):
    """Where matches go: throttles, the spool, the log. Everything is durable when `deliver` returns."""

    def deliver(self, matches: list[RecordedMatch]) -> None: ...


@dataclass(slots=True)
class Counts:
    """What the pipeline did since start; shown by status and metrics."""

    occurrences: int = 0
    matches: int = 0
    recovered: int = 0
    nameless: int = 0  # deaths whose comm nobody could tell, while a rule asked for one
    resyncs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    rule_last_ns: dict[str, int] = field(default_factory=dict)  # wall clock


class Pipeline:
    """Owns the hot line; knows every room and nothing of asyncio."""

    def __init__(
        self,
        source: Source,
        tracker: Tracker,
        matcher: Matcher,
        delivery: Delivery,
        procfs: ProcScan,
        log: Log,
        holder: Holder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`holder`: pidfds as a second witness after losses, on kernels that tell a dead process's status."""
        self.source = source
        self.tracker = tracker
        self.matcher = matcher
        self.counts = Counts()
        self.logs_provenance = False
        self._delivery = delivery
        self._procfs = procfs
        self._log = log
        self._holder = holder
        self._clock = clock
        self._rejects_told = 0
        self._lost_told = 0
        self._nameless_untold = 0
        self._nameless_told_at = -_NAMELESS_EVERY_S
        self._spoofed_at = -_SPOOFED_EVERY_S
        self._resync_due = False
        self._resynced_at = -_RESYNC_EVERY_S

    def turn(self) -> Turn:
        """See one batch through."""
        batch = self.source.drain()
        if batch.overrun:
            self._resync_due = True
        self._see_through(batch)
        if self._resync_due and not batch.more and self._clock() - self._resynced_at >= _RESYNC_EVERY_S:
            self.resync()
        if self.source.rejects.total() != self._rejects_told:
            self._tell_rejects()
        return Turn(len(batch.events) + len(batch.records), batch.more)

    def _see_through(self, batch: Batch) -> None:
        tracker = self.tracker
        if not batch.more:
            tracker.deaths.caught_up()
        self._judge(tracker.take(batch.events, batch.records, time.monotonic_ns()))
        self.source.blank_slots(tracker.deaths.incomplete_tids)

    def _judge(self, occurrences: Iterable[Occurrence]) -> None:
        """Which rules? Every match is delivered, durable, before this returns."""
        matches = []
        for occurrence in occurrences:
            self.counts.occurrences += 1
            self.counts.kinds[occurrence.kind] += 1
            if occurrence.kind == "exit" and not occurrence.of_thread:
                self._note_exit(occurrence)
            found = self.matcher.match(occurrence)
            if found:
                complete(occurrence, self._procfs)
                sources = occurrence.process.provenance() if self.logs_provenance else None
                matches += [RecordedMatch(match, self._record(match), sources) for match in found]
        if matches:
            now_ns = time.time_ns()
            for recorded in matches:
                self.counts.rules[recorded.match.rule.name] += 1
                self.counts.rule_last_ns[recorded.match.rule.name] = now_ns
            self.counts.matches += len(matches)
            self._delivery.deliver(matches)

    def _note_exit(self, occurrence: Occurrence) -> None:
        if self._holder is not None:
            self._holder.release(occurrence.process.tgid)
        if occurrence.process.comm is None:
            self._note_nameless(occurrence)

    def _note_nameless(self, occurrence: Occurrence) -> None:
        """A death whose name nobody could tell: rules that ask for one cannot match it, and that must not be silent."""
        if not self.matcher.asks_for_comm or occurrence.from_hook:
            return
        self.counts.nameless += 1
        self._nameless_untold += 1
        now = self._clock()
        if now - self._nameless_told_at < _NAMELESS_EVERY_S:
            return
        self._log(
            "warning",
            "identity_unknown",
            pid=occurrence.process.tgid,
            status=describe(occurrence.status),
            count=self._nameless_untold,
            message=f"process {occurrence.process.tgid} ended ({describe(occurrence.status)}) before its name could be"
            " read; rules that ask for comm did not match it",
        )
        self._nameless_untold, self._nameless_told_at = 0, now

    def _record(self, match: Match) -> Record:
        return match_record(match, self._procfs.user_name)

    def start(self) -> None:
        """After LISTEN and its acknowledgement: scan, then take what came meanwhile. No match is made of the scan."""
        snapshot = list(self._procfs.scan(self.tracker.tracking.wanted_anew))
        self._adopt_hooks(snapshot)
        if self.tracker.tracking.table:
            self.tracker.adopt(snapshot)
        self._hold(snapshot)
        self.drain()

    def drain(self) -> None:
        """Turn until the queue is empty, or for a bounded while."""
        for _ in range(_MOST_TURNS):
            if not self.turn().more:
                return

    def finish(self) -> None:
        """Nobody reads on after us: what is known by half is told as far as it is known."""
        self._judge(self.tracker.without_event(self.tracker.deaths.waiting()))

    def use(self, matcher: Matcher, plan: Plan) -> bool:
        """Put other rules, or another plan for the same ones, in force without losing or doubling an event.

        What is queued is judged by the rules it happened under. Then the kernel is asked, which takes effect at once,
        and only then do the new rules judge. Returns False, with nothing changed, if exit records cannot be had.
        """
        self.drain()
        if not self.source.ask(plan.request):
            return False
        had_table = self.tracker.tracking.table
        self.matcher = matcher
        self.tracker.use(plan.tracking, matcher.cares)
        if not plan.tracking.table:
            self.tracker.table.clear()
        elif not had_table:
            self.tracker.adopt(list(self._procfs.scan(plan.tracking.wanted_anew)))
        return True

    def tick(self) -> None:
        """Housekeeping, about once a second while there is something to do."""
        missed = self.tracker.sweep(time.monotonic_ns())
        recovered = sum(occurrence.recovered for occurrence in missed)
        if recovered:
            self.counts.recovered += recovered
            what = f"the kernel sent no event of {recovered} exits; their exit records tell of them"
            self._log("warning", "recovered", count=recovered, tracked=len(self.tracker.table), message=what)
        self._judge(missed)
        newcomers, self.tracker.newcomers = self.tracker.newcomers, set()
        known = (self.tracker.table.get(tgid) for tgid in newcomers)
        self._hold(process for process in known if process is not None and process.ended_ns is None)
        self.source.count_losses()
        if self._resync_due or self.source.losses.total() != self._lost_told:
            self.resync()

    def _hold(self, processes: Iterable[Process]) -> None:
        """Keep a second witness of the processes that exit rules could match by name."""
        if self._holder is None or not self.matcher.wants("exit", threads=False):
            return
        if self._holder.crowded:  # the deaths of some were filtered in the kernel, so nobody told of them
            for ended in self._holder.ended():
                if ended.status not in self.source.wanted_exits or not self._cares_for(ended.process):
                    self._holder.release(ended.process.tgid)
            self._holder.thinned()
        for process in processes:
            if self._cares_for(process):
                self._holder.hold(process)

    def _cares_for(self, process: Process) -> bool:
        return self.matcher.cares("exit", False, process.comm)

    def resync(self) -> None:
        """After a loss: count it, find out who vanished, hand them to the rules as exits of unknown status.

        Repeated if the buffer overran during the scan, a bounded number of times; the next turn goes on from there.
        """
        self._resync_due = False
        self._resynced_at = self._clock()
        self.counts.resyncs += 1
        recovered: list[Occurrence] = []
        for _ in range(_RESYNC_TRIES):
            waiting = self.tracker.deaths.waiting()
            scan_began_ns = time.monotonic_ns()
            table = self.tracker.tracking.table
            snapshot = list(self._procfs.scan(self.tracker.tracking.wanted_anew)) if table else []
            recovered += self.tracker.adopt(snapshot)
            time.sleep(_IN_FLIGHT_S)
            self._take_what_came()
            recovered += self.tracker.without_event(waiting)
            if table:
                recovered += self.tracker.missing({process.tgid for process in snapshot}, scan_began_ns)
            if not self._resync_due:
                break
            self._resync_due = False
        recovered = self._with_statuses(recovered)
        recovered = [occurrence for occurrence in recovered if occurrence.kind in self.tracker.tracking.kinds]
        self.counts.recovered += len(recovered)
        for occurrence in recovered:
            occurrence.recovered = True
        self._tell_losses()
        self._log("warning", "recovered", count=len(recovered), tracked=len(self.tracker.table))
        self._judge(recovered)

    def _with_statuses(self, recovered: list[Occurrence]) -> list[Occurrence]:
        """Add what the pidfds tell: the status of whom the table missed, and, without a table, who died at all."""
        if self._holder is None:
            return recovered
        missed = {occurrence.process.tgid: occurrence for occurrence in recovered}
        for process, status in self._holder.ended():
            occurrence = missed.get(process.tgid)
            if occurrence is None:
                recovered.append(Occurrence("exit", process, process.tgid, status))
            elif occurrence.status is None:
                occurrence.status = status
        return recovered

    def _tell_losses(self) -> None:
        """What the kernel counted since the last time, exactly; read after the queue was drained."""
        self.source.count_losses()
        losses = self.source.losses
        lost, self._lost_told = losses.total() - self._lost_told, losses.total()
        self._log(
            "warning",
            "overrun",
            lost=lost,
            lost_total=losses.total(),
            connector_drops_total=losses.connector_drops,
            taskstats_drops_total=losses.taskstats_drops,
            sequence_gaps_total=losses.sequence_gaps,
            message=_overrun_message(lost, self.tracker.tracking.table),
        )

    def _take_what_came(self) -> None:
        while True:
            batch = self.source.drain()
            self._resync_due |= batch.overrun
            self._see_through(batch)
            if not batch.more:
                return

    def _adopt_hooks(self, snapshot: Iterable[Process]) -> None:
        """Hooks that outlived the last daemon, and what they started, are known by the job id in their environment."""
        for process in snapshot:
            if self._procfs.is_hook(process.tgid):
                self.tracker.family.add(process.tgid)

    def _tell_rejects(self) -> None:
        """Datagrams that the kernel did not send, at most one record in a while."""
        now = self._clock()
        if now - self._spoofed_at < _SPOOFED_EVERY_S:
            return
        rejects = self.source.rejects
        self._log(
            "warning",
            "spoofed",
            count=rejects.total() - self._rejects_told,
            foreign_sender=rejects.foreign_sender,
            wrong_length=rejects.wrong_length,
            truncated=rejects.truncated,
            wrong_id=rejects.wrong_id,
            unknown_event=rejects.unknown_event,
            message="dropped datagrams that are not proc connector events of the kernel",
        )
        self._rejects_told, self._spoofed_at = rejects.total(), now


def _overrun_message(lost: int, table: bool) -> str:
    what = f"{lost} events were lost: the receive buffer was full"
    return (
        f"{what}; /proc was compared with the table" if table else f"{what}; settings: receive_buffer makes it larger"
    )
