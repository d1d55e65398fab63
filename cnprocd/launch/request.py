"""The values of one attempt to run a hook: its request and its result. PURE.

The scheduler makes a LaunchRequest of a job. The runner makes one of a frame and of its own rules. Rendering, spawning
and both launchers know hooks by it alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from cnprocd.json_value import JsonObject
from cnprocd.rules.ruleset import Hook

# Of one attempt. A frame to the runner has at most 16 MiB (runner/wire.py); without the runner the same holds, so that
# a hook gets the same events in both modes.
MOST_EVENTS_BYTES = 15 << 20


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
    processes carry in their environment. `limit_s` bounds the attempt. `kernel_time_ns` is CLOCK_MONOTONIC. `snapshot`
    is the digest of the rules that the hook is from. `events_left_out` counts the older events of the job that are not
    in `events`.
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
    snapshot: str = ""
    events_left_out: int = 0

    @property
    def first_record(self) -> JsonObject:
        """The record that templates refer to. It holds the job's id, which was not known when the record was made."""
        return {**self.events[0], "job_id": self.job_id}


def newest_that_fit(events: Sequence[JsonObject], most_bytes: int = MOST_EVENTS_BYTES) -> Sequence[JsonObject]:
    """Return the newest events whose JSON has at most `most_bytes` in total; at least one."""
    total = 0
    for kept, event in enumerate(reversed(events)):
        total += len(json.dumps(event)) + 2  # the JSON is ASCII; ", " separates two
        if total > most_bytes and kept:
            return events[-kept:]
    return events


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
    no_snapshot: bool = False  # not started, because the runner has no snapshot of the rules of the hook
    this_job: bool = False  # not started, but another job of the rule may be
    left_running: bool = False  # the daemon stops, and the runner's hook does not
    stuck: bool = False  # the hook survived SIGKILL and is still to be reaped
