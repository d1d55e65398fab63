"""The values that go into the spool and come out of it. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from cnprocd.errors import EX_NO, CnprocdError
from cnprocd.json_value import JsonObject
from cnprocd.spool.job import Job

T = TypeVar("T")
LONGEST_PAUSE_NS = 10 * 366 * 86_400 * 1_000_000_000  # longer than any duration of the rule language


@dataclass(frozen=True, slots=True)
class Enqueued:
    """The job of each request of a batch (None: a duplicate, or shed because the queue was full), and counts.

    `shed_by_rule` counts both requests and waiting jobs that were dropped; `made_room` are the latter.
    """

    job_ids: tuple[int | None, ...]
    duplicates: int = 0
    shed_by_rule: Mapping[str, int] = field(default_factory=dict)
    made_room: tuple[int, ...] = ()
    now_ns: int = 0  # when the jobs were made
    waiting: int = 0  # jobs, after that

    @property
    def shed(self) -> int:
        return sum(self.shed_by_rule.values())


@dataclass(frozen=True, slots=True)
class RuleQueue:
    """The waiting jobs of a rule, and the age of the oldest."""

    waiting: int
    oldest_waiting_s: float


@dataclass(frozen=True, slots=True)
class PastMatch:
    """A row of `cnprocctl history`. `time_ns` is wall clock. `job_state` is None without a job that is still kept.

    `text`: the record as JSON, if it is known.
    """

    time_ns: int
    rule: str
    comm: str | None
    pid: int | None
    record: JsonObject
    job_state: str | None = None
    job_reason: str | None = None
    text: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchFilter:
    """Which past matches are wanted. Names of rules, comms and units are globs; times are wall clock.

    `after`: the first ones that follow the match of this id, instead of the newest; "" begins with the oldest.
    `before`: the newest of those that this match follows. The order is that of the reports: clocks can be set back.
    """

    rule: str | None = None
    comm: str | None = None
    unit: str | None = None
    pid: int | None = None
    uid: int | None = None
    user: str | None = None
    since_ns: int = 0
    until_ns: int | None = None
    limit: int = 100
    after: str | None = None
    before: str | None = None
    match_id: str | None = None


@dataclass(frozen=True, slots=True)
class CountFilter:
    """Count past matches between two times (wall clock) by rule, unit or kind, in periods of `per_ns`."""

    by: str
    since_ns: int
    until_ns: int
    per_ns: int


@dataclass(frozen=True, slots=True)
class MatchCount:
    """How many past matches of one rule, unit or kind there were from `at_ns` on, for one period."""

    at_ns: int
    key: str | None
    count: int


class NotInHistoryError(CnprocdError):
    """The match from which the history is to go on is not kept, or never was."""

    exit_status = EX_NO

    def __init__(self, match_id: str | None) -> None:
        super().__init__(
            f"cannot go on from match {match_id}: it is not in the history",
            "history_count and history_age limit what is kept, and matches with held_by are not kept; "
            "begin again with --since the last time",
        )


@dataclass(frozen=True, slots=True)
class RuleHits:
    """How often a rule matched, and when it did so last (wall clock)."""

    count: int
    last_ns: int | None


@dataclass(frozen=True, slots=True)
class Leftover:
    """A hook that was running when the daemon crashed; it may still be alive."""

    job: Job
    attempt_id: str | None
    boot_id: str | None  # of the attempt; the job's may be an earlier one
    hook_pid: int | None
    hook_start_ticks: int | None


@dataclass(frozen=True, slots=True)
class ClockReading:
    """A steady clock (steady_clock.py) and its time: `offset_ns` is what it adds to CLOCK_BOOTTIME of its boot."""

    boot_id: str
    offset_ns: int
    now_ns: int


def due_again_ns(due_ns: int, theirs: ClockReading | None, ours: ClockReading) -> int:
    """Return by our clock when a job is due that is due at `due_ns` by the clock of an earlier daemon.

    Within a boot this is exact, whatever the wall clock did. After a boot the job waits for as long as it had to wait
    still at their last write. If their clock is unknown, the job is due now. A pause that is longer than any is of a
    damaged file, and is none.
    """
    if theirs is None:
        return ours.now_ns
    if theirs.boot_id == ours.boot_id:
        pause_ns = due_ns - theirs.offset_ns + ours.offset_ns - ours.now_ns
    else:
        pause_ns = max(0, due_ns - theirs.now_ns)
    return ours.now_ns + (pause_ns if abs(pause_ns) <= LONGEST_PAUSE_NS else 0)


@dataclass(frozen=True, slots=True)
class Rows:
    """Jobs with their events, and maybe the past, to be copied from one store to another.

    `clock` is the clock of the jobs' times. None: that of the store to which they are copied.
    """

    jobs: list[tuple[Any, ...]] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    matches: list[tuple[Any, ...]] = field(default_factory=list)
    outputs: list[tuple[Any, ...]] = field(default_factory=list)
    hits: list[tuple[Any, ...]] = field(default_factory=list)
    last_job_id: int = 0
    clock: ClockReading | None = None


@dataclass(frozen=True, slots=True)
class Keep:
    """The bounds of the spool: waiting jobs, and history by count and age."""

    queue_limit: int = 10_000
    history_count: int = 10_000
    history_age_s: float = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of jobs for `status`."""

    waiting: int
    running: int
    done: int
    dead: int
    oldest_waiting_s: float | None
    duplicates: int
    shed: int
    durable: bool
    why: str | None


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """What was searched for. `why`: the file could not be read, and this is what the memory has."""

    value: T
    why: str | None = None
