"""What the daemon asks of the spool's file, and the answers. PURE.

The store in memory is the original; the file is a copy that follows it. `Open` merges the two, `Write` carries the rows
that changed since.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cnprocd.spool.job import Job, State
from cnprocd.spool.rows import ClockReading, CountFilter, MatchCount, MatchFilter, PastMatch, Rows


@dataclass(frozen=True, slots=True)
class Ended:
    """The tombstone of a job that has ended and is no longer kept in memory: its row must not come back."""

    job_id: int
    created_ns: int
    state: str
    finished_ns: int


@dataclass(frozen=True, slots=True)
class Open:
    """Open the file, and merge the content of the memory into it. `copy`: if it is read-only, read its live jobs."""

    path: str
    memory: Rows = field(default_factory=Rows)
    ended: tuple[Ended, ...] = ()
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    """Commit rows that are new or have changed, and forget the hits of the rules in `gone`."""

    rows: Rows
    ended: tuple[Ended, ...] = ()
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prune:
    """Delete history beyond `keep` rows of each kind, or older."""

    keep: int
    older_than_ns: int
    clock: ClockReading


@dataclass(frozen=True, slots=True)
class Close:
    """Move the WAL into the file, and close it."""

    clock: ClockReading | None = None


@dataclass(frozen=True, slots=True)
class FindJobs:
    """Find the newest jobs before the job `before`, which is 0 for the first page, without events. `rule` is a glob."""

    state: State | None
    rule: str | None
    limit: int
    before: int = 0


@dataclass(frozen=True, slots=True)
class FindJob:
    """Find one job with its events."""

    job_id: int


@dataclass(frozen=True, slots=True)
class FindOutput:
    """Find the output of a job's last attempt."""

    job_id: int


@dataclass(frozen=True, slots=True)
class FindMatches:
    """Find a page of matches. `following` is that of the page before, or 0 for the first page."""

    wanted: MatchFilter
    following: int = 0


@dataclass(frozen=True, slots=True)
class CountMatches:
    """Count matches by period and key."""

    wanted: CountFilter


@dataclass(frozen=True, slots=True)
class FindDead:
    """Find the rows of dead jobs: one job, those of the rules that match a glob, or all."""

    job_id: int | None
    rule: str | None


Query = FindJobs | FindJob | FindOutput | FindMatches | CountMatches | FindDead
Request = Open | Write | Prune | Close | Query


@dataclass(frozen=True, slots=True)
class Damaged:
    """The file was damaged. It was renamed, and a new one has the jobs that were readable."""

    kept_as: str
    reason: str
    carried: int


@dataclass(frozen=True, slots=True)
class Opened:
    """The file is open. `rows` are its live jobs that were not in memory, and its hits."""

    rows: Rows
    keys: tuple[str, ...]  # the newest keys of events of ended jobs: an event with one of them is a duplicate
    done: int
    dead: int
    superseded: tuple[int, ...]  # waiting jobs of the memory whose events the file knows as handled
    snapshots: tuple[str, ...]  # digests of rules that its jobs refer to which may still run
    damaged: Damaged | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The request was carried out."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """History was deleted. The jobs that are left, by state."""

    rows: int
    done: int
    dead: int


@dataclass(frozen=True, slots=True)
class Page:
    """A page of matches or jobs, bounded in number and bytes. `following` names the next page; 0: there is none.

    `knows_after`: whether the match after which the page begins is kept.
    """

    matches: tuple[PastMatch, ...] = ()
    following: int = 0
    knows_after: bool = True
    jobs: tuple[Job, ...] = ()


@dataclass(frozen=True, slots=True)
class Counted:
    """The matches of each period, by key."""

    counts: tuple[MatchCount, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The file cannot be used. `rows`: its live jobs, if it can be read but not written."""

    reason: str
    damaged: bool = False
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Unanswerable:
    """The question is at fault, not the file: its pattern is too complex, or it is no valid text."""

    reason: str


Answer = Opened | Done | Pruned | Page | Counted | Failed | Unanswerable | Job | str | Rows | None


def reason_of(answer: Answer) -> str | None:
    """Return why the file has no answer, or None if that is its answer."""
    return answer.reason if isinstance(answer, Failed | Unanswerable) else None
