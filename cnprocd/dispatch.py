"""Dispatch the matches of a batch: throttle, spool, log, in this order. Owns the spool and the scheduler.

The jobs of a batch are committed before its records are written, so a record never names a job that does not exist. A
crash between the two loses a log record, not a cleanup.

A job's key is the id of its match (output/match_id.py), so an event that is seen twice makes one job.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from cnprocd.delivery import Fate, RecordedMatch
from cnprocd.escape import printable
from cnprocd.failures import Failures
from cnprocd.json_value import JsonDict, JsonObject, get_str
from cnprocd.launch.attempt import Launcher
from cnprocd.launch.user import ResolveUser, resolve_user
from cnprocd.log import Log, MatchLog, match_log
from cnprocd.output.record import early_fields, message
from cnprocd.postponing import Postponing
from cnprocd.rules.compile import Match
from cnprocd.rules.problems import LoadedRules
from cnprocd.rules.ruleset import ByField, Rule, Settings, hooks_of
from cnprocd.spool.backlog import Backlog
from cnprocd.spool.disk import Disk
from cnprocd.spool.job import Gather, JobRequest, serialize_key
from cnprocd.spool.promises import MOST_SNAPSHOTS
from cnprocd.spool.rows import Enqueued, Keep, PastMatch
from cnprocd.spool.scheduler import Scheduler
from cnprocd.spool.spool import Spool
from cnprocd.spool.throttle import Discarded, HeldBack, Throttle, key_of
from cnprocd.spool.turns import guaranteed_slots
from cnprocd.stalls import Stalls

FULL_S = 0.1  # for which a rule whose jobs were dropped gets no further ones, in a flood
MOST_PAST = 1000  # matches between two ticks that are kept for the history
LEAST_PAST = 100  # of these for each rule, beyond MOST_PAST: the flood of one user hides no other match


class HookRegistry(Protocol):
    """Where hooks are announced, so that nothing that a hook starts triggers a rule."""

    def follow(self) -> None:
        """Ask the kernel for every fork from now on: a hook is about to start."""

    def register_hook(self, hook_pid: int) -> None:
        """Treat this process and its descendants as hooks. It has not done anything yet."""

    def register_runner(self, runner_pid: int) -> None:
        """Treat every process that the runner forks from now on as a hook."""


class Dispatcher:
    """Receives the pipeline's matches. Without a `launcher`, hooks are children of this process."""

    def __init__(
        self,
        state_dir: Path,
        loaded: LoadedRules,
        log: Log,
        hooks: HookRegistry,
        launcher: Launcher | None = None,
        resolve_user: ResolveUser = resolve_user,
        disk: Disk | None = None,
        failures: Failures | None = None,
        stalls: Stalls | None = None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
        runtime_dir: Path | None = None,
        log_match: MatchLog | None = None,
    ) -> None:
        """`together`: a context in which log records are written together, at its end. `log_match`: None: as `log`.

        `runtime_dir`: where the backlog is; None: every job is made at once.
        """
        self._together = together
        self._log = log
        self._match_log = match_log(log) if log_match is None else log_match
        self._failures = failures or Failures(log, time.monotonic)
        self.not_remembered = 0  # matches that are not in the history, because there were too many
        self._past: list[PastMatch] = []
        self._past_of: Counter[str] = Counter()  # the same, by rule
        self._throttles: dict[str, Throttle] = {}
        self._throttled_by: dict[str, frozenset[ByField]] = {}  # the fields that a rule's throttle needs
        self._passed: dict[int, Match] = {}  # by id(): matches that a throttle has let pass already
        self._full_until_s: dict[str, float] = {}  # by rule
        self._dropped: Counter[str] = Counter()  # jobs that were not added since the last tick, by rule
        self._limits: dict[str, object] = {}
        self._use_throttles(loaded.rules)
        self.spool = Spool.open(state_dir, log=log, keep=keep_of(loaded.settings), disk=disk)
        backlog = Backlog(None if runtime_dir is None else runtime_dir / "backlog", self.spool.boot_id)
        self.postponing = Postponing(
            backlog, self.spool, log, self._failures, together, self._request, self._commit, self._made
        )
        self.scheduler = Scheduler(
            self.spool,
            hooks_of(loaded.rules),
            slots=loaded.settings.hook_slots,
            log=log,
            before_start=hooks.follow,
            on_started=lambda hook_pid, job_id: hooks.register_hook(hook_pid),
            launcher=launcher,
            resolve_user=resolve_user,
            snapshot=loaded.snapshot,
            guaranteed=guaranteed_slots(loaded.rules, loaded.settings.hook_slots),
            stalls=stalls,
        )

    @property
    def again_s(self) -> float | None:
        """After how long to call `catch_up`, because jobs are still to be made of matches; None: of none."""
        return self.postponing.again_s

    def catch_up(self, budget_s: float) -> None:
        """Make jobs of them for so long. With 0 make a few, in a share of the time."""
        self.postponing.catch_up(budget_s)

    def decide(self, match: Match) -> Fate:
        """Decide about a match of a flood before its record is made: to make it costs more than all else."""
        name = match.rule.name
        throttle = self._throttles.get(name)
        if throttle is not None:
            fields = early_fields(match.occurrence.process)
            if any(fields.get(by) is None for by in self._throttled_by[name]):
                return Fate.OPEN
            if self._held_by(throttle, match, fields, match.occurrence) is not None:
                return Fate.HELD
            self._passed[id(match)] = match
        if match.runs_hook and not self.room(name):
            self.note_dropped(name, 1)
            return Fate.DROPPED
        return Fate.PASSES

    def holds(self, rule: str, fields: JsonObject, at_ns: int) -> bool:
        return self._throttles[rule].holds(fields, at_ns) if rule in self._throttles else False

    def is_below(self, rule: str, fields: JsonObject, more: int) -> bool:
        return rule in self._throttles and self._throttles[rule].is_below(fields, more)

    def hold(self, rule: str, fields: JsonObject, at_ns: int, count: int) -> None:
        self._throttles[rule].hold(fields, at_ns, count)

    def room(self, rule: str) -> int:
        if rule in self._full_until_s:
            if time.monotonic() < self._full_until_s[rule]:
                return 0
            del self._full_until_s[rule]
        return self.postponing.room(rule)

    def note_dropped(self, rule: str, count: int) -> None:
        self._dropped[rule] += count

    def deliver(self, matches: list[RecordedMatch]) -> None:
        """Hold back matches that the throttles refuse, commit the jobs of the others, then log those."""
        if self._throttles:
            matches = [recorded for recorded in matches if self._admits(recorded)]
            self._passed.clear()
        matches = self.postponing.postpone(matches)
        hooked = [recorded for recorded in matches if recorded.match.runs_hook]
        if hooked:
            self._submit(hooked)
        texts: list[str | None] = []
        with self._together():
            for recorded in matches:
                text = None
                try:
                    text = self._log_match(recorded)
                except Exception:
                    self._failures.note("log", recorded.record, recorded.match.rule.name)
                texts.append(text)
        self._remember([recorded.record for recorded in matches], texts)
        if hooked:
            self.scheduler.wake()

    def _made(self, records: Sequence[JsonObject]) -> None:
        """Go on with matches whose jobs were made late."""
        self._remember(records, [None] * len(records))
        self.scheduler.wake()

    def _remember(self, records: Sequence[JsonObject], texts: Sequence[str | None]) -> None:
        """Keep matches for the history, as far as there is room. `texts`: those that are JSON already."""
        for record, text in zip(records, texts, strict=True):
            rule = str(record["rule"])
            if len(self._past) < MOST_PAST or self._past_of[rule] < LEAST_PAST:
                self._past_of[rule] += 1
                self._past.append(past_match(record, text))
            else:
                self.not_remembered += 1

    def _admits(self, recorded: RecordedMatch) -> bool:
        if recorded.deferred or id(recorded.match) in self._passed:
            return True
        throttle = self._throttles.get(recorded.match.rule.name)
        held_by = (
            None if throttle is None else self._held_by(throttle, recorded.match, recorded.record, recorded.record)
        )
        if held_by is not None:
            recorded.record["held_by"] = held_by  # shown by `cnprocctl watch` only
        return held_by is None

    def _held_by(self, throttle: Throttle, match: Match, record: JsonDict, subject: object) -> str | None:
        try:
            return throttle.admit(record, _time_ns(match))
        except Exception:  # without its throttle, the match still has its job
            self._failures.note("dispatch", subject, match.rule.name)
            return None

    def start(self) -> None:
        """Recover the jobs of the last run, then run hooks. Needs a running event loop."""
        self.scheduler.start()

    async def stop(self, bound_s: float) -> None:
        """Let running hooks finish within the bound. The jobs of the others wait in the spool."""
        self.postponing.stop()
        await self.scheduler.stop(bound_s)
        self.store_past_matches()
        self._note_dropped()
        for throttle in self._throttles.values():
            self._log_held(throttle.take_open())
        self.spool.close()

    @property
    def busy(self) -> bool:
        """Whether a hook is running."""
        return bool(self.scheduler.running())

    @property
    def holds_back(self) -> bool:
        """Whether a throttle has held back matches that are not logged yet."""
        return any(throttle.next_report_ns() is not None for throttle in self._throttles.values())

    def tick(self) -> None:
        """Housekeeping, about once a second while there is something to do."""
        self._log_held_back()
        self.store_past_matches()
        self._note_dropped()
        self.postponing.tick()
        self.spool.sync()

    def _note_dropped(self) -> None:
        dropped, self._dropped = self._dropped, Counter()
        self.spool.note_dropped(dropped)

    def _log_held_back(self) -> None:
        now_ns = time.monotonic_ns()
        self._log_held([held for throttle in self._throttles.values() for held in throttle.reports(now_ns)])
        self._log_discarded([lost for throttle in self._throttles.values() for lost in throttle.discarded(now_ns)])

    def _log_held(self, reports: Iterable[HeldBack]) -> None:
        for held in reports:
            key = printable(held.key)
            self._log(
                "warning",
                "throttled",
                rule=held.rule,
                held_by=held.held_by,
                by=held.by,
                key=key,
                count=held.count,
                window_s=held.window_s,
                message=f"{held.rule}: {held.count} matches held back by {held.held_by} {key}".rstrip(),
            )

    def _log_discarded(self, discarded: Iterable[Discarded]) -> None:
        for lost in discarded:
            self._log(
                "warning",
                "throttle_keys_discarded",
                rule=lost.rule,
                held_by=lost.held_by,
                by=lost.by,
                count=lost.count,
                limit=lost.limit,
                message=f"{lost.rule}: {lost.held_by} counts by {lost.by} and has discarded {lost.count} counts:"
                f" there were more than {lost.limit} values",
            )

    def store_past_matches(self) -> None:
        """Commit the matches for `cnprocctl history`, outside of the hot path."""
        past, self._past = self._past, []
        self._past_of.clear()
        if past:
            self.spool.record_matches(past)

    def status_phrase(self) -> str:
        """Return the counts of jobs for the status line, and whether the spool is durable."""
        counts = self.spool.counts()
        phrase = f"{counts.waiting} jobs waiting, {counts.running} running, {counts.dead} dead"
        return phrase if counts.durable else f"{phrase}, NOT DURABLE ({counts.why})"

    def use(self, loaded: LoadedRules) -> None:
        """Use new rules from now on."""
        self.spool.keep = keep_of(loaded.settings)
        self._use_throttles(loaded.rules)
        slots = loaded.settings.hook_slots
        guaranteed = guaranteed_slots(loaded.rules, slots)
        self.scheduler.reload(hooks_of(loaded.rules), slots, loaded.snapshot, guaranteed=guaranteed)

    def snapshots(self) -> list[str] | None:
        """Return the digests of the rules that jobs refer to. None: that is not known yet."""
        return self.spool.snapshots(MOST_SNAPSHOTS)

    def _use_throttles(self, rules: Iterable[Rule]) -> None:
        """Make the throttles. A rule whose limits did not change keeps its budget."""
        former = self._throttles
        self._throttles = {}
        for rule in rules:
            limits = (rule.rate_limit, rule.cooldown, rule.after, rule.resets_s)
            if limits != (None, None, None, None):
                kept = former.get(rule.name) if self._limits.get(rule.name) == limits else None
                throttle = self._throttles[rule.name] = kept or throttle_of(rule)
                self._throttled_by[rule.name] = throttle.by
            self._limits[rule.name] = limits
        for name, throttle in former.items():
            if self._throttles.get(name) is not throttle:
                self._log_held(throttle.take_open())

    def _submit(self, hooked: Sequence[RecordedMatch]) -> None:
        requests: list[JobRequest] = []
        requested: list[RecordedMatch] = []
        for recorded in hooked:
            try:
                requests.append(self._request(recorded))
            except Exception:
                self._failures.note("dispatch", recorded.record, recorded.match.rule.name)
            else:
                requested.append(recorded)
        for recorded, job_id in zip(requested, self._commit(requests), strict=True):
            recorded.record["job_id"] = job_id

    def _commit(self, requests: list[JobRequest]) -> tuple[int | None, ...]:
        """Commit jobs, and return their ids; None: the key is known, or there is no room."""
        enqueued = self._enqueue(requests)
        if enqueued.shed_by_rule:
            full_until_s = time.monotonic() + FULL_S
            self._full_until_s.update(dict.fromkeys(enqueued.shed_by_rule, full_until_s))
        return enqueued.job_ids

    def _enqueue(self, requests: list[JobRequest]) -> Enqueued:
        """Commit the jobs of a batch together; if that raises, each alone, so that one match costs no other its job."""
        try:
            return self.scheduler.enqueue(requests)
        except Exception:
            if len(requests) == 1:
                self._failures.note("dispatch", requests[0].event, requests[0].rule)
                return Enqueued((None,))
        alone = [self._enqueue([request]) for request in requests]
        shed: Counter[str] = Counter()
        for one in alone:
            shed.update(one.shed_by_rule)
        return Enqueued(tuple(job_id for one in alone for job_id in one.job_ids), shed_by_rule=shed)

    def _request(self, recorded: RecordedMatch) -> JobRequest:
        rule, record = recorded.match.rule.rule, recorded.record
        assert rule.run is not None
        comm = record["comm"]
        return JobRequest(
            key=get_str(record, "match_id"),
            rule=rule.name,
            event=record,
            serialize_key=serialize_key(rule.run.serialize, rule.name, comm if isinstance(comm, str) else None),
            kernel_time_ns=recorded.match.occurrence.kernel_time_ns,
            snapshot=self.scheduler.promises.snapshot,
            gather=gather_of(rule, record),
        )

    def _log_match(self, recorded: RecordedMatch) -> str | None:
        wanted, record = recorded.match.rule.rule.log, recorded.record
        if wanted is None:
            return None
        text = self._match_log(wanted.level, message(wanted.message, record), record)
        if recorded.provenance is not None:
            self._log("debug", "identity_sources", rule=record["rule"], pid=record["pid"], **recorded.provenance)
        return text


def _time_ns(match: Match) -> int:
    """Return the time of a match (CLOCK_MONOTONIC). A recovered one has none: then it is now."""
    at_ns = match.occurrence.kernel_time_ns
    return time.monotonic_ns() if at_ns is None else at_ns


def gather_of(rule: Rule, record: JsonObject) -> Gather | None:
    """Return how `coalesce` gathers this match with others, or None if it has a job of its own."""
    key = key_of(rule.coalesce.by, record) if rule.coalesce is not None else None
    if rule.coalesce is None or key is None:
        return None
    # A rule name contains no "/", so a value cannot make one rule's key equal to another's.
    name = rule.name if rule.coalesce.by == "rule" else f"{rule.name}/{rule.coalesce.by}={key}"
    return Gather(name, rule.coalesce.window_s, rule.coalesce.max)


def past_match(record: JsonObject, text: str | None = None) -> PastMatch:
    """Return the history row of a match."""
    comm, pid = record["comm"], record["pid"]
    return PastMatch(
        time_ns=time.time_ns(),
        rule=str(record["rule"]),
        comm=comm if isinstance(comm, str) else None,
        pid=pid if isinstance(pid, int) else None,
        record=record,
        text=text,
    )


def throttle_of(rule: Rule) -> Throttle:
    """Return the throttle for `rate_limit`, `cooldown`, `after` and `resets` of a rule."""
    return Throttle(
        rule.name, rate_limit=rule.rate_limit, cooldown=rule.cooldown, after=rule.after, resets_s=rule.resets_s
    )


def keep_of(settings: Settings) -> Keep:
    """Return the bounds of the spool."""
    return Keep(settings.queue_limit, settings.history_count, settings.history_age_s)
