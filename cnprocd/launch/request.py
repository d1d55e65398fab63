"""The values of one attempt to run a hook: its request and its result. PURE.

The scheduler makes a LaunchRequest of a job. The runner makes one of a frame and of its own rules. Rendering, spawning
and both launchers know hooks by it alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from cnprocd.json_value import JsonObject
from cnprocd.rules.ruleset import Hook


@dataclass(frozen=True, slots=True)
class HookUser:
    """The user that a hook runs as. `switch` is False if this process already is that user."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str
    shell: str
    switch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """One attempt of one job's hook.

    `events` are records as they are logged, at least one. Where a text of a record was escaped, `<field>_hex` beside it
    holds the exact bytes. `attempt` counts from 1. `attempt_id` is 128 random bits in hexadecimal, which the hook's
    processes carry in their environment. `limit_s` bounds the attempt. `kernel_time_ns` is CLOCK_MONOTONIC.
    """

    rule: str
    hook: Hook
    user: HookUser
    job_id: int
    attempt: int
    attempt_id: str
    events: tuple[JsonObject, ...]
    limit_s: float
    kernel_time_ns: int | None = None

    @property
    def first_record(self) -> JsonObject:
        """The record that templates refer to. It holds the job's id, which was not known when the record was made."""
        return {**self.events[0], "job_id": self.job_id}


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How one attempt ended. `reason` is None for success, else one line for people."""

    reason: str | None
    exit_code: int | None = None
    signal: int | None = None
    duration_ms: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of an attempt. If `interrupted` or `not_started` is set, `result` does not count against the hook."""

    result: AttemptResult
    interrupted: bool = False
    not_started: bool = False  # a process, memory, a descriptor or the runner was missing
    stuck: bool = False  # the hook survived SIGKILL and is still to be reaped
