"""The durable queue of jobs: what a match promised survives the daemon.

Strategy: one SQLite file in the state directory (store.py), and when the disk fails, the same tables in memory. Every
call goes through `_do`: on sqlite3.Error the live jobs are carried over, the call is made again, and cleanup goes on.
A damaged file is moved aside as spool.sqlite3.damaged-<time>, for a person to look at, and a new one is begun with
every job that could still be read. While there is no durability, `durable` is False, `why` says why, and
`try_durable()` (the runner calls it now and then) moves everything back to the disk.

What survives what, and at what price. Measured by tests/unit/spool/measure_sync.py (chrt -r 50) on ext4 on a virtio
disk, Linux 6.18, SQLite 3.40, a busy machine; one commit of 1 job / of 100 jobs, p50:

    synchronous=OFF      0.08 ms / 3.1 ms     daemon crash: nothing lost.  machine crash: the file may be damaged
    synchronous=NORMAL   0.08 ms / 3.3 ms     daemon crash: nothing lost.  machine crash: loses the unsettled commits
    synchronous=FULL     0.42 ms / 7.0 ms     nothing lost; p99 of one job 1.4 to 17 ms, and that on a quick disk

Chosen: NORMAL, and settle() within a second of a commit: one fsync, 13 ms after 300 jobs. A crash, kill -9 or OOM kill
of the daemon loses nothing. A power cut or kernel panic loses at most the jobs of the last second, and never damages
the file. That is the right side of the trade: when the machine goes down, every process goes down with it, unseen, so
the last second's jobs are only a sliver of what a machine crash leaves to clean up; and FULL would put a disk's fsync,
the least predictable latency of a machine, between each death and its cleanup. The WAL is moved into the file when it
is longer than MOST_WAL_BYTES, and at the end.

The clock: times in the spool are wall clock as it was when the daemon started, carried on by CLOCK_BOOTTIME. A clock
step neither delays a retry nor eats a deadline.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cnprocd.log import Log
from cnprocd.spool import database, salvage
from cnprocd.spool.job import (
    NS,
    Attempt,
    Happening,
    Job,
    JobRequest,
    Record,
    State,
    after_interruption,
)
from cnprocd.spool.rows import Enqueued, Leftover, Match, Rows
from cnprocd.spool.store import Store

FILE_NAME = "spool.sqlite3"
PRUNE_EVERY = 500
SHED_EVERY_S = 5
MOST_WAL_BYTES = 4 << 20

T = TypeVar("T")


class SteadyClock:
    """Wall clock nanoseconds that no clock step moves: the wall clock of our start plus CLOCK_BOOTTIME since."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def __call__(self) -> int:
        return self._offset_ns + time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Keep:
    """How much the spool holds: waiting jobs, and history by count and age."""

    queue_limit: int = 10_000
    history_count: int = 10_000
    history_age_s: float = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Counts:
    """The spool at a glance, for `status`."""

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
    """Jobs from match to history. `durable` is False while they live in memory only, and then `why` is a sentence."""

    def __init__(self, path: Path, *, log: Log, keep: Keep, clock: Callable[[], int], boot_id: str) -> None:
        self.path = path
        self.keep = keep
        self.clock = clock
        self.boot_id = boot_id
        self.durable = True
        self.why: str | None = None
        self.duplicates = 0
        self.shed = 0
        self.unsettled = False
        self._since_prune = 0
        self._shed_untold = 0
        self._shed_told_ns: int | None = None
        self._log = log
        self._store = self._open()

    @classmethod
    def open(
        cls, state_dir: Path, *, log: Log, keep: Keep | None = None, clock: Callable[[], int] | None = None
    ) -> Spool:
        """Open the spool of a state directory. Never fails: what is wrong with the disk is logged and in `why`."""
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(state_dir / FILE_NAME, log=log, keep=keep or Keep(), clock=clock or SteadyClock(), boot_id=boot_id)

    def close(self) -> None:
        """Settle and let go of the file. SQLite moves the WAL into it as the last connection closes."""
        self.settle()
        with contextlib.suppress(sqlite3.Error):
            self._store.close()

    # -- the pipeline's side -------------------------------------------------------------------------------------

    def enqueue(self, requests: Sequence[JobRequest]) -> Enqueued:
        """Take in a batch in one commit. Shed jobs are counted, and logged here, loudly."""
        limit = self.keep.queue_limit
        result = self._write(
            lambda store: store.enqueue(requests, boot_id=self.boot_id, now_ns=self.clock(), queue_limit=limit)
        )
        self.duplicates += result.duplicates
        self.shed += result.shed
        self._shed_untold += result.shed
        self._tell_shed()
        return result

    def _tell_shed(self) -> None:
        """At once, and then every few seconds while it goes on: a storm must not become a storm of records."""
        now_ns = self.clock()
        if self._shed_untold and (self._shed_told_ns is None or now_ns - self._shed_told_ns >= SHED_EVERY_S * NS):
            limit = self.keep.queue_limit
            self._log("error", "queue_full", shed=self._shed_untold, shed_in_all=self.shed, limit=limit)
            self._shed_untold, self._shed_told_ns = 0, now_ns

    def record_matches(self, matches: Sequence[Match]) -> None:
        """Remember matches for `cnprocctl history`."""
        self._since_prune += len(matches)
        self._write(lambda store: store.add_matches(matches))

    def matches(
        self, *, rule: str | None = None, comm: str | None = None, since_ns: int = 0, limit: int = 100
    ) -> list[Match]:
        """Past matches, newest first."""
        return self._do(lambda store: store.matches(rule, comm, since_ns, limit))

    # -- the runner's side ---------------------------------------------------------------------------------------

    def due(
        self,
        limit: int,
        *,
        after_id: int = 0,
        skip_rules: Sequence[str] = (),
        skip_keys: Sequence[str] = (),
        skip_jobs: Sequence[int] = (),
    ) -> list[Job]:
        """The oldest jobs that may start now; `skip_*` name what is busy."""
        now_ns = self.clock()
        return self._do(
            lambda store: store.due(
                now_ns, limit, after_id=after_id, skip_rules=skip_rules, skip_keys=skip_keys, skip_jobs=skip_jobs
            )
        )

    def events(self, job_id: int) -> tuple[Record, ...]:
        """The events of a job; none when a record cannot be read."""
        return self._do(lambda store: store.events(job_id))

    def next_due_in_s(self) -> float | None:
        """How long until a job that waits for its time comes due; None when there is none."""
        now_ns = self.clock()
        due_ns = self._do(lambda store: store.next_due_ns(now_ns))
        return None if due_ns is None else (due_ns - now_ns) / NS

    def start(self, job_id: int, attempt_id: str) -> None:
        """Before the fork."""
        now_ns = self.clock()
        self._write(lambda store: store.start(job_id, attempt_id, self.boot_id, now_ns))

    def launched(self, job_id: int, hook_pid: int, hook_start_ticks: int | None, latency_ms: float | None) -> None:
        """After the exec."""
        self._write(lambda store: store.launched(job_id, hook_pid, hook_start_ticks, latency_ms))

    def finish(self, job_id: int, attempt: Attempt) -> None:
        """The hook succeeded: the job is done."""
        self._since_prune += 1
        now_ns = self.clock()
        self._write(lambda store: store.end(job_id, State.DONE, attempt, now_ns, None))

    def retry(self, job_id: int, attempt: Attempt, due_ns: int) -> None:
        """The hook failed and will be tried again at `due_ns`."""
        self._write(lambda store: store.retry(job_id, attempt, due_ns))

    def bury(self, job_id: int, attempt: Attempt, reason: str) -> None:
        """The job has failed for good: a dead letter."""
        self._since_prune += 1
        now_ns = self.clock()
        self._write(lambda store: store.end(job_id, State.DEAD, attempt, now_ns, reason))

    def interrupt(self, job_id: int) -> None:
        """The try was cut short by our own stop: it waits again, the attempt counted, no retry used up."""
        now_ns = self.clock()
        self._write(lambda store: store.put_back(job_id, now_ns, counts=True))

    def postpone(self, job_id: int, due_ns: int) -> None:
        """The try could not even begin for want of a process or descriptor: as if it had not been."""
        self._write(lambda store: store.put_back(job_id, due_ns, counts=False))

    def recover(self) -> list[Leftover]:
        """At start: running jobs wait again (or are dead, if too often interrupted). Their hooks may still be alive."""
        found = self._do(lambda store: store.leftovers())
        for leftover in found:
            job = leftover.job
            following = after_interruption(job, self.clock())
            if following.happening is Happening.GAVE_UP:
                assert following.reason is not None
                self.bury(job.job_id, Attempt(following.reason), following.reason)
                self._log("error", "job_dead", job_id=job.job_id, rule=job.rule, reason=following.reason)
            else:
                self.interrupt(job.job_id)
        return found

    # -- looking and deciding by hand ----------------------------------------------------------------------------

    def counts(self) -> Counts:
        """How many jobs are in each state, and whether they would survive us."""
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
        """The newest job there has ever been."""
        return self._do(lambda store: store.last_job_id())

    def jobs(self, *, state: State | None = None, rule: str | None = None, limit: int = 100) -> list[Job]:
        """Jobs, newest first, without their events."""
        return self._do(lambda store: store.jobs(state, rule, limit))

    def job(self, job_id: int) -> Job | None:
        """One job with its events."""
        return self._do(lambda store: store.job(job_id))

    def revive(self, job_id: int) -> bool:
        """`cnprocctl jobs retry`: a dead job waits again. Call the runner's wake() after."""
        return self._write(lambda store: store.revive(job_id, self.clock()))

    def drop(self, job_id: int) -> bool:
        """`cnprocctl jobs drop`: a waiting job will not run."""
        return self._write(lambda store: store.drop(job_id, self.clock()))

    # -- upkeep --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Make every commit so far survive a power cut. The runner calls it within a second of a commit."""
        if self._since_prune >= PRUNE_EVERY:
            self.prune()
        self._tell_shed()
        if self.durable and self.unsettled:
            self._do(lambda store: store.settle())
            if salvage.size_of_wal(self.path) > MOST_WAL_BYTES:
                self._do(lambda store: store.checkpoint())
        self.unsettled = False

    def prune(self) -> int:
        """Forget history beyond `keep`."""
        self._since_prune = 0
        older_than_ns = self.clock() - int(self.keep.history_age_s * NS)
        return self._write(lambda store: store.prune(keep=self.keep.history_count, older_than_ns=older_than_ns))

    def try_durable(self) -> bool:
        """Move back to the disk if it can be used again."""
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
        self.durable, self.why, self.unsettled = True, None, True
        self._log("notice", "spool_durable", path=str(self.path))
        return True

    # -- when the disk fails -------------------------------------------------------------------------------------

    def _do(self, work: Callable[[Store], T]) -> T:
        try:
            return work(self._store)
        except salvage.FAILURES as error:
            if not self.durable:
                raise
            self._move(error)
            return work(self._store)

    def _write(self, work: Callable[[Store], T]) -> T:
        self.unsettled = True
        return self._do(work)

    def _open(self) -> Store:
        try:
            return self._file()
        except (sqlite3.Error, OSError) as error:
            store = self._memory(error)
            # A file that is locked belongs to whoever holds it; a file that we only cannot write is still our work.
            busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            self._carry(Rows([], [], [], 0) if busy else salvage.copied(self.path), store)
            return store

    def _file(self) -> Store:
        """The file's store; a damaged file is moved aside first, and what can be read of it carried over."""
        try:
            return salvage.private_file(self.path)
        except sqlite3.DatabaseError as error:
            if not salvage.is_damage(error):
                raise
            live = salvage.salvaged(self.path)
            self._move_aside(error)
            store = salvage.private_file(self.path)
            self._carry(live, store)
            return store

    def _memory(self, error: Exception) -> Store:
        self.durable, self.why = False, salvage.sentence(error)
        self._log("error", "spool_not_durable", path=str(self.path), reason=self.why)
        return Store(database.in_memory())

    def _move(self, error: Exception) -> None:
        """The file failed under us: carry what lives to a new file, or to memory."""
        old = self._store
        live = Rows([], [], [], 0)
        with contextlib.suppress(*salvage.FAILURES):
            live = old.rows(*salvage.LIVE)
        with contextlib.suppress(sqlite3.Error):
            old.close()
        if salvage.is_damage(error):
            live = live if live.jobs else salvage.salvaged(self.path)
            try:
                self._move_aside(error)
                self._store = salvage.private_file(self.path)
            except (sqlite3.Error, OSError) as second:
                self._store = self._memory(second)
        else:
            self._store = self._memory(error)
        self._carry(live, self._store)

    def _carry(self, live: Rows, store: Store) -> None:
        try:
            store.adopt(live)
            if live.last_job_id == 0:
                salvage.with_new_ids(store)
        except sqlite3.Error as error:
            self._log("error", "spool_moved", durable=self.durable, carried=0, reason=salvage.sentence(error))
        else:
            self._log("warning", "spool_moved", durable=self.durable, carried=len(live.jobs))

    def _move_aside(self, error: Exception) -> None:
        aside = salvage.move_aside(self.path)
        self._log("error", "spool_damaged", path=str(self.path), kept_as=str(aside), reason=salvage.sentence(error))
