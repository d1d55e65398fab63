"""What is done about matches: throttle, spool, log; in this order, once per batch. And the runner behind the spool.

The jobs of a batch are committed before any of its records is written, so a record that names a job never lies, and a
crash between the two costs a log line, not a cleanup.

A job's key says for ever which death of which process under which rule it is, so a job is never made twice, whatever is
seen twice: boot id, PID, the kernel's time of the event, and the rule.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from cnprocd.escape import printable
from cnprocd.log import Log
from cnprocd.output.record import Record, message
from cnprocd.pipeline import RecordedMatch
from cnprocd.rules.compile import Match
from cnprocd.rules.problems import LoadedRules
from cnprocd.rules.ruleset import Rule, Settings
from cnprocd.runner.client import Remote
from cnprocd.spool.job import Backoff, Gather, HookSpec, JobRequest, Limits, serialize_key
from cnprocd.spool.scheduler import Runner
from cnprocd.spool.spool import Keep, Spool
from cnprocd.spool.store import Match as PastMatch
from cnprocd.spool.throttle import After, RateLimit, Throttle


class HookRegistry(Protocol):
    """Where hooks are announced, so that nothing that a hook starts triggers a rule."""

    def follow(self) -> None:
        """Ask the kernel for every fork from now on: a hook is about to start."""

    def register_hook(self, hook_pid: int) -> None:
        """Take this process for a hook. It has not done anything yet."""

    def register_runner(self, runner_pid: int) -> None:
        """Take this process for the runner service: whatever it forks from now on is a hook."""


class Actions:
    """The pipeline's way out."""

    def __init__(
        self, state_dir: Path, loaded: LoadedRules, log: Log, hooks: HookRegistry, runner: Path | None = None
    ) -> None:
        self._log = log
        self._past: list[PastMatch] = []
        self._throttles: dict[str, Throttle] = {}
        self._limits: dict[str, object] = {}
        self._use_throttles(loaded.rules)
        self.spool = Spool.open(state_dir, log=log, keep=keep_of(loaded.settings))
        self.runner = Runner(
            self.spool,
            hook_specs(loaded.rules),
            slots=loaded.settings.hook_slots,
            log=log,
            before_start=hooks.follow,
            on_started=lambda hook_pid, job_id: hooks.register_hook(hook_pid),
            launcher=None if runner is None else Remote(runner, log, hooks.register_runner),
        )

    def deliver(self, matches: list[RecordedMatch]) -> None:
        """Hold back what the throttles hold back, make every hook of the rest durable, then say the matches."""
        matches = [recorded for recorded in matches if self._admits(recorded)]
        hooked = [recorded for recorded in matches if wants_hook(recorded.match)]
        if hooked:
            self._submit(hooked)
        for recorded in matches:
            self._say(recorded)
        self._past += [past_match(recorded.record) for recorded in matches]
        if hooked:
            self.runner.wake()

    def _admits(self, recorded: RecordedMatch) -> bool:
        throttle = self._throttles.get(recorded.match.rule.name)
        held_by = None if throttle is None else throttle.admit(recorded.record, time.monotonic_ns())
        if held_by is not None:
            recorded.record["held_by"] = held_by  # whoever watches sees this record; nobody else does
        return held_by is None

    def start(self) -> None:
        """Take up what the last run left, then run hooks. Needs a running event loop."""
        self.runner.start()

    async def stop(self, bound_s: float) -> None:
        """Let running hooks finish within the bound; what is not done waits in the spool."""
        await self.runner.stop(bound_s)
        self._remember()
        self.spool.close()

    @property
    def busy(self) -> bool:
        """A hook runs or may start any moment."""
        return bool(self.runner.running())

    @property
    def holds_back(self) -> bool:
        """A throttle has something to tell when its window closes."""
        return any(throttle.next_report_ns() is not None for throttle in self._throttles.values())

    def tick(self) -> None:
        """Housekeeping, about once a second while there is something to do."""
        self._tell_held_back()
        self._remember()
        self.spool.settle()

    def _tell_held_back(self) -> None:
        now_ns = time.monotonic_ns()
        for held in [held for throttle in self._throttles.values() for held in throttle.reports(now_ns)]:
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

    def _remember(self) -> None:
        """Past matches are for people to look at: they go to the disk in one commit, off the hot line."""
        past, self._past = self._past, []
        if past:
            self.spool.record_matches(past)

    def status_phrase(self) -> str:
        """For the status line: what waits, what runs, and whether it would survive us."""
        counts = self.spool.counts()
        phrase = f"{counts.waiting} jobs waiting, {counts.running} running, {counts.dead} dead"
        return phrase if counts.durable else f"{phrase}, NOT DURABLE ({counts.why})"

    def use(self, loaded: LoadedRules) -> None:
        """New rules, from now on."""
        self.spool.keep = keep_of(loaded.settings)
        self._use_throttles(loaded.rules)
        self.runner.reload(hook_specs(loaded.rules), loaded.settings.hook_slots)

    def _use_throttles(self, rules: Iterable[Rule]) -> None:
        """A rule whose limits did not change keeps its budget over a reload."""
        former = self._throttles
        self._throttles = {}
        for rule in rules:
            limits = (rule.rate_limit, rule.cooldown_s, rule.after, rule.resets_s)
            if limits != (None, None, None, None):
                kept = former.get(rule.name) if self._limits.get(rule.name) == limits else None
                self._throttles[rule.name] = kept or throttle_of(rule)
            self._limits[rule.name] = limits

    def _submit(self, hooked: Sequence[RecordedMatch]) -> None:
        requests = [self._request(recorded) for recorded in hooked]
        for recorded, job_id in zip(hooked, self.spool.enqueue(requests).job_ids, strict=True):
            recorded.record["job_id"] = job_id

    def _request(self, recorded: RecordedMatch) -> JobRequest:
        rule, record = recorded.match.rule.rule, recorded.record
        assert rule.run is not None
        comm = record["comm"]
        return JobRequest(
            key=job_key(self.spool.boot_id, recorded.match),
            rule=rule.name,
            event=record,
            serialize_key=serialize_key(rule.run.serialize, rule.name, comm if isinstance(comm, str) else None),
            kernel_time_ns=recorded.match.occurrence.kernel_time_ns,
            gather=Gather(rule.name, rule.coalesce.window_s, rule.coalesce.max) if rule.coalesce is not None else None,
        )

    def _say(self, recorded: RecordedMatch) -> None:
        wanted = recorded.match.rule.rule.log
        if wanted is not None:
            self._log(wanted.level, "rule_matched", message=message(wanted.message, recorded.record), **recorded.record)
            if recorded.provenance is not None:
                record = recorded.record
                self._log("debug", "identity_sources", rule=record["rule"], pid=record["pid"], **recorded.provenance)


def wants_hook(match: Match) -> bool:
    """Whether this match is to run a hook: not where the rule only wants to hear of an unknown exit."""
    return match.rule.rule.run is not None and not match.log_only


def job_key(boot_id: str, match: Match) -> str:
    """What makes a job the same job: this thing, that happened to this process, under this rule."""
    occurrence, process = match.occurrence, match.occurrence.process
    thread = f"/{occurrence.tid}" if occurrence.of_thread else ""
    # The moment is the kernel's, so it is the same for whoever sees the event again. A start may be known from the
    # fork to one daemon and from the exit record to the next: it serves where no event was seen.
    moment = occurrence.kernel_time_ns if occurrence.kernel_time_ns is not None else f"started {process.start_ns}"
    return ":".join((boot_id, f"{process.tgid}{thread}", str(moment), match.event, match.rule.name))


def past_match(record: Record) -> PastMatch:
    """A match for the history."""
    comm, pid = record["comm"], record["pid"]
    return PastMatch(
        time_ns=time.time_ns(),
        rule=str(record["rule"]),
        comm=comm if isinstance(comm, str) else None,
        pid=pid if isinstance(pid, int) else None,
        record=record,
    )


def throttle_of(rule: Rule) -> Throttle:
    """`rate_limit`, `cooldown`, `after` and `resets` of a rule."""
    limit, after = rule.rate_limit, rule.after
    return Throttle(
        rule.name,
        rate_limit=RateLimit(limit.count, limit.per_s, limit.by) if limit is not None else None,
        cooldown_s=rule.cooldown_s,
        after=After(after.count, after.within_s, rule.resets_s) if after is not None else None,
    )


def keep_of(settings: Settings) -> Keep:
    """The spool's bounds."""
    return Keep(settings.queue_limit, settings.history_count, settings.history_age_s)


def hook_specs(rules: Iterable[Rule]) -> Mapping[str, HookSpec]:
    """The hooks of all rules that have one, by rule; disabled ones too, whose jobs may still be waiting."""
    return {rule.name: hook_spec(rule) for rule in rules if rule.run is not None}


def hook_spec(rule: Rule) -> HookSpec:
    """`run:` of a rule as the hooks' room understands it."""
    run = rule.run
    assert run is not None
    limits = run.limits
    return HookSpec(
        rule=rule.name,
        command=run.command,
        user=run.user,
        group=run.group,
        timeout_s=run.timeout_s,
        deadline_s=run.deadline_s,
        retries=run.retries,
        backoff=Backoff(run.backoff.initial_s, run.backoff.max_s),
        env=run.env,
        working_directory=run.working_directory,
        umask=run.umask,
        nice=run.nice,
        limits=Limits(**asdict(limits)) if limits is not None else Limits(),
        slots=run.slots,
        serialize=run.serialize,
        output_limit_bytes=run.output_limit_bytes,
        failure_level=run.on_failure.level if run.on_failure is not None else "error",
        failure_message=run.on_failure.message if run.on_failure is not None else None,
    )
