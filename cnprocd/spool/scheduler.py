"""The scheduler: hand the spool's jobs to a launcher, and apply the results of their attempts.

The spool is the queue; the scheduler keeps only the running attempts. wake() starts the first job before it returns and
the others in later iterations of the loop, so a burst does not hold it. job.py decides what follows an attempt.

Rules take turns (choosing.py, turns.py). The jobs of one rule start in the order of their age, as far as the rule's
slots and their serialize keys allow. With one key, only a job that waits for a retry is passed by younger ones. The
backlog (jobs from before this start) takes at most half of the slots. With a single slot, new jobs go first.

The hook of a job that was running when the daemon ended may still be running. If the runner started it, the attempt is
resumed. Else it is ended first, so that two attempts of one job never run at once.

Loop prevention: every hook is a child of this process or of the runner. `before_start` is called before the kernel can
see anything of an attempt, `on_started` before the hook does anything.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cnprocd.launch.attempt import TERM_GRACE_S, Launcher, LocalLauncher, RunningAttempt, sweep_cgroups
from cnprocd.launch.program import HookRefusedError
from cnprocd.launch.request import AttemptResult, Ending
from cnprocd.launch.user import UNRESOLVED, ResolveUser, resolve_user
from cnprocd.log import Log
from cnprocd.rules.ruleset import Hook
from cnprocd.spool.choosing import Chooser
from cnprocd.spool.former_rules import FormerRules
from cnprocd.spool.job import KILLED, NO_TIME_LEFT, Job, JobRequest, State, time_left_s
from cnprocd.spool.latency import Histogram
from cnprocd.spool.leftovers import end_leftover, reaped
from cnprocd.spool.outcomes import Outcomes
from cnprocd.spool.promises import MOST_SNAPSHOTS, NO_RULE, NO_SNAPSHOT, Promises, request_of
from cnprocd.spool.reopening import Reopening
from cnprocd.spool.rows import Enqueued, Leftover
from cnprocd.spool.running import KeptOutput, RunningHook, Totals
from cnprocd.spool.spool import Spool
from cnprocd.spool.starting import Starting, only_job
from cnprocd.stalls import Stalls

HOUSEKEEPING_S = 1.0  # how long a commit may wait for its fsync: see spool.py
DURABLE_RETRY_S = 30.0  # at most: a file that is locked for a moment is tried again sooner
STOP_GRACE_S = 2.0


class Scheduler:
    """Runs the spool's jobs. Create it and call start() inside a running asyncio loop.

    `hooks` are the rules' hooks by rule name. `on_started` and `on_finished` get the hook's PID and the job id. Without
    a `launcher`, hooks are children of this process. `resolve_user` raises OSError if it has no answer now.
    `guaranteed` slots are kept free for a rule (turns.guaranteed_slots).
    """

    def __init__(
        self,
        spool: Spool,
        hooks: Mapping[str, Hook],
        *,
        slots: int,
        log: Log,
        before_start: Callable[[], None] = lambda: None,
        on_started: Callable[[int, int], None] = lambda pid, job_id: None,
        on_finished: Callable[[int, int], None] = lambda pid, job_id: None,
        cgroup_dir: Path | None = None,
        launcher: Launcher | None = None,
        chance: Callable[[], float] = random.random,
        resolve_user: ResolveUser = resolve_user,
        snapshot: str = "",
        guaranteed: Mapping[str, int] | None = None,
        stalls: Stalls | None = None,
    ) -> None:
        self.totals = Totals()
        self.latency = Histogram()
        self.slots = slots
        self._chooser = Chooser(spool, guaranteed or {})
        self._spool = spool
        self.promises = Promises(hooks, snapshot)
        self.former = FormerRules(self.promises, log)
        self._outcomes = Outcomes(spool, self._chooser, self.promises, self.totals, log, chance)
        self._log = log
        self._before_start = before_start
        self._on_started = on_started
        self._on_finished = on_finished
        self._cgroup_dir = cgroup_dir
        self._resolve_user = resolve_user
        self._stalls = stalls or Stalls(log)
        self.launcher = launcher or LocalLauncher(log, cgroup_dir, self._stalls.blame)
        self._active: dict[int, tuple[Job, RunningAttempt]] = {}
        self._outputs: dict[int, KeptOutput] = {}  # of the active attempts
        self._killed: dict[int, bool] = {}  # active jobs that are being ended by hand -> whether they are retried
        self._tasks: set[asyncio.Task[None]] = set()
        self._leftovers: dict[int, Job] = {}  # jobs whose former hook is still being ended
        self._stuck: set[int] = set()
        self._accepting = False
        self._more = False  # the last choice found a job, so another may follow
        self._next_due: asyncio.TimerHandle | None = None
        self._next_housekeeping: asyncio.TimerHandle | None = None
        self._next_fill: asyncio.Handle | None = None
        self._prepared: Starting | None = None  # wake() launches its hook
        self._reopening = Reopening()

    def start(self) -> None:
        """Recover the jobs that a crash interrupted, then start jobs. Needs a running event loop."""
        self._chooser.last_old_job = self._spool.last_job_id()
        self._accepting = True
        self.launcher.prepare()
        self.launcher.on_ready = self.wake
        self._spool.on_recoverable = self._recover
        self._recover()

    def _recover(self) -> None:
        """Take up the jobs that a crash interrupted: at the start, and whenever the file has become usable."""
        resumable = self.launcher.outlives_daemon
        leftovers = [left for left in self._spool.recover(resumable=resumable) if left.boot_id == self._spool.boot_id]
        if not resumable:
            self._leftovers |= {left.job.job_id: left.job for left in leftovers}
            self._keep(self._end_leftovers(leftovers))
        known = [left for left in leftovers if resumable and self.promises.of(left.job) is not None]
        for left in known:
            self._resume(left)

        def go_on() -> None:
            for left in [left for left in leftovers if resumable and left not in known]:
                self._resume(left)
            self.wake()

        self.former.find(self._spool.snapshots(MOST_SNAPSHOTS) or (), go_on)
        self.wake()

    def enqueue(self, requests: Sequence[JobRequest]) -> Enqueued:
        """Add jobs to the spool, and prepare the first hook while they are committed. Call wake() after it."""
        return self._spool.enqueue(requests, lambda enqueued: self._begin_at_once(requests, enqueued))

    def _begin_at_once(self, requests: Sequence[JobRequest], enqueued: Enqueued) -> Callable[[], None]:
        """Choose the job that wake() would start. Its start is in the commit. Return what to do meanwhile."""
        if not self._may_start or self._next_fill is not None or self._prepared is not None:
            return lambda: None
        try:
            job = self._next_job(only_job(requests, enqueued, self._spool.boot_id))
            self._prepared = None if job is None else self._begin(job, in_commit=True)
        except Exception:  # wake() meets it again: the commit must not miss what it prevents
            return lambda: None
        if self._prepared is None:
            return lambda: None
        return partial(self._prepared.make_ready, self.launcher, self._resolve_user)

    def wake(self) -> None:
        """Start the first job that may run before this returns. Call it after jobs were added or revived."""
        self._schedule_housekeeping()
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self._more = True
            self._next_fill = asyncio.get_running_loop().call_soon(self._fill, True)
            with self._stalls.running("scheduler"):
                self._launch(prepared)
        elif self._next_fill is None:
            self._fill()

    def reload(
        self, hooks: Mapping[str, Hook], slots: int, snapshot: str = "", *, guaranteed: Mapping[str, int] | None = None
    ) -> None:
        """Use new rules for every attempt from now on. A job whose rule is gone runs as promised: see promises.py."""
        self.promises.use(hooks, snapshot, self._spool.snapshots(MOST_SNAPSHOTS))
        self.slots = slots
        self._chooser.use(guaranteed or {})
        self.wake()

    def running(self) -> list[RunningHook]:
        """Return the running hooks, oldest first."""
        return [
            RunningHook(job_id, job.rule, attempt.pid, job.attempts, attempt.running_s)
            for job_id, (job, attempt) in self._active.items()
        ]

    def output(self, job_id: int) -> str | None:
        """Return what the running attempt of a job has written so far, or None if none runs."""
        kept = self._outputs.get(job_id)
        return None if kept is None else kept.text

    def kill(self, job_id: int, *, retry: bool) -> bool:
        """End the running attempt of a job as failed. Return False if none runs. Without `retry` the job is dead."""
        if job_id not in self._active:
            return False
        self._killed[job_id] = retry
        self._active[job_id][1].terminate(TERM_GRACE_S)
        return True

    async def stop(self, bound_s: float) -> None:
        """Start nothing more. Let hooks finish within the bound, then end them; the runner keeps its own."""
        self._accepting = False
        for timer in (self._next_due, self._next_housekeeping, self._next_fill):
            if timer is not None:
                timer.cancel()
        self.former.close()
        if self.launcher.outlives_daemon:
            self.launcher.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=bound_s)
        for _, attempt in self._active.values():
            attempt.terminate(min(STOP_GRACE_S, TERM_GRACE_S))
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._next_housekeeping is not None:
            self._next_housekeeping.cancel()
        self.launcher.close()
        self._spool.sync()

    # -- choosing ------------------------------------------------------------------------------------------------

    def _fill(self, in_a_row: bool = False) -> None:
        """Start the next job that may run, and schedule the next call."""
        with self._stalls.running("scheduler"):
            self._start_next(in_a_row)

    def _start_next(self, in_a_row: bool) -> None:
        self._next_fill = None
        if not self._may_start:
            return
        searched_ns = self._spool.clock()
        job = self._next_job()
        self._more = job is not None
        if job is None:
            self._sleep_until_due(searched_ns)
            return
        starting = self._begin(job)
        if starting is not None:
            self._launch(starting)
        if in_a_row and self._slots_taken() < self.slots:
            self.launcher.prepare(soon=True)  # a burst: make the next spare meanwhile
        self._next_fill = asyncio.get_running_loop().call_soon(self._fill, True)

    def _next_job(self, only: Job | None = None) -> Job | None:
        return self._chooser.next_job(
            self.promises.slots_of,
            self.slots,
            [job for job, attempt in self._active.values() if not attempt.silent],
            [*self._leftovers.values(), *(job for job, attempt in self._active.values() if attempt.silent)],
            only,
        )

    @property
    def _may_start(self) -> bool:
        return self._accepting and self.launcher.ready and self._slots_taken() < self.slots

    def _slots_taken(self) -> int:
        return sum(not attempt.silent for _, attempt in self._active.values())

    def _sleep_until_due(self, searched_ns: int) -> None:
        """Set a timer for the next job that waits for a retry, for its gathering window, or is held."""
        if self._next_due is not None:
            self._next_due.cancel()
            self._next_due = None
        delay_s = self._chooser.next_in_s(searched_ns)
        if delay_s is not None:
            self._next_due = asyncio.get_running_loop().call_later(max(delay_s, 0.001), self.wake)

    # -- one job -------------------------------------------------------------------------------------------------

    def _begin(self, row: Job, *, in_commit: bool = False) -> Starting | None:
        """Mark a job as running, or as dead if its hook cannot be started. `in_commit`: a commit follows at once."""
        promise = self.promises.of(row)
        job = row if row.events else replace(row, events=self._spool.events(row.job_id))
        if promise is None or not job.events or time_left_s(promise.hook, job) <= 0:  # a reload shortened its deadline
            reason = NO_RULE if promise is None else NO_TIME_LEFT if job.events else "its record cannot be read"
            self._outcomes.bury(row, AttemptResult(reason), reason)
            return None
        if not promise.in_force:
            self._log("notice", "job_of_former_rule", job_id=job.job_id, rule=job.rule, snapshot=promise.snapshot)
        attempt_id = os.urandom(16).hex()
        self._chooser.note_start(job)
        self._spool.start(job.job_id, attempt_id, in_commit=in_commit)
        return Starting(replace(job, state=State.RUNNING, attempts=job.attempts + 1), promise, attempt_id)

    def _launch(self, starting: Starting) -> None:
        """Launch the hook of a job that is marked as running."""
        job, announced = starting.job, list[int]()

        def announce(pid: int) -> None:
            announced.append(pid)
            self._on_started(pid, job.job_id)

        try:
            request = starting.request_for(self._resolve_user)
            self._before_start()
            attempt = starting.launch(self.launcher, request, announce)
        except HookRefusedError as error:
            self._outcomes.apply(job, starting.promise.hook, AttemptResult(error.what), hook_pid=None)
        except OSError as error:
            self._outcomes.postpone(job, str(error))
            for pid in announced:
                self._on_finished(pid, job.job_id)
        else:
            self.totals.started += 1
            self._active[job.job_id] = (job, attempt)
            self._keep(self._wait(job, attempt))

    def _resume(self, left: Leftover) -> None:
        """Wait for an attempt that the runner started for an earlier daemon, or let its job run again."""
        job = replace(left.job, events=self._spool.events(left.job.job_id))
        if not job.events or left.attempt_id is None:
            self._spool.interrupt(job.job_id)
            return
        request = request_of(job, self.promises.of_running(job), left.attempt_id, UNRESOLVED)
        attempt = self.launcher.resume(request, lambda pid: self._on_started(pid, job.job_id))
        self._active[job.job_id] = (job, attempt)
        self._keep(self._wait(job, attempt))

    async def _wait(self, job: Job, attempt: RunningAttempt) -> None:
        ending: Ending | None = None
        output = self._outputs[job.job_id] = KeptOutput(attempt.request.hook.output_limit_bytes)

        def emit(line: str) -> None:
            output.add(line)
            self._log("info", "hook_output", job_id=job.job_id, rule=job.rule, hook_pid=attempt.pid, line=line)

        try:
            ending = await attempt.wait(emit, lambda one: self._launched(job, one))
        finally:
            del self._active[job.job_id], self._outputs[job.job_id]
            retry = self._killed.pop(job.job_id, None)
            self._on_finished(attempt.pid, job.job_id)
            if ending is None:  # a bug in cnprocd, not the hook's fault: the job must not be lost with it
                self._spool.interrupt(job.job_id)
        if ending.left_running and retry is not False:
            return
        if ending.stuck:
            self._stuck.add(attempt.pid)
        if output.text or job.attempts > 1:
            self._spool.put_output(job.job_id, output.text)
        failed = ending.result.reason is not None  # in whatever way, between the order and the signal
        if (retry is False and failed) or (retry and ending.interrupted):
            killed = replace(ending.result, reason=KILLED)
            self._outcomes.apply(job, attempt.request.hook, killed, hook_pid=attempt.pid, final=not retry)
        elif ending.no_snapshot and not self.promises.is_in_force(job):
            self._outcomes.bury(job, ending.result, NO_SNAPSHOT)
        elif ending.not_started:
            self._outcomes.postpone(job, ending.result.reason or "not started", alone=ending.this_job)
        elif ending.interrupted:
            self._outcomes.interrupt(job, attempt.pid, ending.result)
        else:
            self._outcomes.apply(job, attempt.request.hook, ending.result, hook_pid=attempt.pid)
        self.wake()

    def _launched(self, job: Job, attempt: RunningAttempt) -> None:
        """Store and log that the program runs."""
        self._outcomes.note_launch(job.rule)
        fresh = job.attempts == 1 and job.job_id > self._chooser.last_old_job and job.gather_key is None
        if attempt.latency_ms is not None and fresh:
            self.latency.add(attempt.latency_ms)
        latency_ms = attempt.latency_ms if job.boot_id == self._spool.boot_id else None
        self._spool.launched(job.job_id, attempt.pid, attempt.start_ticks, latency_ms)
        self._log(
            "info",
            "hook_started",
            job_id=job.job_id,
            rule=job.rule,
            pid=job.events[0].get("pid"),
            hook_pid=attempt.pid,
            attempt=job.attempts,
            latency_ms=latency_ms,
        )
        self.launcher.prepare(soon=self._more)

    # -- housekeeping --------------------------------------------------------------------------------------------

    async def _end_leftovers(self, leftovers: list[Leftover]) -> None:
        """End the hooks that survived the daemon that started them, and let their jobs run again."""
        for left in leftovers:
            try:
                await end_leftover(left, self._log, self.launcher)
            finally:
                self._leftovers.pop(left.job.job_id, None)
                self.wake()

    def _schedule_housekeeping(self) -> None:
        if self._next_housekeeping is None:
            self._next_housekeeping = asyncio.get_running_loop().call_later(HOUSEKEEPING_S, self._housekeeping)

    def _housekeeping(self) -> None:
        """Sync, sweep cgroups and reap, while there is work. An idle daemon has no timer."""
        self._next_housekeeping = None
        now_s = asyncio.get_running_loop().time()
        if self._reopening.is_due(now_s, self._spool.durable, HOUSEKEEPING_S, DURABLE_RETRY_S):
            self._spool.try_durable()
        self._spool.sync()
        if self._cgroup_dir is not None:
            sweep_cgroups(self._cgroup_dir, [attempt.request for _, attempt in self._active.values()])
        self._stuck = {pid for pid in self._stuck if not reaped(pid)}
        if self._active or self._stuck or not self._spool.durable:
            self._schedule_housekeeping()

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._stalls.steps("scheduler", work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
