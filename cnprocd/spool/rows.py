"""The values that go into the spool and come out of it. PURE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cnprocd.json_value import JsonObject
from cnprocd.spool.job import Job


@dataclass(frozen=True, slots=True)
class Enqueued:
    """The job of each request of a batch (None: a duplicate, or shed because the queue was full), and counts."""

    job_ids: tuple[int | None, ...]
    duplicates: int = 0
    shed: int = 0


@dataclass(frozen=True, slots=True)
class PastMatch:
    """A row of `cnprocctl history`. `time_ns` is wall clock."""

    time_ns: int
    rule: str
    comm: str | None
    pid: int | None
    record: JsonObject


@dataclass(frozen=True, slots=True)
class Leftover:
    """A hook that was running when the daemon crashed; it may still be alive."""

    job: Job
    attempt_id: str | None
    boot_id: str | None  # of the attempt; the job's may be an earlier one
    hook_pid: int | None
    hook_start_ticks: int | None


@dataclass(frozen=True, slots=True)
class Rows:
    """Jobs with their events, to be copied from one store to another."""

    jobs: list[tuple[Any, ...]]
    events: list[tuple[Any, ...]]
    matches: list[tuple[Any, ...]]
    last_job_id: int
