"""All SQL on the spool. A Store is one database, in a file or in memory.

Each public method that writes is one transaction, so a crash leaves all of it or nothing. sqlite3.Error is handled by
spool.py, which moves the jobs to another store. job.py lists which method changes which state.

A job has one event, or several if they were gathered. An event's key is unique for as long as history lasts.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cnprocd.json_value import JsonObject
from cnprocd.launch.request import AttemptResult
from cnprocd.spool import copies, history, queues
from cnprocd.spool.aging import find_old
from cnprocd.spool.changes import EventRange, Row
from cnprocd.spool.disk_messages import Ended, Page
from cnprocd.spool.job import NS, Job, JobRequest, State
from cnprocd.spool.rows import (
    ClockReading,
    CountFilter,
    Enqueued,
    Leftover,
    MatchCount,
    MatchFilter,
    NotInHistoryError,
    PastMatch,
    Rows,
    RuleQueue,
)


class Store:
    """One database. Every method that writes is one transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.waiting = self._count(State.WAITING)
        self.last_event_id = 0  # of the events that were added by enqueue()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        before = self.waiting
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            self.waiting = before
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _count(self, state: State) -> int:
        row = self._db.execute("SELECT count(*) FROM jobs WHERE state = ?", (state,)).fetchone()
        return int(row[0])

    # -- jobs in--------------------------------------------------------------------------------------------------

    def enqueue(self, requests: Sequence[JobRequest], *, boot_id: str, now_ns: int, queue_limit: int) -> Enqueued:
        """Add a batch in one commit. Skip known keys. Above `queue_limit`, drop jobs as queues.py describes."""
        job_ids: list[int | None] = []
        duplicates = 0
        with self._transaction() as db:
            room = queues.Room(db, now_ns)
            for request in requests:
                known = db.execute("SELECT 1 FROM events WHERE key = ?", (request.key,)).fetchone() is not None
                job_id = None if known else self._gathered(db, request, now_ns)
                full = not known and job_id is None and self.waiting >= queue_limit
                duplicates += known
                if known or (full and not room.make(request.rule)):
                    job_ids.append(None)
                    continue
                self.waiting -= full
                if job_id is None:
                    job_id = self._new_job(db, request, boot_id, now_ns)
                record = json.dumps(request.event, separators=(",", ":"))
                cursor = db.execute(
                    "INSERT INTO events(key, job_id, record) VALUES (?, ?, ?)", (request.key, job_id, record)
                )
                self.last_event_id = cursor.lastrowid or 0
                job_ids.append(job_id)
        return Enqueued(tuple(job_ids), duplicates, room.shed, tuple(room.dropped), now_ns, self.waiting)

    def _gathered(self, db: sqlite3.Connection, request: JobRequest, now_ns: int) -> int | None:
        """Return the job that gathers events for this request's key, with one event more; due at once if it is full."""
        if request.gather is None:
            return None
        row = db.execute(
            "UPDATE jobs SET event_count = event_count + 1,"
            " due_ns = CASE WHEN event_count + 1 >= ? THEN min(due_ns, ?) ELSE due_ns END"
            " WHERE job_id = (SELECT max(job_id) FROM jobs WHERE gather_key = ? AND state = 'waiting')"
            " AND attempts = 0 AND event_count < ? RETURNING job_id",
            (request.gather.max, now_ns, request.gather.key, request.gather.max),
        ).fetchone()
        return None if row is None else int(row[0])

    def _new_job(self, db: sqlite3.Connection, request: JobRequest, boot_id: str, now_ns: int) -> int:
        gather = request.gather
        # With max 1 there is nothing to gather: the job is due at once.
        window_ns = 0 if gather is None or gather.max <= 1 else int(gather.window_s * NS)
        cursor = db.execute(
            "INSERT INTO jobs(rule, state, serialize_key, gather_key, kernel_time_ns, boot_id, created_ns, due_ns,"
            " snapshot, event_count) VALUES (?, 'waiting', ?, ?, ?, ?, ?, ?, ?, 1)",
            (
                request.rule,
                request.serialize_key,
                None if gather is None else gather.key,
                request.kernel_time_ns,
                boot_id,
                request.created_ns or now_ns,
                now_ns + window_ns,
                request.snapshot,
            ),
        )
        self.waiting += 1
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    # -- the scheduler's calls ------------------------------------------------------------------------------------

    def due(
        self,
        now_ns: int,
        limit: int,
        *,
        rule: str | None = None,
        after_id: int = 0,
        key: str | None = None,
        skip_keys: Sequence[str] = (),
        skip_jobs: Sequence[int] = (),
    ) -> list[Job]:
        """Return the oldest jobs of a rule, or of all rules, that may start now, without their events.

        `key`: only those with this serialize key.
        """
        index, of_rule = ("waiting", "") if rule is None else ("queues", " AND rule = ?")
        of_key = "" if key is None else " AND serialize_key = ?"
        rows = self._db.execute(
            f"SELECT {copies.JOB} FROM jobs INDEXED BY {index} WHERE state = 'waiting'{of_rule}{of_key}"  # noqa: S608
            f" AND job_id > ? AND due_ns <= ? AND job_id NOT IN ({copies.marks(skip_jobs)})"
            f" AND (serialize_key IS NULL OR serialize_key NOT IN ({copies.marks(skip_keys)}))"
            " ORDER BY job_id LIMIT ?",
            (*(one for one in (rule, key) if one is not None), after_id, now_ns, *skip_jobs, *skip_keys, limit),
        )
        found = [_job(row) for row in rows]
        # SQLite takes the state from the index. If the index is damaged, a job that is done would be returned for ever.
        if any(job.state is not State.WAITING for job in found):
            raise sqlite3.DatabaseError("the index of waiting jobs contains one that is not waiting")
        return found

    def waiting_rules(self) -> dict[str, int]:
        return queues.waiting_rules(self._db)

    def queues(self, now_ns: int) -> dict[str, RuleQueue]:
        return queues.queues(self._db, now_ns)

    def next_due_ns(self, after_ns: int) -> int | None:
        """Return when the first job is due that is due after a moment, or None."""
        row = self._db.execute(
            "SELECT min(due_ns) FROM jobs WHERE state = 'waiting' AND due_ns > ?", (after_ns,)
        ).fetchone()
        return None if row[0] is None else int(row[0])

    def start(self, job_id: int, attempt_id: str, boot_id: str) -> None:
        """Mark a waiting job as running, before the fork: the attempt is counted, and its id is stored."""
        with self._transaction() as db:
            cursor = db.execute(
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, attempt_id = ?, attempt_boot_id = ?,"
                " hook_pid = NULL, hook_start_ticks = NULL WHERE job_id = ? AND state = 'waiting'",
                (attempt_id, boot_id, job_id),
            )
            self.waiting -= cursor.rowcount

    def launched(self, job_id: int, hook_pid: int, hook_start_ticks: int | None, latency_ms: float | None) -> None:
        """Store the hook's PID, start time and latency, after the exec."""
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET hook_pid = ?, hook_start_ticks = ?, latency_ms = coalesce(latency_ms, ?)"
                " WHERE job_id = ? AND state = 'running'",
                (hook_pid, hook_start_ticks, latency_ms, job_id),
            )

    def end(self, job_id: int, state: State, result: AttemptResult, now_ns: int, reason: str | None) -> None:
        """Mark a job as done or dead."""
        with self._transaction() as db:
            waited = db.execute("SELECT 1 FROM jobs WHERE job_id = ? AND state = 'waiting'", (job_id,)).fetchone()
            db.execute(
                "UPDATE jobs SET state = ?, failures = failures + ?, finished_ns = ?, exit_code = ?, signal = ?,"
                " reason = ?, duration_ms = ? WHERE job_id = ? AND state IN ('waiting', 'running')",
                (state, result.reason is not None, now_ns, *_status(result), reason, result.duration_ms, job_id),
            )
            self.waiting -= waited is not None

    def retry(self, job_id: int, result: AttemptResult, due_ns: int, spent_ns: int) -> None:
        """Let a running job wait for its next attempt: this one failed."""
        with self._transaction() as db:
            cursor = db.execute(
                "UPDATE jobs SET state = 'waiting', failures = failures + 1, due_ns = ?, spent_ns = ?, exit_code = ?,"
                " signal = ?, reason = ?, duration_ms = ? WHERE job_id = ? AND state = 'running'",
                (due_ns, spent_ns, *_status(result), result.reason, result.duration_ms, job_id),
            )
            self.waiting += cursor.rowcount

    def put_back(self, job_id: int, due_ns: int, *, interrupted: bool) -> None:
        """Let a running job wait again without a failure. An attempt that was not interrupted is not counted at all."""
        with self._transaction() as db:
            cursor = db.execute(
                "UPDATE jobs SET state = 'waiting', due_ns = ?1, attempts = attempts - ?2,"
                " interruptions = interruptions + ?3 WHERE job_id = ?4 AND state = 'running'",
                (due_ns, not interrupted, interrupted, job_id),
            )
            self.waiting += cursor.rowcount

    def leftovers(self) -> list[Leftover]:
        """Return the jobs that are marked as running."""
        rows = self._db.execute(
            f"SELECT {copies.JOB}, attempt_id, attempt_boot_id, hook_pid, hook_start_ticks"  # noqa: S608
            " FROM jobs WHERE state = 'running' ORDER BY job_id"
        )
        return [Leftover(_job(row[:-4]), *row[-4:]) for row in rows]

    def snapshots(self, limit: int) -> list[str]:
        """Return the digests of rules that jobs refer to which may still run: see copies.needed_snapshots()."""
        return copies.needed_snapshots(self._db, limit)

    # -- control ---------------------------------------------------------------------------------------------

    def counts(self) -> dict[State, int]:
        # By the indexes alone: 0.6 ms for 10,000 jobs. A scan of all jobs, sorted by state, takes 2.4 ms.
        rows = self._db.execute(
            "SELECT 'waiting', count(*) FROM jobs INDEXED BY waiting WHERE state = 'waiting'"
            " UNION ALL SELECT 'running', count(*) FROM jobs INDEXED BY running WHERE state = 'running'"
            " UNION ALL SELECT state, count(*) FROM jobs INDEXED BY ended WHERE state IN ('done', 'dead')"
            " GROUP BY state"
        )
        found = {State(state): int(count) for state, count in rows}
        return {state: found.get(state, 0) for state in State}

    def oldest_waiting_ns(self) -> int | None:
        row = self._db.execute(
            "SELECT created_ns FROM jobs INDEXED BY waiting WHERE state = 'waiting' ORDER BY job_id LIMIT 1"
        ).fetchone()
        return None if row is None else int(row[0])

    def last_job_id(self) -> int:
        return copies.last_job_id(self._db)

    def jobs(self, state: State | None, rule: str | None, limit: int, before: int = 0) -> list[Job]:
        """Return the newest jobs before the job `before`, if it is not 0, without their events. `rule` is a glob."""
        rows = self._db.execute(
            f"SELECT {copies.JOB} FROM jobs WHERE (?1 IS NULL OR state = ?1) AND (?2 IS NULL OR rule GLOB ?2)"  # noqa: S608
            " AND (?4 = 0 OR job_id < ?4) ORDER BY job_id DESC LIMIT ?3",
            (state, None if rule is None else history.glob(rule), limit, before),
        )
        return [_job(row) for row in rows]

    def job(self, job_id: int) -> Job | None:
        """Return one job with its events, or with () if one of them cannot be read."""
        row = self._db.execute(f"SELECT {copies.JOB} FROM jobs WHERE job_id = ?", (job_id,)).fetchone()  # noqa: S608
        if row is None:
            return None
        return _job(row, self.events(job_id))

    def events(self, job_id: int) -> tuple[JsonObject, ...]:
        """Return the events of a job, or () if one of them cannot be read."""
        texts = self._db.execute("SELECT record FROM events WHERE job_id = ? ORDER BY event_id", (job_id,))
        records = [history.record_of(text) for (text,) in texts]
        found = tuple(record for record in records if record is not None)
        return found if len(found) == len(records) else ()

    def revive(self, job_id: int | None, rule: str | None, now_ns: int) -> list[int]:
        """Let dead jobs wait again, with all their retries: one job, those of the rules that match a glob, or all.

        Return the jobs.
        """
        with self._transaction() as db:
            rows = db.execute(
                "UPDATE jobs SET state = 'waiting', due_ns = ?1, failures = 0, spent_ns = 0, interruptions = 0,"
                " finished_ns = NULL, gather_key = NULL WHERE state = 'dead' AND (?2 IS NULL OR job_id = ?2)"
                " AND (?3 IS NULL OR rule GLOB ?3) RETURNING job_id",
                (now_ns, job_id, None if rule is None else history.glob(rule)),
            ).fetchall()
            self.waiting += len(rows)
            return sorted(found for (found,) in rows)

    def drop(self, job_id: int | None, rule: str | None, now_ns: int, most: int) -> list[int]:
        """Mark at most so many waiting jobs as dead: this one, or those of this rule, a glob. Return the jobs."""
        with self._transaction() as db:
            rows = db.execute(
                "UPDATE jobs SET state = 'dead', finished_ns = ?1, reason = 'dropped by an operator' WHERE job_id IN"
                " (SELECT job_id FROM jobs WHERE state = 'waiting' AND (?2 IS NULL OR job_id = ?2)"
                " AND (?3 IS NULL OR rule GLOB ?3) LIMIT ?4) RETURNING job_id",
                (now_ns, job_id, None if rule is None else history.glob(rule), most),
            ).fetchall()
            self.waiting -= len(rows)
            return sorted(found for (found,) in rows)

    # -- history -------------------------------------------------------------------------------------------------

    def matches(self, wanted: MatchFilter) -> list[PastMatch]:
        """Return past matches. Raises NotInHistoryError."""
        page = history.find_matches(self._db, wanted, 0, wanted.limit)
        if not page.knows_after:
            raise NotInHistoryError(wanted.after or wanted.before)
        return list(page.matches)

    def page_of_matches(self, wanted: MatchFilter, following: int, most: int, most_bytes: int) -> Page:
        return history.find_matches(self._db, wanted, following, most, most_bytes)

    def count_matches(self, wanted: CountFilter) -> tuple[MatchCount, ...]:
        return history.count_matches(self._db, wanted)

    def output(self, job_id: int) -> str | None:
        return history.find_output(self._db, job_id)

    def prune(self, *, keep: int, older_than_ns: int, clock: ClockReading) -> int:
        """Delete done jobs, dead jobs and matches beyond `keep` of each, or older. Return the number of rows.

        Age is the time for which the machine ran (aging.py). A job that ended late is younger than its id.
        """
        gone = 0
        with self._transaction() as db:
            old = find_old(db, clock.now_ns - older_than_ns, clock)
            for state in (State.DONE, State.DEAD):
                ended = db.execute(
                    "DELETE FROM jobs WHERE state = ?1 AND ((job_id <= ?3 AND finished_ns NOT BETWEEN ?4 AND ?5)"
                    " OR job_id IN (SELECT job_id FROM jobs WHERE state = ?1"
                    " ORDER BY finished_ns DESC LIMIT -1 OFFSET ?2))"
                    " RETURNING job_id",
                    (state, keep, old.job_id, older_than_ns, clock.now_ns),
                ).fetchall()
                db.executemany("DELETE FROM events WHERE job_id = ?", ended)
                gone += len(ended)
            gone += history.prune_matches(db, keep=keep, old=old.row_id)
            history.prune_outputs(db)
        return gone

    # -- files and copies----------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Move the pages of the WAL to their places in the file, and empty the WAL: two fsyncs, one write a page."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def skip_ids(self, last: int) -> None:
        """Let the next job id be above `last`."""
        with self._transaction() as db:
            copies.skip_ids(db, last)

    def rows(self, *states: State) -> Rows:
        """Return the jobs in `states` with their events."""
        return copies.read_rows(self._db, states)

    def rows_of(self, job_ids: Iterable[int], events: Iterable[EventRange]) -> Rows:
        """Return jobs as they are now, and the events in the ranges."""
        return copies.rows_of(self._db, job_ids, events)

    def dead_rows(self, job_id: int | None, rule: str | None) -> Rows:
        """Return dead jobs with their events: one job, those of the rules that match a glob, or all."""
        return copies.dead_rows(self._db, job_id, rule)

    def ended_keys(self, limit: int) -> tuple[str, ...]:
        """Return the newest keys of events whose job has ended."""
        return copies.ended_keys(self._db, limit)

    def write(self, rows: Rows, ended: Iterable[Ended], gone_rules: Iterable[str]) -> None:
        """Store rows of the memory in this file."""
        with self._transaction() as db:
            copies.put(db, rows)
            copies.put_ended(db, ended)
            history.put_hits(db, {}, gone_rules)

    def merge(self, memory: Rows, ended: Iterable[Ended]) -> copies.Merged:
        """Make this file equal to the memory, plus the jobs that only the file has."""
        with self._transaction() as db:
            merged = copies.merge(db, memory, ended)
        self.waiting = self._count(State.WAITING)
        return merged

    def take_in(self, rows: Rows, keys: Iterable[str] = (), superseded: Iterable[int] = ()) -> tuple[int, ...]:
        """Add jobs of the file to this memory, and remove waiting ones that need not run. Return those left out."""
        with self._transaction() as db:
            left_out = copies.take_in(db, rows, keys)
            db.executemany("DELETE FROM jobs WHERE job_id = ? AND state = 'waiting'", [(one,) for one in superseded])
        self.waiting = self._count(State.WAITING)
        return left_out

    def put_clock(self, clock: ClockReading | None) -> None:
        """Note of which clock the times in this file are, and what time it is."""
        with self._transaction() as db:
            copies.put_clock(db, clock)

    def forget_ended(self, keep: int, older_than_ns: int, most_keys: int) -> list[Ended]:
        """Delete ended jobs beyond the newest `keep` of each state, or older, from this memory. Return tombstones."""
        with self._transaction() as db:
            return copies.forget_ended(db, keep, older_than_ns, most_keys)

    def replace_matches(self, rows: Iterable[Row]) -> None:
        """Keep these matches instead of the former ones."""
        with self._transaction() as db:
            history.replace_matches(db, rows)


def _status(result: AttemptResult) -> tuple[int | None, int | None]:
    return result.exit_code, result.signal


def _job(row: tuple[Any, ...], events: tuple[JsonObject, ...] = ()) -> Job:
    job = Job(*row)
    return replace(job, state=State(job.state), events=events)
