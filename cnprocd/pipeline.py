"""The hot line: drain a batch, identify the processes, match the rules, dispatch the matches.

    kernel -> source.drain -> tracker.take -> matcher.match -> deliver (jobs durable first, then the records)

Everything in `turn` is synchronous and done batch by batch, so the order of effects is the order of this file: a job is
in the spool before its record is logged and before the next batch is read. The event loop calls `turn` until nothing
is left or its budget is spent. After an overrun recovery.py finds what the lost events would have reported.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from cnprocd.alike import Later
from cnprocd.connector.inflight import EVENT_SLOTS
from cnprocd.connector.source import Batch, Source
from cnprocd.counts import Counts
from cnprocd.crowd import MOST_QUEUED, Crowd
from cnprocd.deferred import Deferred
from cnprocd.delivery import Delivery, RecordedMatch
from cnprocd.failures import Failures
from cnprocd.flood import MANY, Flood
from cnprocd.log import Log, ThrottledLog
from cnprocd.output.match_id import Machine
from cnprocd.output.record import match_record
from cnprocd.process.completion import complete
from cnprocd.process.death import COUNTED
from cnprocd.process.deaths import HOLD_NS
from cnprocd.process.executed_file import ended
from cnprocd.process.file_names import FileNames
from cnprocd.process.handed_on import HandedOn
from cnprocd.process.kernel_log import KernelLog
from cnprocd.process.model import Occurrence, Process, ProcScan, Wanted
from cnprocd.process.second_look import SecondLook
from cnprocd.process.tracker import Tracker
from cnprocd.recovery import Recovery
from cnprocd.rescan import Rescan
from cnprocd.rules.compile import Match, Matcher
from cnprocd.rules.plan import Plan
from cnprocd.unknown_attributes import UnknownAttributes

TURN_S = 0.008  # that one batch may take
LEAST_EVENTS = 16  # of a batch, however long it takes
FINISH_S = 2.0  # for exits whose event has not come, at a stop: after lost events they can be thousands
DRAIN_S = 0.05  # of one drain: a storm must not delay a reload, and the loop has others to serve
PARENTS_S = 0.05  # for which parents that were read from /proc are kept during a flood
AT_ONCE = 32  # deferred matches of one delivery: they must not delay events
SLOW_LOG_S = 0.02  # until the output is asked for room again
MOST_RECOVERED = 64  # exits of one delivery: it shows whether the queue of jobs has room for more
RESYNC_BUDGET_S = 0.005  # of a turn, for a comparison with /proc that is under way
_REPORT_EVERY_S = 10.0  # records of one class about rejected datagrams and unnamed exits


class Turn(NamedTuple):
    """How many events and records one batch held, and whether the queue may hold more."""

    seen: int
    more: bool


class Pipeline:
    """The hot line. Knows every room and nothing of asyncio."""

    def __init__(
        self,
        source: Source,
        tracker: Tracker,
        matcher: Matcher,
        delivery: Delivery,
        recovery: Recovery,
        procfs: ProcScan,
        log: Log,
        machine: Machine,
        files: FileNames | None = None,
        kernel_log: KernelLog | None = None,
        clock: Callable[[], float] = time.monotonic,
        failures: Failures | None = None,
        log_queued: Callable[[], int] = lambda: 0,
        waited_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`files`: the paths that rules name, kept up to date here; None: no rule names one.

        `log_queued`: log records that wait for the output; `waited_s`: the time of commits since start.
        """
        self._machine = machine
        self._life = os.urandom(8).hex()  # of this daemon, for matches whose time is unknown
        self.kernel_log = kernel_log or KernelLog(None, "the kernel log is not read")
        self.source = source
        self.tracker = tracker
        self.matcher = matcher
        self.recovery = recovery
        self.counts = Counts()
        self.failures = failures or Failures(log, clock)
        self.logs_provenance = False
        self._delivery = delivery
        self._procfs = procfs
        self._files = files
        self._log = log
        self._log_queued = log_queued
        self._waited_s = waited_s
        self._throttled = ThrottledLog(log, _REPORT_EVERY_S)
        self._clock = clock
        self.flood = Flood()
        self.deferred = Deferred[Later | tuple[Match, str]]()  # with their `unique`, to be reported when no events wait
        reports = self.flood, self.deferred, delivery
        self.crowd = Crowd(matcher, *reports, tracker.family, log_queued, self.failures, files)
        self._unknown = UnknownAttributes(self.counts.unknown, self._throttled, clock)
        self._rejects_reported = 0
        self._most = EVENT_SLOTS  # events of one batch
        self._known_parents: dict[int, Process | None] = {}
        self._parents_until_s = 0.0
        self._second_look = SecondLook(tracker.table, procfs, clock)
        self._drained_ns = 0  # when the last batch was read (CLOCK_MONOTONIC)

    # The hot line.

    def turn(self) -> Turn:
        """Drain, identify, match and dispatch one batch."""
        began_s, self._drained_ns = self._clock() - self._waited_s(), time.monotonic_ns()
        tracking, now_s = self.tracker.tracking, self._drained_ns / 1e9
        self.source.shed(self.crowd.begin(now_s, keeps=not tracking.table) if tracking.passes_over else None)
        batch = self.source.drain(self._most, all_records=self.recovery.needs_records)
        self._handle(batch)
        self._fit_batches(len(batch.events), self._clock() - self._waited_s() - began_s)
        recovery = self.recovery
        recovery.begin_if_due()
        if recovery.active:
            # Only an empty batch shows that the queue is empty: an overrun meanwhile ends recvmmsg(2) early.
            seen_ns = batch.events[-1][2] if batch.events else self._drained_ns
            found = recovery.go_on(seen_ns, RESYNC_BUDGET_S)
            for begin in range(0, len(found), MOST_RECOVERED):
                self._evaluate(found[begin : begin + MOST_RECOVERED])
            self.source.blank_slots(self.tracker.deaths.take_needed())  # as after a tick
        events_wait = batch.more or (len(batch.events) > LEAST_EVENTS and self.flood.active)
        self._delivery.catch_up(0.0 if events_wait else TURN_S)
        if self.deferred and not events_wait:
            self._report_deferred(TURN_S)
        if self.source.rejects.total() != self._rejects_reported:
            self._report_rejects()
        return Turn(len(batch.events) + len(batch.records), batch.more or self.source.looked_ahead)

    def _fit_batches(self, events: int, took_s: float) -> None:
        """Keep batches so small that one takes TURN_S at most: matches cost ten times what other events cost.

        This is without the wait for the commit, which the matches of a batch share.
        """
        if took_s > TURN_S:
            self._most = max(LEAST_EVENTS, min(self._most, events) // 2)
        elif took_s < TURN_S / 4 and self._most < EVENT_SLOTS:
            self._most = min(EVENT_SLOTS, 2 * self._most)

    def _handle(self, batch: Batch) -> None:
        tracker = self.tracker
        self.recovery.note(batch)
        if not batch.more:
            tracker.deaths.caught_up()
        if self._files is not None and batch.records and self._files.refresh():
            self.crowd.forget()
            batch.records.keep_shed(self.source.decode)
        if batch.events:
            first, last = batch.events[0], batch.events[-1]
            count = MANY if batch.more else len(batch.events)
            self.flood.note_batch(first[2] / 1e9, last[2] / 1e9, self._drained_ns / 1e9, count)
        if batch.records.shed or self.crowd.awaits:
            shed = self.crowd.settle(batch.records, batch.events, self.source.decode, self.counts, time.time_ns())
            tracker.deaths.pass_over(shed, COUNTED)
            for pid in shed:
                self.recovery.release(pid)
        records, passed = batch.records.records, batch.records.passed
        self._evaluate(tracker.take(batch.events, records, self._drained_ns, passed, self.source.look_ahead))
        self._evaluate(self.recovery.lost())
        self.source.blank_slots(tracker.deaths.take_needed())
        if self._files is not None and not batch.more and (batch.records or self._files.holds_former):
            self._files.let_go()

    def _evaluate(self, occurrences: Iterable[Occurrence]) -> None:
        """Match the rules. Every match is delivered, and its job durable, before this returns."""
        matches: list[RecordedMatch] = []
        parents = self._parents()
        for occurrence in occurrences:
            self.counts.occurrences += 1
            self.counts.kinds[occurrence.kind] += 1
            if occurrence.kind == "exit" and not occurrence.of_thread:
                self.recovery.release(occurrence.process.tgid)
            if occurrence.process.comm is None and not occurrence.of_thread:
                self._note_nameless(occurrence)
            try:
                if self.matcher.asks_for_oom and occurrence.kind == "exit":
                    self.kernel_log.explain(occurrence, self._drained_ns)
                found = self.matcher.match(occurrence)
                if self.crowd.is_looking and occurrence.usage is not None:
                    self.crowd.learn(occurrence, found)
                if self.matcher.undecided:
                    self._unknown.report_undecided(self.matcher.undecided, occurrence)
                    self.matcher.undecided.clear()
                if found:
                    found = self._counted(found, occurrence)
                if found:
                    matches += self._recorded(found, parents, self._unique())
            except Exception:
                self.failures.note("evaluate", occurrence)
        if matches:
            self._delivery.deliver(matches)

    def _recorded(
        self, found: list[Match], parents: dict[int, Process | None], unique: str, deferred: bool = False
    ) -> list[RecordedMatch]:
        """Return the matches of an occurrence with their records, after its attributes are completed."""
        occurrence = found[0].occurrence
        at_s = _seconds(occurrence)
        complete(occurrence, self._procfs, parents)
        if occurrence.kind == "exit" and not self.matcher.asks_for_oom:
            self.kernel_log.explain(occurrence, self._drained_ns)
        self._unknown.report_incomplete(found, occurrence)
        provenance = occurrence.process.provenance() if self.logs_provenance else None
        records = [match_record(match, self._procfs.user_name, self._machine, unique) for match in found]
        return [
            RecordedMatch(m, record, provenance, deferred, m.runs_hook and not self.flood.admits_job(m.rule.name, at_s))
            for m, record in zip(found, records, strict=True)
        ]

    def _report_deferred(self, budget_s: float) -> None:
        """Report matches of a flood that were deferred, for so long. They run no hook, so nothing must be durable."""
        deadline_s = self._clock() + budget_s
        while self.deferred and self._log_queued() < MOST_QUEUED and self._clock() < deadline_s:
            matches: list[RecordedMatch] = []
            parents = self._parents()
            for one in [self.deferred.take() for _ in range(min(AT_ONCE, len(self.deferred)))]:
                try:
                    match, unique = self._made(one) if isinstance(one, Later) else one
                    matches += self._recorded([match], parents, unique, deferred=True)
                except Exception:
                    self.failures.note("evaluate", one.exit if isinstance(one, Later) else one[0].occurrence)
            self._delivery.deliver(matches)

    def _made(self, later: Later) -> tuple[Match, str]:
        """Return the match of a process that was only looked at."""
        occurrence = ended(later.exit, later.record, self._files)
        return Match(later.rule, occurrence, later.event), self._unique()

    def _unique(self) -> str:
        """Return what tells the matches of this occurrence from all others, if their time is unknown."""
        return f"{self._life} {self.counts.matches}"

    def _parents(self) -> dict[int, Process | None]:
        """Return the parents that were read for this batch; in a flood, for PARENTS_S: no PID comes again so soon."""
        now_s = self._clock()
        if not self.flood.active or now_s >= self._parents_until_s:
            self._known_parents, self._parents_until_s = {}, now_s + PARENTS_S
        return self._known_parents

    def _counted(self, found: list[Match], occurrence: Occurrence) -> list[Match]:
        """Count matches, and return those that are to be reported."""
        now_ns = time.time_ns()
        self.counts.matches += len(found)
        for match in found:
            self.counts.rules[match.rule.name] += 1
            self.counts.rule_last_ns[match.rule.name] = now_ns
        return [one for one in found if self.crowd.is_reported(one, self._unique())] if self.flood.active else found

    def _note_nameless(self, occurrence: Occurrence) -> None:
        if occurrence.kind in self.matcher.asks_for_comm and not occurrence.from_hook:
            self._unknown.report_nameless(occurrence)

    # Around it.

    def start(self, former: HandedOn, take_over: Callable[[list[Process]], None], reads_cgroups: bool = False) -> None:
        """Scan /proc, then read what came meanwhile. Call it after LISTEN was acknowledged. The scan makes no match.

        `former`: what the daemon before knew, if the events since then are queued. `take_over` gets every process
        before an event is read, each with its cgroup if `reads_cgroups`.
        """
        self.source.pass_over(self.tracker.unasked.asks_for)
        wanted, began_ns = self.tracker.tracking.wanted_anew, time.monotonic_ns()
        snapshot = self._scan(replace(wanted, cgroup=True) if reads_cgroups else wanted)
        take_over(snapshot)
        if not wanted.cgroup:  # it would not be kept up to date
            for process in snapshot:
                process.cgroup, process.cgroup_source = None, "unknown"
        self.tracker.deaths.adopt(former.leaders)
        if self.tracker.tracking.table:
            self.tracker.adopt(self.tracker.table.take_over(former.processes, former.at_ns, snapshot))
        self.recovery.hold(snapshot, self.matcher)
        self.drain()
        living = {process.tgid for process in snapshot}
        if former.processes and self.tracker.table.unseen(living, began_ns):
            self.recovery.begin()  # some ended without an event

    def drain(self, budget_s: float = DRAIN_S) -> bool:
        """Turn until the queue is empty, or for so long. Return whether it may hold more."""
        deadline_s = self._clock() + budget_s
        while self.turn().more:
            if self._clock() >= deadline_s:
                return True
        return False

    def prepare(self, both: Matcher, plan: Plan, other: Matcher) -> Rescan:
        """Serve other rules as well as those in force, which go on matching. The kernel has been asked for `plan`.

        When the rescan is done, as much is known of the running processes as after a start with the other rules.
        """
        self._use_plan(both, plan)
        hold = partial(self.recovery.hold, matcher=both, successor=other)
        return Rescan(self._procfs, self.tracker, self._files, hold, self._clock)

    def use(self, matcher: Matcher, plan: Plan) -> None:
        """Use other rules from the next batch on.

        Call `prepare` first, drain, so that the queued events are evaluated by the rules they happened under, and ask
        the kernel for the new plan. So no event is lost or matched twice.
        """
        self.matcher = matcher
        self.crowd.use(matcher)
        self._use_plan(matcher, plan)
        self.recovery.let_go(matcher)

    def _use_plan(self, matcher: Matcher, plan: Plan) -> None:
        self.tracker.use(plan.tracking, matcher.cares)
        self.source.pass_over(self.tracker.unasked.asks_for)

    def _scan(self, wanted: Wanted) -> list[Process]:
        """Read every process. If rules name programs, find out which of them run files that were replaced since."""
        if self._files is None or not self._files.named_paths:
            return list(self._procfs.scan(wanted))
        snapshot = list(self._procfs.scan(replace(wanted, exe=True)))
        for process in snapshot:
            self._files.learn(process)
        return snapshot

    def tick(self) -> None:
        """Do the housekeeping, about once a second while there is something to do."""
        if self._files is not None:
            self._files.tick()
            self.crowd.forget()
        self.kernel_log.tick(self._procfs.is_alive)
        self._evaluate(self.tracker.sweep(time.monotonic_ns()))
        self.recovery.report_silent()
        wanted, newcomers = self.tracker.tracking.wanted, self.tracker.newcomers
        self._second_look.look(newcomers, wanted, lambda one: self.matcher.cares("exit", False, one.comm))
        known = [self.tracker.table.get(tgid) for tgid in newcomers]
        self.tracker.newcomers.clear()
        self.recovery.hold((process for process in known if process and process.ended_ns is None), self.matcher)
        if self.recovery.check_losses():
            self.recovery.begin()
        self.crowd.expire(time.monotonic())
        self.flood.report(self._log)
        self._throttled.flush_due(self._clock())
        self.failures.flush_due()

    def finish(self) -> int:
        """Evaluate the exits whose event has not come, because no later daemon will read it, for FINISH_S.

        Return how many are left.
        """
        deadline_s = self._clock() + FINISH_S
        left = self.tracker.without_event(self.tracker.deaths.waiting())
        while left and self._clock() < deadline_s:
            self._evaluate(left[:MOST_RECOVERED])
            left = left[MOST_RECOVERED:]
        return len(left)

    @property
    def again_s(self) -> float | None:
        """After how long to turn although no event comes, or None."""
        deaths = self.tracker.deaths
        if deaths.has_held or deaths.has_lost or self.recovery.active:
            return HOLD_NS / 1e9
        if self.deferred and self._log_queued() < MOST_QUEUED:
            return HOLD_NS / 1e9
        return self._delivery.again_s or (SLOW_LOG_S if self.deferred else None)

    @property
    def has_pending_counts(self) -> bool:
        """Whether a rate-limited record waits for its interval to pass, or a match to be reported."""
        counts = self._throttled.pending or self.failures.pending
        return counts or bool(self.crowd.waiting) or self._delivery.again_s is not None

    def flush_log(self) -> None:
        """Report what a flood has deferred, for FINISH_S, and log the counts of the rate-limited records now."""
        self._delivery.catch_up(FINISH_S)
        self._report_deferred(FINISH_S)
        self.crowd.expire(math.inf)
        while self.deferred:
            one = self.deferred.take()
            self.flood.count((one.rule if isinstance(one, Later) else one[0].rule).name)
        self.flood.report(self._log)
        self._throttled.flush(self._clock())
        self.failures.flush()

    # Reports.

    def _report_rejects(self) -> None:
        """Count and log datagrams that the kernel did not send."""
        rejects = self.source.rejects
        count, self._rejects_reported = rejects.total() - self._rejects_reported, rejects.total()
        self._throttled.add(
            "warning",
            "spoofed",
            self._clock(),
            {"count": count},
            "dropped datagrams that are not proc connector events of the kernel",
            foreign_sender=rejects.foreign_sender,
            wrong_length=rejects.wrong_length,
            truncated=rejects.truncated,
            wrong_id=rejects.wrong_id,
            unknown_event=rejects.unknown_event,
        )


def _seconds(occurrence: Occurrence) -> float | None:
    """Return the kernel's time of an occurrence, or None if it was lost."""
    return None if occurrence.kernel_time_ns is None else occurrence.kernel_time_ns / 1e9
