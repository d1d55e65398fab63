"""What follows an attempt: the next state of its job, the log record, and the pause before another attempt."""

from __future__ import annotations

from collections.abc import Callable

from cnprocd.json_value import JsonValue
from cnprocd.launch.request import AttemptResult
from cnprocd.log import Level, Log
from cnprocd.rules.ruleset import Hook
from cnprocd.spool.choosing import Chooser
from cnprocd.spool.job import NS, Job, Next, State, after_attempt
from cnprocd.spool.pauses import Interruptions, Postponements
from cnprocd.spool.promises import Promises
from cnprocd.spool.running import Totals, record_of_attempt, record_of_death
from cnprocd.spool.spool import Spool


class Outcomes:
    """Stores and logs how attempts ended."""

    def __init__(
        self, spool: Spool, chooser: Chooser, promises: Promises, totals: Totals, log: Log, chance: Callable[[], float]
    ) -> None:
        self._spool = spool
        self._chooser = chooser
        self._promises = promises
        self._totals = totals
        self._log = log
        self._chance = chance
        self._interruptions = Interruptions()
        self._postponements = Postponements()

    def note_launch(self, rule: str) -> None:
        """Note that a hook of a rule could be started."""
        self._postponements.forget(rule)

    def apply(self, job: Job, hook: Hook, result: AttemptResult, *, hook_pid: int | None, final: bool = False) -> None:
        """Store and log the result of an attempt, and the state that follows. A `final` failure ends the job."""
        self._interruptions.forget(job.job_id)
        following = after_attempt(hook, job, result, self._spool.clock(), self._chance())
        following = Next(State.DEAD, reason=result.reason) if final else following
        match following.state:
            case State.DONE:
                self._totals.succeeded += 1
                self._spool.finish(job.job_id, result)
                self._record("info", "hook_finished", job, hook_pid, result)
            case State.WAITING:
                self._totals.failed += 1
                self._spool.retry(job.job_id, result, following.due_ns, following.spent_ns)
                pause_s = round((following.due_ns - self._spool.clock()) / NS, 3)
                self._record("warning", "hook_failed", job, hook_pid, result, will_retry=True, retry_in_s=pause_s)
            case _:
                self._totals.failed += 1
                self._record("warning", "hook_failed", job, hook_pid, result, will_retry=False)
                self.bury(job, result, following.reason or "gave up")

    def interrupt(self, job: Job, hook_pid: int, result: AttemptResult) -> None:
        """Let the job wait again, or give it up: see Interruptions."""
        self._totals.interrupted += 1
        reason = self._interruptions.note(job.job_id, self._totals.succeeded + self._totals.failed)
        self._record("warning", "hook_failed", job, hook_pid, result, will_retry=reason is None)
        if reason is None:
            pause_s = self._interruptions.pause_s(job.job_id, self._chance())
            self._spool.interrupt(job.job_id, pause_s)
            self._chooser.hold(job, self._spool.clock() + int(pause_s * NS))
        else:
            self.bury(job, result, reason)

    def bury(self, job: Job, result: AttemptResult, reason: str) -> None:
        self._totals.dead += 1
        self._spool.bury(job.job_id, result, reason)
        promise = self._promises.of(job)
        on_failure = promise.hook.on_failure if promise is not None else None
        level: Level = "error" if on_failure is None else on_failure.level
        self._log(level, "job_dead", **record_of_death(job, reason, on_failure))

    def postpone(self, job: Job, reason: str, *, alone: bool = False) -> None:
        """Let the job wait: a process, a descriptor, memory or the runner was missing. The hook is not at fault."""
        self._totals.postponed += 1
        now_ns = self._spool.clock()
        due_ns, of_rule = self._postponements.note(job.rule, job.job_id, now_ns, alone=alone)
        self._chooser.hold(job, due_ns, whole_rule=of_rule)
        self._spool.postpone(job.job_id, due_ns)
        pause_s = round((due_ns - now_ns) / NS, 3)
        self._record("warning", "hook_failed", job, None, AttemptResult(reason), will_retry=True, retry_in_s=pause_s)

    def _record(
        self, level: Level, event: str, job: Job, hook_pid: int | None, result: AttemptResult, **more: JsonValue
    ) -> None:
        self._log(level, event, **record_of_attempt(job, hook_pid, result), **more)
