"""What a job is, which states it goes through, and when it is tried again. PURE: time and chance are arguments.

A job is the promise that a hook runs for one match (or, gathered, for many). Its life:

    waiting --started--> running --succeeded--> done
       ^                    |
       |                    +--failed-------> waiting   (retries are left: later, see next_attempt)
       |                    +--gave_up------> dead      (kept, shown, and revived by hand)
       +--interrupted-------+                           (the daemon stopped or crashed: not the hook's fault)
       +--postponed---------+                           (no process, memory or descriptor to start it with)

Facts and choices:
- At least once: a job that never got a try is never given up for lateness. `deadline_s` is counted from the first
  start: it bounds tries and pauses, not the queue; a clock step or a night switched off cannot eat a job.
- An interrupted try does not use up a retry, but counts as an attempt: a job whose hook takes the daemon down with it
  is given up after MOST_INTERRUPTIONS.
- Pauses are exponential with full jitter (uniform in 0..cap, AWS Architecture Blog, "Exponential Backoff And Jitter"):
  a hundred jobs that failed together because a database was down do not come back together. A tenth of the cap is
  kept as floor, so that an unlucky draw does not hammer.
- All times with _ns that are stored are of one steady wall clock (spool.py); kernel_time_ns is CLOCK_MONOTONIC.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cnprocd.json_value import JsonObject
from cnprocd.log import Level
from cnprocd.rules.values import Template

NS = 1_000_000_000
MOST_INTERRUPTIONS = 100

Record = JsonObject  # an event as it is logged
Serialize = Literal["rule", "comm", "none"]


class State(enum.StrEnum):
    """Where a job is; the values are what the spool stores and `cnprocctl jobs` shows."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"


class Happening(enum.StrEnum):
    """What can happen to a job."""

    STARTED = "started"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    GAVE_UP = "gave_up"
    INTERRUPTED = "interrupted"
    POSTPONED = "postponed"
    REVIVED = "revived"  # by hand: cnprocctl jobs retry
    DROPPED = "dropped"  # by hand: cnprocctl jobs drop


TRANSITIONS: Mapping[State, Mapping[Happening, State]] = {
    State.WAITING: {
        Happening.STARTED: State.RUNNING,
        Happening.GAVE_UP: State.DEAD,
        Happening.DROPPED: State.DEAD,
    },
    State.RUNNING: {
        Happening.SUCCEEDED: State.DONE,
        Happening.FAILED: State.WAITING,
        Happening.GAVE_UP: State.DEAD,
        Happening.INTERRUPTED: State.WAITING,
        Happening.POSTPONED: State.WAITING,
    },
    State.DONE: {},
    State.DEAD: {Happening.REVIVED: State.WAITING},
}


def after(state: State, happening: Happening) -> State | None:
    """The state that follows, or None where `happening` makes no sense in `state`."""
    return TRANSITIONS[state].get(happening)


@dataclass(frozen=True, slots=True)
class Gather:
    """Coalescing: matches with the same `key` share one job until it starts, after `window_s` or at `max` of them."""

    key: str
    window_s: float
    max: int = 1000


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A match that wants its hook run. `key` is unique for ever: boot id, pid, process start time and rule.

    `event` is the record as logged. Where a text of it was escaped, `<field>_hex` beside it holds the exact bytes.
    """

    key: str
    rule: str
    event: Record
    serialize_key: str | None = None
    kernel_time_ns: int | None = None
    created_ns: int = 0
    gather: Gather | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """How one try of a hook ended. `reason` is None for success, else one line for a person."""

    reason: str | None
    exit_code: int | None = None
    signal: int | None = None
    duration_ms: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the spool knows it. `events` is filled where one job is looked at, empty in lists."""

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
    first_started_ns: int | None = None
    finished_ns: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None
    duration_ms: float | None = None
    latency_ms: float | None = None
    events: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class Backoff:
    """The pauses between tries: doubled from `initial_s` up to `max_s`."""

    initial_s: float = 1.0
    max_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of the hook; None leaves the daemon's own."""

    open_files: int | None = None
    processes: int | None = None
    address_space_bytes: int | None = None
    cpu_time_s: float | None = None
    core_bytes: int | None = None
    file_size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class HookSpec:
    """`run:` of a rule in this room's terms; the names are those of the rule language (rules/language/actions.py)."""

    rule: str
    command: tuple[Template, ...]
    user: str | int | None = None
    group: str | int | None = None
    timeout_s: float = 30.0
    deadline_s: float | None = None
    retries: int = 0
    backoff: Backoff = Backoff()
    env: Mapping[str, Template] = field(default_factory=dict)
    working_directory: str = "/"
    umask: int = 0o077
    nice: int = 0
    limits: Limits = Limits()
    slots: int | None = None
    serialize: Serialize = "none"
    output_limit_bytes: int = 64 * 1024
    failure_level: Level = "error"
    failure_message: Template | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """A user as a hook needs it. `switch` is False when it is what we are already."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str
    shell: str
    switch: bool


@dataclass(frozen=True, slots=True)
class Next:
    """What follows a try: done, waiting until due_ns, or dead with a reason."""

    happening: Happening
    due_ns: int = 0
    reason: str | None = None


def serialize_key(mode: Serialize, rule: str, comm: str | None) -> str | None:
    """The key that no two running jobs may share. An unknown comm is serialised with the other unknown ones."""
    # A rule name holds no "/", so that no comm can make one rule's key look like another's.
    return {"none": None, "rule": f"{rule}/", "comm": f"{rule}/comm={comm or ''}"}[mode]


def pause_s(backoff: Backoff, failures: int, chance: float) -> float:
    """The pause after the failure number `failures` (from 1); `chance` is uniform in 0..1."""
    doublings = min(max(failures, 1) - 1, 64)  # 2**64 seconds is past any max_s: keep the float finite
    cap = min(backoff.max_s, backoff.initial_s * 2.0**doublings)
    return cap * (0.1 + 0.9 * chance)


def time_left_s(spec: HookSpec, job: Job, now_ns: int) -> float:
    """How long a try that starts now may take: its timeout, cut by what is left of the deadline."""
    if spec.deadline_s is None or job.first_started_ns is None:
        return spec.timeout_s if spec.deadline_s is None else min(spec.timeout_s, spec.deadline_s)
    return min(spec.timeout_s, spec.deadline_s - (now_ns - job.first_started_ns) / NS)


def after_attempt(spec: HookSpec, job: Job, attempt: Attempt, now_ns: int, chance: float) -> Next:
    """What becomes of a running job whose try ended. `job` is as it was while running: failures without this one."""
    if attempt.reason is None:
        return Next(Happening.SUCCEEDED)
    failures = job.failures + 1
    if failures > spec.retries:
        tries = "1 try" if failures == 1 else f"{failures} tries"
        return Next(Happening.GAVE_UP, reason=f"{attempt.reason} ({tries})")
    due_ns = now_ns + int(pause_s(spec.backoff, failures, chance) * NS)
    if spec.deadline_s is not None and job.first_started_ns is not None:
        deadline_ns = job.first_started_ns + int(spec.deadline_s * NS)
        if due_ns >= deadline_ns:
            return Next(Happening.GAVE_UP, reason=f"{attempt.reason} (no time left before the deadline)")
    return Next(Happening.FAILED, due_ns=due_ns)


def after_interruption(job: Job, now_ns: int) -> Next:
    """What becomes of a job that was running when the daemon stopped or crashed."""
    interruptions = job.attempts - job.failures
    if interruptions > MOST_INTERRUPTIONS:
        return Next(Happening.GAVE_UP, reason=f"interrupted {interruptions} times: does this hook stop cnprocd?")
    return Next(Happening.INTERRUPTED, due_ns=now_ns)
