"""Slots over the spool: which job runs next, and what becomes of it.

Strategy: the spool is the queue; the runner holds nothing but what runs now. wake() starts the first job before it
returns and leaves further ones to the next turns of the loop, so a burst never keeps the loop for long. Every decision
is taken in job.py; here it is carried out, logged and written down.

Order is by age. Two things hold a job back: its rule's slots, and another job with its serialize key. What a crash or
stop left behind (the backlog: jobs older than this start) may take half of the slots at most, so that a new death never
waits behind yesterday's; with a single slot, new jobs go first.

A job that was running when the daemon was killed may still have its hook running: that one is ended first, so that
no two tries of a job ever run at once.

All that a hook starts stems from a child of this process (starter.py): for loop prevention, everything below our own
PID is a hook or becomes one. `before_start` is called before anything of a try can happen in the kernel, `on_started`
before the hook does anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cnprocd.launch import group, render
from cnprocd.launch.attempt import TERM_GRACE_S, Ending, Here, Launcher, Running, sweep_cgroups
from cnprocd.launch.identity import resolve
from cnprocd.launch.program import HookRefusedError
from cnprocd.log import Level, Log
from cnprocd.spool.job import NS, Attempt, Happening, HookSpec, Identity, Job, State, after_attempt, time_left_s
from cnprocd.spool.latency import Histogram
from cnprocd.spool.spool import Spool
from cnprocd.spool.store import Leftover

TEND_S = 1.0  # how long a commit may wait for the disk: see spool.py
DURABLE_RETRY_S = 30.0
STOP_GRACE_S = 2.0
GATHERED_NS = 50_000_000  # a job that was due so much later than it was made has waited on purpose
LONGEST_POSTPONEMENT_S = 30.0


@dataclass(frozen=True, slots=True)
class RunningHook:
    """A hook that runs now, for `status`."""

    job_id: int
    rule: str
    hook_pid: int
    attempt: int
    running_s: float


@dataclass(slots=True)
class Totals:
    """Tries since the start of the daemon, for `status` and metrics."""

    started: int = 0
    succeeded: int = 0
    failed: int = 0
    dead: int = 0
    interrupted: int = 0
    postponed: int = 0


def _nothing(*_: object) -> None:
    """The default of a callback."""


class Runner:
    """Runs the spool's jobs. Make it and call start() inside a running asyncio loop."""

    def __init__(
        self,
        spool: Spool,
        hooks: Mapping[str, HookSpec],
        *,
        slots: int,
        log: Log,
        before_start: Callable[[], None] = _nothing,
        on_started: Callable[[int, int], None] = _nothing,  # (hook pid, job id)
        on_finished: Callable[[int, int], None] = _nothing,
        cgroup_dir: Path | None = None,
        launcher: Launcher | None = None,  # None: hooks are children of this process
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.totals = Totals()
        self.latency = Histogram()
        self.slots = slots
        self._spool = spool
        self._hooks = dict(hooks)
        self._log = log
        self._before_start = before_start
        self._on_started = on_started
        self._on_finished = on_finished
        self._cgroup_dir = cgroup_dir
        self._chance = chance
        self._launcher = launcher or Here(log, cgroup_dir)
        self._tries: dict[int, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: dict[int, Job] = {}  # jobs whose former hook is still being ended
        self._identities: dict[str, Identity] = {}
        self._stuck: set[int] = set()
        self._last_old_job = 0
        self._accepting = False
        self._more = False  # when last looked, there was another job that may run
        self._postponements = 0
        self._next_due: asyncio.TimerHandle | None = None
        self._next_tend: asyncio.TimerHandle | None = None
        self._next_fill: asyncio.Handle | None = None
        self._next_durable_s = 0.0

    def start(self) -> None:
        """Recover what a crash left, then begin. Needs a running event loop."""
        self._last_old_job = self._spool.last_job_id()
        leftovers = [left for left in self._spool.recover() if left.boot_id == self._spool.boot_id]
        self._held = {left.job.job_id: left.job for left in leftovers}
        if leftovers:
            self._keep(self._end_leftovers(leftovers))
        self._accepting = True
        self._launcher.prepare()
        self.wake()

    def wake(self) -> None:
        """Jobs were enqueued, or revived: start the first that may run before this returns."""
        self._tend_soon()
        if self._next_fill is None:
            self._fill()

    def reload(self, hooks: Mapping[str, HookSpec], slots: int) -> None:
        """New rules: for every try from now on. A job whose rule is gone becomes a dead letter."""
        self._hooks = dict(hooks)
        self._identities.clear()
        self.slots = slots
        self.wake()

    def running(self) -> list[RunningHook]:
        """What runs now, oldest first."""
        return [
            RunningHook(job_id, one.job.rule, one.pid, one.job.attempts, one.running_s)
            for job_id, one in self._tries.items()
        ]

    def hook_pids(self) -> frozenset[int]:
        """The PIDs of the hooks that run now: not to be reaped by anyone else (group.reap_strangers)."""
        return frozenset(one.pid for one in self._tries.values()) | self._stuck

    async def stop(self, bound_s: float) -> None:
        """Start nothing more, let running hooks finish within the bound, end the rest; they wait in the spool."""
        self._accepting = False
        for timer in (self._next_due, self._next_tend, self._next_fill):
            if timer is not None:
                timer.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=bound_s)
        for one in self._tries.values():
            one.cut(min(STOP_GRACE_S, TERM_GRACE_S))
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._next_tend is not None:
            self._next_tend.cancel()
        self._launcher.close()
        self._spool.settle()

    # -- choosing ------------------------------------------------------------------------------------------------

    def _fill(self, in_a_row: bool = False) -> None:
        """Start the next job that may run, and come back for more."""
        self._next_fill = None
        if not self._accepting or len(self._tries) >= self.slots:
            return
        job = self._choose()
        self._more = job is not None
        if job is None:
            self._sleep_until_due()
            return
        self._begin(job)
        if in_a_row and len(self._tries) < self.slots:
            self._launcher.prepare(soon=True)  # a burst: have the next spare made meanwhile
        self._next_fill = asyncio.get_running_loop().call_soon(self._fill, True)

    def _choose(self) -> Job | None:
        busy = [one.job for one in self._tries.values()]
        held = list(self._held.values())
        per_rule = Counter(job.rule for job in (*busy, *held))
        skip_rules = [rule for rule, count in per_rule.items() if count >= self._rule_slots(rule)]
        skip_keys = [job.serialize_key for job in (*busy, *held) if job.serialize_key is not None]

        def oldest(after_id: int) -> Job | None:
            found = self._spool.due(
                1, after_id=after_id, skip_rules=skip_rules, skip_keys=skip_keys, skip_jobs=list(self._held)
            )
            return found[0] if found else None

        old = sum(job.job_id <= self._last_old_job for job in busy)
        if old >= max(1, self.slots // 2):
            return oldest(self._last_old_job)
        if self.slots == 1:
            return oldest(self._last_old_job) or oldest(0)
        return oldest(0)

    def _rule_slots(self, rule: str) -> int:
        spec = self._hooks.get(rule)
        return self.slots if spec is None or spec.slots is None else spec.slots

    def _sleep_until_due(self) -> None:
        """Nothing may run now: a retry or a gathering window may end by itself."""
        if self._next_due is not None:
            self._next_due.cancel()
            self._next_due = None
        delay_s = self._spool.next_due_in_s()
        if delay_s is not None:
            self._next_due = asyncio.get_running_loop().call_later(max(delay_s, 0.001), self.wake)

    # -- one job -------------------------------------------------------------------------------------------------

    def _begin(self, row: Job) -> None:
        """Start a job's hook, or settle its fate without."""
        spec = self._hooks.get(row.rule)
        job = replace(row, events=self._spool.events(row.job_id))
        if spec is None or not job.events:
            reason = "there is no rule of this name any more" if spec is None else "its record cannot be read"
            self._bury(row, Attempt(reason), reason)
            return
        attempt_id = os.urandom(16).hex()
        now_ns = self._spool.clock()
        self._spool.start(job.job_id, attempt_id)
        job = replace(
            job, state=State.RUNNING, attempts=job.attempts + 1, first_started_ns=job.first_started_ns or now_ns
        )
        announced: list[int] = []

        def announce(pid: int) -> None:
            announced.append(pid)
            self._on_started(pid, job.job_id)

        try:
            who = self._identity(spec)
            self._before_start()
            limit_s = max(time_left_s(spec, job, now_ns), 0.001)
            one = self._launcher.launch(job, spec, who, attempt_id, limit_s=limit_s, announce=announce)
        except HookRefusedError as error:
            self._settle(job, spec, Attempt(error.what), hook_pid=None)
        except OSError as error:
            self._postpone(job, str(error))
            for pid in announced:
                self._on_finished(pid, job.job_id)
        else:
            self.totals.started += 1
            self._tries[job.job_id] = one
            self._keep(self._attend(one))

    async def _attend(self, one: Running) -> None:
        job, spec = one.job, one.spec
        ending: Ending | None = None

        def emit(line: str) -> None:
            self._log("info", "hook_output", job_id=job.job_id, rule=job.rule, hook_pid=one.pid, line=line)

        try:
            ending = await one.attend(emit, self._launched)
        finally:
            del self._tries[job.job_id]
            self._on_finished(one.pid, job.job_id)
            if ending is None:  # a bug here, not the hook's fault: the job must not be lost with it
                self._spool.interrupt(job.job_id)
        if ending.stuck:
            self._stuck.add(one.pid)
        if ending.not_started:
            self._postpone(job, ending.attempt.reason or "not started")
        elif ending.interrupted:
            self.totals.interrupted += 1
            self._spool.interrupt(job.job_id)
            self._record("warning", "hook_failed", job, one.pid, ending.attempt, will_retry=True)
        else:
            self._settle(job, spec, ending.attempt, hook_pid=one.pid)
        self.wake()

    def _launched(self, one: Running) -> None:
        """The program runs."""
        job = one.job
        self._postponements = 0
        fresh = job.attempts == 1 and job.job_id > self._last_old_job and job.due_ns - job.created_ns < GATHERED_NS
        if one.latency_ms is not None and fresh:
            self.latency.add(one.latency_ms)
        latency_ms = one.latency_ms if job.boot_id == self._spool.boot_id else None
        self._spool.launched(job.job_id, one.pid, group.start_ticks(one.pid), latency_ms)
        self._log(
            "info",
            "hook_started",
            job_id=job.job_id,
            rule=job.rule,
            pid=job.events[0].get("pid"),
            hook_pid=one.pid,
            attempt=job.attempts,
            latency_ms=latency_ms,
        )
        self._launcher.prepare(soon=self._more)

    def _settle(self, job: Job, spec: HookSpec, attempt: Attempt, *, hook_pid: int | None) -> None:
        """Carry out what follows from a try that has ended."""
        following = after_attempt(spec, job, attempt, self._spool.clock(), self._chance())
        match following.happening:
            case Happening.SUCCEEDED:
                self.totals.succeeded += 1
                self._spool.finish(job.job_id, attempt)
                self._record("info", "hook_finished", job, hook_pid, attempt)
            case Happening.FAILED:
                self.totals.failed += 1
                self._spool.retry(job.job_id, attempt, following.due_ns)
                pause_s = round((following.due_ns - self._spool.clock()) / NS, 3)
                self._record("warning", "hook_failed", job, hook_pid, attempt, will_retry=True, retry_in_s=pause_s)
            case _:
                self.totals.failed += 1
                self._record("warning", "hook_failed", job, hook_pid, attempt, will_retry=False)
                self._bury(job, attempt, following.reason or "gave up")

    def _bury(self, job: Job, attempt: Attempt, reason: str) -> None:
        self.totals.dead += 1
        self._spool.bury(job.job_id, attempt, reason)
        spec = self._hooks.get(job.rule)
        fields: dict[str, object] = {}
        if spec is not None and spec.failure_message is not None and job.events:
            fields["message"] = render.message(spec.failure_message, job)
        level = "error" if spec is None else spec.failure_level
        pid = job.events[0].get("pid") if job.events else None
        self._log(level, "job_dead", job_id=job.job_id, rule=job.rule, pid=pid, reason=reason, **fields)

    def _postpone(self, job: Job, reason: str) -> None:
        """There was no process, descriptor or memory for it: not the hook's fault, and not for ever."""
        self.totals.postponed += 1
        self._postponements += 1
        pause_s = min(LONGEST_POSTPONEMENT_S, 0.5 * 2.0 ** min(self._postponements, 10))
        self._spool.postpone(job.job_id, self._spool.clock() + int(pause_s * NS))
        self._record("warning", "hook_failed", job, None, Attempt(reason), will_retry=True, retry_in_s=pause_s)

    def _record(
        self, level: Level, event: str, job: Job, hook_pid: int | None, attempt: Attempt, **more: object
    ) -> None:
        self._log(
            level,
            event,
            job_id=job.job_id,
            rule=job.rule,
            pid=job.events[0].get("pid"),
            hook_pid=hook_pid,
            attempt=job.attempts,
            exit_code=attempt.exit_code,
            signal=attempt.signal,
            duration_ms=attempt.duration_ms,
            latency_ms=attempt.latency_ms,
            reason=attempt.reason,
            **more,
        )

    def _identity(self, spec: HookSpec) -> Identity:
        known = self._identities.get(spec.rule)
        if known is None:
            known = self._identities[spec.rule] = resolve(spec.user, spec.group)
        return known

    # -- upkeep --------------------------------------------------------------------------------------------------

    async def _end_leftovers(self, leftovers: list[Leftover]) -> None:
        """End the hooks that outlived the daemon which started them, and let their jobs run again."""
        for left in leftovers:
            try:
                if left.attempt_id is not None:
                    verified = left.hook_pid if left.hook_start_ticks is not None else None
                    root = group.Root(verified, left.hook_start_ticks, left.attempt_id)
                    if await group.members(root):
                        self._log("warning", "hook_leftover", job_id=left.job.job_id, rule=left.job.rule)
                        await group.end(root, TERM_GRACE_S)
            finally:
                self._held.pop(left.job.job_id, None)
                self.wake()

    def _tend_soon(self) -> None:
        if self._next_tend is None:
            self._next_tend = asyncio.get_running_loop().call_later(TEND_S, self._tend)

    def _tend(self) -> None:
        """What is due now and then, while there is work; an idle daemon has no timer at all."""
        self._next_tend = None
        now_s = asyncio.get_running_loop().time()
        if not self._spool.durable and now_s >= self._next_durable_s:
            self._next_durable_s = now_s + DURABLE_RETRY_S
            self._spool.try_durable()
        self._spool.settle()
        if self._cgroup_dir is not None:
            sweep_cgroups(self._cgroup_dir, [one.job for one in self._tries.values()])
        for pid in list(self._stuck):
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None:
                    continue
            self._stuck.discard(pid)
        if self._tries or self._stuck or not self._spool.durable:
            self._tend_soon()

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
