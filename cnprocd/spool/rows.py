"""What goes into the spool and comes out of it, as values. PURE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cnprocd.spool.job import Job, Record


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What became of a batch: the job of each request (None where it was shed or known already), and the counts."""

    job_ids: tuple[int | None, ...]
    duplicates: int = 0
    shed: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """A past match, for `cnprocctl history`. `time_ns` is wall clock."""

    time_ns: int
    rule: str
    comm: str | None
    pid: int | None
    record: Record


@dataclass(frozen=True, slots=True)
class Leftover:
    """A hook that was running when the daemon went away without a word; it may still be alive."""

    job: Job
    attempt_id: str | None
    boot_id: str | None  # of the try, which may be a later one than the job's
    hook_pid: int | None
    hook_start_ticks: int | None


@dataclass(frozen=True, slots=True)
class Rows:
    """Jobs and their events on the way from one store to another."""

    jobs: list[tuple[Any, ...]]
    events: list[tuple[Any, ...]]
    matches: list[tuple[Any, ...]]
    last_job_id: int
