"""Jobs, and the decision that follows the end of an attempt. PURE: time and chance are arguments.

A job is the promise that a hook runs for one match (or, with `coalesce`, for many). These methods of store.py change
its state, each in one SQL statement that names the states before. No method changes a job that is done.

    enqueue    new                  waiting
    start      waiting              running
    end        waiting, running     done or dead   from waiting if the rule is gone or the record is unreadable
    retry      running              waiting        the attempt failed and retries are left
    put_back   running              waiting        no failure is counted: the attempt was interrupted (the daemon
                                                   stopped or crashed) or postponed (a process, memory, a descriptor
                                                   or the runner was missing)
    revive     dead                 waiting        by hand: cnprocctl jobs retry
    drop       waiting              dead           by hand: cnprocctl jobs drop

Facts and choices:
- At least once: a job that never got an attempt is never given up for lateness. `deadline_s` bounds a sum of durations:
  those of the attempts that ended, and of the back-off pauses after them (`spent_ns`). So it counts neither the queue,
  nor the time while the daemon is down, nor an interrupted attempt, and no clock can expire a job.
- An interrupted attempt does not use up a retry, but it is counted: a job whose hook kills the daemon each time
  is given up after MOST_INTERRUPTIONS. `cnprocctl jobs retry` counts interruptions, failures and time anew.
- Pauses grow exponentially with full jitter (uniform in 0..cap; AWS Architecture Blog, "Exponential Backoff And
  Jitter"), so jobs that failed together do not come back together. A tenth of the cap is the minimum.
- created_ns, due_ns and finished_ns are of a steady wall clock (steady_clock.py); kernel_time_ns is CLOCK_MONOTONIC.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cnprocd.json_value import JsonObject
from cnprocd.launch.request import AttemptResult
from cnprocd.rules.ruleset import Backoff, Hook, Serialize

NS = 1_000_000_000
MOST_INTERRUPTIONS = 100
NO_TIME_LEFT = "no time left before the deadline"
KILLED = "killed by an operator"


class State(enum.StrEnum):
    """The state of a job; the values are what the spool stores and `cnprocctl jobs` shows."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Gather:
    """Coalescing: matches with the same `key` share one job until it starts, after `window_s` or at `max` of them."""

    key: str
    window_s: float
    max: int = 1000


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A match whose hook is to run. `key` identifies the match for ever: its match_id.

    `event` is the record as logged. Where a text of it was escaped, `<field>_hex` beside it holds the exact bytes.
    """

    key: str
    rule: str
    event: JsonObject
    serialize_key: str | None = None
    kernel_time_ns: int | None = None
    created_ns: int = 0
    gather: Gather | None = None
    snapshot: str = ""  # the digest of the rules that promise the hook


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the spool. `events` is filled when one job is read, and empty in lists."""

    job_id: int
    rule: str
    state: State
    serialize_key: str | None
    kernel_time_ns: int | None
    boot_id: str
    created_ns: int
    due_ns: int
    attempts: int
    failures: int
    event_count: int
    spent_ns: int = 0  # of the deadline
    interruptions: int = 0  # since the last `cnprocctl jobs retry`
    gather_key: str | None = None
    finished_ns: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None
    duration_ms: float | None = None
    latency_ms: float | None = None
    snapshot: str = ""
    events: tuple[JsonObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Next:
    """The state that follows an attempt: DONE, WAITING until `due_ns`, or DEAD for `reason`."""

    state: State
    due_ns: int = 0
    reason: str | None = None
    spent_ns: int = 0


def job_of(job_id: int, request: JobRequest, boot_id: str, now_ns: int) -> Job:
    """Return the job that was made of a request without `gather` at `now_ns`."""
    return Job(
        job_id=job_id,
        rule=request.rule,
        state=State.WAITING,
        serialize_key=request.serialize_key,
        kernel_time_ns=request.kernel_time_ns,
        boot_id=boot_id,
        created_ns=request.created_ns or now_ns,
        due_ns=now_ns,
        attempts=0,
        failures=0,
        event_count=1,
        snapshot=request.snapshot,
        events=(dict(request.event),),
    )


def serialize_key(mode: Serialize, rule: str, comm: str | None) -> str | None:
    """Return the key that no two running jobs may share, or None. An unknown comm is not equal to another."""
    # A rule name contains no "/", so a comm cannot make one rule's key equal to another's.
    return {"none": None, "rule": f"{rule}/", "comm": None if comm is None else f"{rule}/comm={comm}"}[mode]


def pause_s(backoff: Backoff, failures: int, chance: float) -> float:
    """Return the pause after failure number `failures` (from 1); `chance` is uniform in 0..1."""
    doublings = min(max(failures, 1) - 1, 64)  # 2**64 seconds exceeds any max_s: keep the float finite
    cap = min(backoff.max_s, backoff.initial_s * 2.0**doublings)
    return cap * (0.1 + 0.9 * chance)


def time_left_s(hook: Hook, job: Job) -> float:
    """Return how long the next attempt may take: the timeout, or less if the deadline is nearer. It may be negative."""
    return hook.timeout_s if hook.deadline_s is None else min(hook.timeout_s, hook.deadline_s - job.spent_ns / NS)


def after_attempt(hook: Hook, job: Job, result: AttemptResult, now_ns: int, chance: float) -> Next:
    """Return what follows for a running job whose attempt ended. `job.failures` does not count this attempt yet."""
    if result.reason is None:
        return Next(State.DONE)
    failures = job.failures + 1
    if failures > hook.retries:
        attempts = "1 attempt" if failures == 1 else f"{failures} attempts"
        return Next(State.DEAD, reason=f"{result.reason} ({attempts})")
    pause_ns = int(pause_s(hook.backoff, failures, chance) * NS)
    spent_ns = job.spent_ns + int((result.duration_ms or 0) * 1_000_000) + pause_ns
    if hook.deadline_s is not None and spent_ns >= hook.deadline_s * NS:
        return Next(State.DEAD, reason=f"{result.reason} ({NO_TIME_LEFT})")
    return Next(State.WAITING, due_ns=now_ns + pause_ns, spent_ns=spent_ns)


def after_interruption(job: Job, now_ns: int) -> Next:
    """Return what follows for a job that was running when the daemon stopped or crashed."""
    interruptions = job.interruptions + 1
    if interruptions > MOST_INTERRUPTIONS:
        return Next(State.DEAD, reason=f"interrupted {interruptions} times; the hook may stop cnprocd")
    return Next(State.WAITING, due_ns=now_ns)
