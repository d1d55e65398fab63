"""The durable queue of jobs.

There is one SQLite file in the state directory (store.py). If the disk fails, the same tables are kept in memory. Every
call goes through `_do`: on sqlite3.Error the live jobs are copied to another store and the call is repeated, so cleanup
continues. A damaged file is renamed to spool.sqlite3.damaged-<time>, and a new one gets every job that is still
readable. Meanwhile `durable` is False and `why` is the reason. `try_durable()`, which the scheduler calls from time to
time, moves everything back to the disk.

The price of durability, measured by tests/unit/spool/measure_sync.py (chrt -r 50) on ext4 on a virtio disk, Linux 6.18,
SQLite 3.40, busy machine; one commit of 1 job / of 100 jobs, p50:

    synchronous=OFF      0.08 ms / 3.1 ms     daemon crash: no loss.  machine crash: the file may be damaged
    synchronous=NORMAL   0.08 ms / 3.3 ms     daemon crash: no loss.  machine crash: loses the commits since sync()
    synchronous=FULL     0.42 ms / 7.0 ms     no loss; p99 of one job 1.4 to 17 ms, on a fast disk

NORMAL is used, with one fsync (sync()) within a second of a commit: 13 ms after 300 jobs. A crash, kill -9 or OOM kill
of the daemon loses nothing. A power cut or kernel panic loses at most the jobs of the last second and never damages
the file. A machine crash ends all processes unseen, so those jobs are a small part of its cleanup. FULL would put an
fsync between each death and its cleanup. The WAL is moved into the file when it is longer than MOST_WAL_BYTES, and at
the end.

Times in the spool are wall clock as of the daemon's start, continued by CLOCK_BOOTTIME. A clock step neither delays a
retry nor expires a deadline.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cnprocd.json_value import JsonObject
from cnprocd.launch.request import AttemptResult
from cnprocd.log import Log, ThrottledLog
from cnprocd.spool import database, salvage
from cnprocd.spool.job import NS, Job, JobRequest, State, after_interruption
from cnprocd.spool.rows import Enqueued, Leftover, MatchFilter, PastMatch, Rows, RuleHits
from cnprocd.spool.store import Store

FILE_NAME = "spool.sqlite3"
PRUNE_EVERY = 500
SHED_EVERY_S = 5
MOST_WAL_BYTES = 4 << 20

T = TypeVar("T")


class SteadyClock:
    """Wall clock nanoseconds without clock steps: the wall clock at creation plus CLOCK_BOOTTIME since then."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def __call__(self) -> int:
        return self._offset_ns + time.clock_gettime_ns(time.CLOCK_BOOTTIME)


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


class Spool:
    """Jobs from match to history. While they are in memory only, `durable` is False and `why` is the reason."""

    def __init__(self, path: Path, *, log: Log, keep: Keep, clock: Callable[[], int], boot_id: str) -> None:
        self.path = path
        self.keep = keep
        self.clock = clock
        self.boot_id = boot_id
        self.durable = True
        self.why: str | None = None
        self.duplicates = 0
        self.shed = 0
        self.unsynced = False
        self._since_prune = 0
        self._log = log
        self._shed_log = ThrottledLog(log, SHED_EVERY_S)
        self._store = self._open()

    @classmethod
    def open(
        cls, state_dir: Path, *, log: Log, keep: Keep | None = None, clock: Callable[[], int] | None = None
    ) -> Spool:
        """Open the spool of a state directory. If the disk cannot be used, log it and keep the jobs in memory."""
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(state_dir / FILE_NAME, log=log, keep=keep or Keep(), clock=clock or SteadyClock(), boot_id=boot_id)

    def close(self) -> None:
        """Sync and close the file. SQLite moves the WAL into it when the last connection closes."""
        self.sync()
        with contextlib.suppress(sqlite3.Error):
            self._store.close()

    # -- matches in -------------------------------------------------------------------------------------

    def enqueue(self, requests: Sequence[JobRequest]) -> Enqueued:
        """Add a batch in one commit. Jobs above the queue limit are dropped, counted and logged."""
        limit = self.keep.queue_limit
        result = self._write(
            lambda store: store.enqueue(requests, boot_id=self.boot_id, now_ns=self.clock(), queue_limit=limit)
        )
        self.duplicates += result.duplicates
        self.shed += result.shed
        if result.shed:
            self._shed_log.add(
                "error",
                "queue_full",
                self.clock() / NS,
                {"shed": result.shed},
                lambda counts: f"dropped {counts['shed']} jobs: {limit} are waiting already (queue_limit)",
                shed_in_all=self.shed,
                limit=limit,
            )
        return result

    def record_matches(self, matches: Sequence[PastMatch]) -> None:
        """Store matches for `cnprocctl history`."""
        self._since_prune += len(matches)
        self._write(lambda store: store.add_matches(matches))

    def matches(self, wanted: MatchFilter) -> list[PastMatch]:
        """Return past matches, newest first."""
        return self._do(lambda store: store.matches(wanted))

    def put_hits(self, hits: Mapping[str, RuleHits], gone: Iterable[str] = ()) -> None:
        """Store the hits of rules, and forget the rules in `gone`."""
        self._write(lambda store: store.put_hits(hits, gone))

    def hits(self) -> dict[str, RuleHits]:
        """Return the stored hits: see history.find_hits()."""
        return self._do(lambda store: store.hits())

    # -- the scheduler's calls ------------------------------------------------------------------------------------

    def due(
        self,
        limit: int,
        *,
        after_id: int = 0,
        skip_rules: Sequence[str] = (),
        skip_keys: Sequence[str] = (),
        skip_jobs: Sequence[int] = (),
    ) -> list[Job]:
        """Return the oldest jobs that may start now, without those that `skip_*` name."""
        now_ns = self.clock()
        return self._do(
            lambda store: store.due(
                now_ns, limit, after_id=after_id, skip_rules=skip_rules, skip_keys=skip_keys, skip_jobs=skip_jobs
            )
        )

    def events(self, job_id: int) -> tuple[JsonObject, ...]:
        """Return the events of a job, or () if one of them cannot be read."""
        return self._do(lambda store: store.events(job_id))

    def next_due_in_s(self) -> float | None:
        """Return the seconds until the next job that waits for its time is due, or None."""
        now_ns = self.clock()
        due_ns = self._do(lambda store: store.next_due_ns(now_ns))
        return None if due_ns is None else (due_ns - now_ns) / NS

    def start(self, job_id: int, attempt_id: str) -> None:
        """Mark the job as running, before the fork."""
        now_ns = self.clock()
        self._write(lambda store: store.start(job_id, attempt_id, self.boot_id, now_ns))

    def launched(self, job_id: int, hook_pid: int, hook_start_ticks: int | None, latency_ms: float | None) -> None:
        """Store the hook's PID and latency, after the exec."""
        self._write(lambda store: store.launched(job_id, hook_pid, hook_start_ticks, latency_ms))

    def finish(self, job_id: int, result: AttemptResult) -> None:
        """Mark the job as done: the hook succeeded."""
        self._since_prune += 1
        now_ns = self.clock()
        self._write(lambda store: store.end(job_id, State.DONE, result, now_ns, None))

    def retry(self, job_id: int, result: AttemptResult, due_ns: int) -> None:
        """Let the job wait for its next attempt at `due_ns`: the hook failed."""
        self._write(lambda store: store.retry(job_id, result, due_ns))

    def bury(self, job_id: int, result: AttemptResult, reason: str) -> None:
        """Mark the job as dead: no further attempt follows."""
        self._since_prune += 1
        now_ns = self.clock()
        self._write(lambda store: store.end(job_id, State.DEAD, result, now_ns, reason))

    def put_output(self, job_id: int, output: str) -> None:
        """Store the output of a job's last attempt."""
        self._write(lambda store: store.put_output(job_id, output))

    def snapshots(self, limit: int) -> list[str]:
        """Return the digests of rules that jobs refer to which may still run, the newest first."""
        return self._do(lambda store: store.snapshots(limit))

    def interrupt(self, job_id: int, pause_s: float = 0.0) -> None:
        """Let the job wait again: its attempt was interrupted. The attempt is counted, and no retry is used up."""
        due_ns = self.clock() + int(pause_s * NS)
        self._write(lambda store: store.put_back(job_id, due_ns, counted=True))

    def postpone(self, job_id: int, due_ns: int) -> None:
        """Let the job wait until `due_ns`: its attempt could not be started. The attempt is not counted."""
        self._write(lambda store: store.put_back(job_id, due_ns, counted=False))

    def recover(self, *, resumable: bool = False) -> list[Leftover]:
        """Return the jobs that ran at a crash, and let them wait again (or die after too many interruptions).

        The hooks may still be alive. If attempts are `resumable`, those of this boot stay as they are.
        """
        found = self._do(lambda store: store.leftovers())
        for leftover in found:
            job = leftover.job
            if resumable and leftover.boot_id == self.boot_id:
                continue
            following = after_interruption(job, self.clock())
            if following.state is State.DEAD:
                assert following.reason is not None
                self.bury(job.job_id, AttemptResult(following.reason), following.reason)
                self._log("error", "job_dead", job_id=job.job_id, rule=job.rule, reason=following.reason)
            else:
                self.interrupt(job.job_id)
        return found

    # -- control ---------------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Return the number of jobs in each state, and whether they are durable."""
        by_state = self._do(lambda store: store.counts())
        oldest_ns = self._do(lambda store: store.oldest_waiting_ns())
        return Counts(
            waiting=by_state[State.WAITING],
            running=by_state[State.RUNNING],
            done=by_state[State.DONE],
            dead=by_state[State.DEAD],
            oldest_waiting_s=None if oldest_ns is None else max(0.0, (self.clock() - oldest_ns) / NS),
            duplicates=self.duplicates,
            shed=self.shed,
            durable=self.durable,
            why=self.why,
        )

    def last_job_id(self) -> int:
        """Return the highest job id ever given."""
        return self._do(lambda store: store.last_job_id())

    def jobs(self, *, state: State | None = None, rule: str | None = None, limit: int = 100) -> list[Job]:
        """Return jobs, newest first, without their events."""
        return self._do(lambda store: store.jobs(state, rule, limit))

    def job(self, job_id: int) -> Job | None:
        """Return one job with its events."""
        return self._do(lambda store: store.job(job_id))

    def output(self, job_id: int) -> str | None:
        """Return the output of a job's last attempt that has ended, or None."""
        return self._do(lambda store: store.output(job_id))

    def revive(self, *, job_id: int | None = None, rule: str | None = None) -> list[int]:
        """Let dead jobs wait again (`cnprocctl jobs retry`), and return them. Call the scheduler's wake() after it."""
        return self._write(lambda store: store.revive(job_id, rule, self.clock()))

    def drop(self, job_id: int) -> bool:
        """Mark a waiting job as dead (`cnprocctl jobs drop`)."""
        return self._write(lambda store: store.drop(job_id, self.clock()))

    # -- upkeep --------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make all commits survive a power cut, prune, and log dropped jobs. Call it within a second of a commit."""
        if self._since_prune >= PRUNE_EVERY:
            self.prune()
        self._shed_log.flush_due(self.clock() / NS)
        if self.durable and self.unsynced:
            self._do(lambda store: store.sync())
            if salvage.size_of_wal(self.path) > MOST_WAL_BYTES:
                self._do(lambda store: store.checkpoint())
        self.unsynced = False

    def prune(self) -> int:
        """Delete history beyond `keep`. Return how many rows were deleted."""
        self._since_prune = 0
        older_than_ns = self.clock() - int(self.keep.history_age_s * NS)
        return self._write(lambda store: store.prune(keep=self.keep.history_count, older_than_ns=older_than_ns))

    def try_durable(self) -> bool:
        """Move back to the disk if it can be used again. Return whether the spool is durable."""
        if self.durable:
            return True
        try:
            store = self._file()
        except (sqlite3.Error, OSError) as error:
            self.why = salvage.sentence(error)
            return False
        try:
            store.adopt(self._store.rows(*State))
        except salvage.FAILURES as error:
            self.why = salvage.sentence(error)
            store.close()
            return False
        self._store.close()
        self._store = store
        self.durable, self.why, self.unsynced = True, None, True
        self._log("notice", "spool_durable", path=str(self.path))
        return True

    # -- disk failures -------------------------------------------------------------------------------------------

    def _do(self, work: Callable[[Store], T]) -> T:
        try:
            return work(self._store)
        except salvage.FAILURES as error:
            if not self.durable:
                raise
            self._move(error)
            return work(self._store)

    def _write(self, work: Callable[[Store], T]) -> T:
        self.unsynced = True
        return self._do(work)

    def _open(self) -> Store:
        try:
            return self._file()
        except (sqlite3.Error, OSError) as error:
            store = self._memory(error)
            # The jobs of a locked file belong to the process that holds it; those of a read-only file are run here.
            busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            self._copy_jobs(Rows() if busy else salvage.copied(self.path), store)
            return store

    def _file(self) -> Store:
        """Open the file. A damaged file is renamed first, and its readable jobs are copied."""
        try:
            return salvage.private_file(self.path)
        except sqlite3.DatabaseError as error:
            if not salvage.is_damage(error):
                raise
            live = salvage.salvaged(self.path)
            self._rename_damaged(error)
            store = salvage.private_file(self.path)
            self._copy_jobs(live, store)
            return store

    def _memory(self, error: Exception) -> Store:
        self.durable, self.why = False, salvage.sentence(error)
        self._log("error", "spool_not_durable", path=str(self.path), reason=self.why)
        return Store(database.in_memory())

    def _move(self, error: Exception) -> None:
        """Copy the live jobs to a new file or to memory, because the file failed in use."""
        old = self._store
        live = Rows()
        with contextlib.suppress(*salvage.FAILURES):
            live = old.rows(*salvage.LIVE)
        with contextlib.suppress(sqlite3.Error):
            old.close()
        if salvage.is_damage(error):
            live = live if live.jobs else salvage.salvaged(self.path)
            try:
                self._rename_damaged(error)
                self._store = salvage.private_file(self.path)
            except (sqlite3.Error, OSError) as second:
                self._store = self._memory(second)
        else:
            self._store = self._memory(error)
        self._copy_jobs(live, self._store)

    def _copy_jobs(self, live: Rows, store: Store) -> None:
        try:
            store.adopt(live)
            if live.last_job_id == 0:
                salvage.with_new_ids(store)
        except sqlite3.Error as error:
            self._log("error", "spool_moved", durable=self.durable, carried=0, reason=salvage.sentence(error))
        else:
            self._log("warning", "spool_moved", durable=self.durable, carried=len(live.jobs))

    def _rename_damaged(self, error: Exception) -> None:
        aside = salvage.rename_damaged(self.path)
        self._log("error", "spool_damaged", path=str(self.path), kept_as=str(aside), reason=salvage.sentence(error))
