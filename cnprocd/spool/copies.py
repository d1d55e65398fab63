"""SQL on rows that go from one database of the spool to another. store.py makes the transactions.

The store in memory is the original of every job that it has; the file follows. Jobs of the file that the memory does
not have are of an earlier daemon, or of one that ran while this one could not use the file.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from cnprocd.spool import history
from cnprocd.spool.changes import EventRange, Row
from cnprocd.spool.disk_messages import Ended
from cnprocd.spool.job import State
from cnprocd.spool.rows import ClockReading, Rows, due_again_ns

JOB = """job_id, rule, state, serialize_key, kernel_time_ns, boot_id, created_ns, due_ns, attempts, failures,
    event_count, spent_ns, interruptions, gather_key, finished_ns, exit_code, signal, reason, duration_ms, latency_ms,
    snapshot"""
ALL_JOB_COLUMNS = f"{JOB}, attempt_id, attempt_boot_id, hook_pid, hook_start_ticks"
LIVE = (State.WAITING, State.RUNNING)
_CREATED, _DUE, _EVENT_COUNT = 6, 7, 10  # the places of these columns in a row of jobs


class Merged(NamedTuple):
    """The live jobs of the file that were not in memory, and the waiting jobs of the memory that need not run."""

    foreign: Rows
    superseded: tuple[int, ...]


def marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


# -- reading -----------------------------------------------------------------------------------------------------


def read_rows(db: sqlite3.Connection, states: Sequence[State], *, damaged: bool = False) -> Rows:
    """Return the jobs in `states` with their events. From a `damaged` database: the rows that can be read."""

    def read(query: str, *values: object, wanted: Container[object] | None = None) -> list[Row]:
        rows: list[Row] = []
        with contextlib.suppress(*([sqlite3.Error] if damaged else [])):
            # extend() keeps the rows before an error
            rows.extend(row for row in db.execute(query, values) if wanted is None or row[0] in wanted)
        return rows

    # "+state": by the table, not by an index that may be damaged.
    jobs = read(f"SELECT {ALL_JOB_COLUMNS} FROM jobs WHERE +state IN ({marks(states)}) ORDER BY job_id", *states)  # noqa: S608
    if damaged:
        jobs = [row for row in jobs if _is_sound(row)]
    events = read("SELECT job_id, key, record FROM events ORDER BY event_id", wanted={row[0] for row in jobs})
    (last,) = next(iter(read("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'")), (0,))
    clock = None
    with contextlib.suppress(*([sqlite3.Error] if damaged else [])):
        clock = clock_of(db)
    return Rows(jobs, events, last_job_id=last, clock=clock)


def _is_sound(row: Row) -> bool:
    """Whether a row of a damaged table can be a job."""
    job_id, rule, state, _, _, boot_id, created_ns, due_ns, attempts, failures, event_count = row[:11]
    numbers = (job_id, created_ns, due_ns, attempts, failures, event_count)
    return (
        all(isinstance(number, int) for number in numbers)
        and all(isinstance(text, str) for text in (rule, boot_id))
        and state in set(State)
    )


def rows_of(db: sqlite3.Connection, job_ids: Iterable[int], events: Iterable[EventRange]) -> Rows:
    """Return jobs as they are now, and the events in the ranges. Jobs that are gone are left out."""
    query = f"SELECT {ALL_JOB_COLUMNS} FROM jobs WHERE job_id = ?"  # noqa: S608
    jobs = [row for job_id in job_ids for row in db.execute(query, (job_id,))]
    found = [
        row
        for between in events
        for row in db.execute(
            "SELECT job_id, key, record FROM events WHERE event_id > ? AND event_id <= ? AND job_id > 0", between
        )
    ]
    return Rows(jobs, found)


def dead_rows(db: sqlite3.Connection, job_id: int | None, rule: str | None) -> Rows:
    """Return dead jobs with their events: one job, those of the rules that match a glob, or all."""
    jobs = db.execute(
        f"SELECT {ALL_JOB_COLUMNS} FROM jobs WHERE state = 'dead' AND (?1 IS NULL OR job_id = ?1)"  # noqa: S608
        " AND (?2 IS NULL OR rule GLOB ?2) ORDER BY job_id",
        (job_id, None if rule is None else history.glob(rule)),
    ).fetchall()
    query = "SELECT job_id, key, record FROM events WHERE job_id = ? ORDER BY event_id"
    return Rows(jobs, [event for row in jobs for event in db.execute(query, row[:1])])


def ended_keys(db: sqlite3.Connection, limit: int) -> tuple[str, ...]:
    """Return the newest keys of events whose job has ended."""
    rows = db.execute(
        "SELECT key FROM events JOIN jobs USING (job_id) WHERE +state IN ('done', 'dead')"
        " ORDER BY event_id DESC LIMIT ?",
        (limit,),
    )
    return tuple(key for (key,) in rows)


def needed_snapshots(db: sqlite3.Connection, limit: int) -> list[str]:
    """Return the digests of rules that jobs refer to which may still run: those of dead jobs last, the newest first."""
    query = (
        "SELECT snapshot FROM jobs WHERE state != 'done' GROUP BY snapshot"
        " ORDER BY min(state = 'dead'), max(job_id) DESC LIMIT ?"
    )
    return [str(row[0]) for row in db.execute(query, (limit,)) if row[0]]


# -- memory to file ----------------------------------------------------------------------------------------------


def put(db: sqlite3.Connection, rows: Rows) -> None:
    """Store rows of the memory. They are newer than the rows of the same jobs here."""
    columns = marks(ALL_JOB_COLUMNS.split(","))
    db.executemany(f"INSERT OR REPLACE INTO jobs({ALL_JOB_COLUMNS}) VALUES ({columns})", rows.jobs)  # noqa: S608
    # An event that was seen again while the file was opened may be another job's here.
    db.executemany(
        "INSERT INTO events(job_id, key, record) VALUES (?, ?, ?) ON CONFLICT(key) DO UPDATE"
        " SET job_id = excluded.job_id, record = excluded.record WHERE job_id != excluded.job_id",
        rows.events,
    )
    history.put_matches(db, rows.matches)
    for job_id, output in rows.outputs:
        history.put_output(db, job_id, output)
    db.executemany("INSERT OR REPLACE INTO hits(rule, count, last_ns) VALUES (?, ?, ?)", rows.hits)
    put_clock(db, rows.clock)


def clock_of(db: sqlite3.Connection) -> ClockReading | None:
    """Return of which clock the times in this file are, as it was at the last write; None if it is damaged."""
    row = db.execute("SELECT boot_id, offset_ns, now_ns FROM clock").fetchone()
    sound = row is not None and isinstance(row[0], str) and all(isinstance(number, int) for number in row[1:])
    return ClockReading(*row) if sound else None


def put_clock(db: sqlite3.Connection, clock: ClockReading | None) -> None:
    """Note of which clock the times in this file are, and what time it is."""
    if clock is not None:
        query = "INSERT OR REPLACE INTO clock(id, boot_id, offset_ns, now_ns) VALUES (1, ?, ?, ?)"
        db.execute(query, (clock.boot_id, clock.offset_ns, clock.now_ns))


def in_time_of(rows: Rows, clock: ClockReading | None) -> Rows:
    """Return rows that are of the clock of an earlier daemon so that they are due by this clock."""
    if clock is None:
        return rows
    jobs = [(*row[:_DUE], due_again_ns(row[_DUE], rows.clock, clock), *row[_DUE + 1 :]) for row in rows.jobs]
    return replace(rows, jobs=jobs, clock=clock)


def put_ended(db: sqlite3.Connection, ended: Iterable[Ended]) -> None:
    """End jobs of which only the tombstone is left in memory."""
    db.executemany(
        "UPDATE jobs SET state = ?, finished_ns = ?, reason = coalesce(reason, 'ended while the disk had failed')"
        " WHERE job_id = ? AND created_ns = ? AND state IN ('waiting', 'running')",
        [(one.state, one.finished_ns, one.job_id, one.created_ns) for one in ended],
    )


def merge(db: sqlite3.Connection, memory: Rows, ended: Iterable[Ended]) -> Merged:
    """Make the file equal to the memory, plus the jobs that only the file has."""
    mine = {int(row[0]): row for row in memory.jobs}
    _due_by(db, memory.clock)
    _renumber_others(db, mine, memory.last_job_id)
    put_ended(db, ended)
    superseded = _one_job_for_an_event(db, memory, mine)
    jobs = [row for row in memory.jobs if row[0] not in superseded]
    events = [row for row in memory.events if row[0] not in superseded]
    put(db, replace(memory, jobs=jobs, events=events))
    db.execute("DELETE FROM jobs WHERE state = 'waiting' AND job_id NOT IN (SELECT job_id FROM events)")
    skip_ids(db, max(memory.last_job_id, last_job_id(db)))
    foreign = read_rows(db, LIVE)
    hits = db.execute("SELECT rule, count, last_ns FROM hits").fetchall()
    jobs = [row for row in foreign.jobs if row[0] not in mine]
    events = [row for row in foreign.events if row[0] not in mine]
    return Merged(replace(foreign, jobs=jobs, events=events, hits=hits), superseded)


def _due_by(db: sqlite3.Connection, clock: ClockReading | None) -> None:
    """Let the waiting jobs of this file be due by this clock: their times are of that of an earlier daemon.

    A job that has not failed and gathers no events is due now: what its attempt lacked may be there again.
    """
    if clock is not None:
        theirs = clock_of(db)
        # What is due by both clocks stays as it is: each row costs three indexes, and there may be 10,000.
        now_ns = clock.now_ns if theirs is None else min(clock.now_ns, theirs.now_ns)
        query = "SELECT due_ns, job_id FROM jobs WHERE state = 'waiting' AND due_ns > ?"
        rows = db.execute(query, (now_ns,)).fetchall()
        times = [(due_again_ns(due_ns, theirs, clock), job_id) for due_ns, job_id in rows]
        db.executemany("UPDATE jobs SET due_ns = ? WHERE job_id = ?", times)
        db.execute(
            "UPDATE jobs SET due_ns = ?1 WHERE state = 'waiting' AND failures = 0 AND gather_key IS NULL"
            " AND due_ns > ?1",
            (clock.now_ns,),
        )


def _renumber_others(db: sqlite3.Connection, mine: dict[int, Row], last: int) -> None:
    """Give other jobs that have the number of a job in memory a new one: that of the memory was announced."""
    following = max(last, last_job_id(db))
    for job_id, row in mine.items():
        found = db.execute("SELECT created_ns, rule FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        if found is None or found == (row[_CREATED], row[1]):
            continue
        following += 1
        for table in ("jobs", "events", "outputs", "matches"):
            db.execute(f"UPDATE {table} SET job_id = ? WHERE job_id = ?", (following, job_id))  # noqa: S608  # constants
        skip_ids(db, following)


def _one_job_for_an_event(db: sqlite3.Connection, memory: Rows, mine: dict[int, Row]) -> tuple[int, ...]:
    """Take events that the memory handles from other jobs of the file that have not ended.

    Return the waiting jobs of the memory all of whose events the file knows as handled.
    """
    others: set[int] = set()
    handled: dict[int, int] = {}
    for job_id, key, _ in memory.events:
        found = db.execute(
            "SELECT jobs.job_id, state FROM events JOIN jobs USING (job_id) WHERE key = ? AND events.job_id != ?",
            (key, job_id),
        ).fetchone()
        if found is None:
            continue
        other, state = found
        if state in LIVE:
            db.execute("DELETE FROM events WHERE key = ?", (key,))
            db.execute("UPDATE jobs SET event_count = event_count - 1 WHERE job_id = ?", (other,))
            others.add(other)
        else:
            handled[job_id] = handled.get(job_id, 0) + 1
    for other in others:
        db.execute("DELETE FROM jobs WHERE job_id = ?1 AND ?1 NOT IN (SELECT job_id FROM events)", (other,))
    waiting = {job_id for job_id, row in mine.items() if row[2] == State.WAITING}
    return tuple(
        job_id for job_id, count in handled.items() if job_id in waiting and count == mine[job_id][_EVENT_COUNT]
    )


# -- file to memory ----------------------------------------------------------------------------------------------


def take_in(db: sqlite3.Connection, rows: Rows, keys: Iterable[str]) -> tuple[int, ...]:
    """Add jobs of the file to the memory, where they are missing, and the keys of events that are handled.

    An event can have been seen again while the file was opened. Then it has a job here as well. One that has not
    started gives way to the file's, or to what the file knows as handled. Else the file's is left out. Return those.
    """
    keys, theirs = tuple(keys), {row[0] for row in rows.jobs}
    fresh = dict(
        db.execute(
            "SELECT key, job_id FROM events JOIN jobs USING (job_id)"
            " WHERE state = 'waiting' AND attempts = 0 AND event_count = 1"
        )
    )
    again = [(fresh[key],) for key in fresh.keys() & {*keys, *(key for _, key, _ in rows.events)}]
    again = [one for one in again if one[0] not in theirs]
    db.executemany("DELETE FROM jobs WHERE job_id = ?", again)
    db.executemany("DELETE FROM events WHERE job_id = ?", again)
    held = "SELECT 1 FROM events WHERE key = ? AND job_id NOT IN (0, ?)"
    elsewhere = Counter(job for job, key, _ in rows.events if db.execute(held, (key, job)).fetchone() is not None)
    left_out = {row[0] for row in rows.jobs if elsewhere[row[0]] >= row[_EVENT_COUNT] > 0}
    jobs = [
        (*row[:_EVENT_COUNT], row[_EVENT_COUNT] - elsewhere[row[0]], *row[_EVENT_COUNT + 1 :])
        for row in rows.jobs
        if row[0] not in left_out
    ]
    columns = marks(ALL_JOB_COLUMNS.split(","))
    db.executemany(f"INSERT OR IGNORE INTO jobs({ALL_JOB_COLUMNS}) VALUES ({columns})", jobs)  # noqa: S608
    db.executemany("DELETE FROM events WHERE key = ? AND job_id = 0", [(key,) for _, key, _ in rows.events])
    db.executemany("INSERT OR IGNORE INTO events(job_id, key, record) VALUES (?, ?, ?)", rows.events)
    db.executemany("INSERT OR IGNORE INTO events(job_id, key, record) VALUES (0, ?, '')", [(key,) for key in keys])
    if rows.last_job_id > last_job_id(db):
        skip_ids(db, rows.last_job_id)
    return tuple(left_out)


def forget_ended(db: sqlite3.Connection, keep: int, older_than_ns: int, most_keys: int) -> list[Ended]:
    """Delete done and dead jobs beyond the newest `keep` of each, or older, from the memory. Return their tombstones.

    The keys of their events are kept, so that an event that is seen again is known: at most `most_keys`.
    """
    gone: list[Ended] = []
    for state in (State.DONE, State.DEAD):
        rows = db.execute(
            "DELETE FROM jobs WHERE state = ?1 AND (finished_ns < ?2 OR job_id IN (SELECT job_id FROM jobs"
            " WHERE state = ?1 ORDER BY finished_ns DESC LIMIT -1 OFFSET ?3))"
            " RETURNING job_id, created_ns, finished_ns",
            (state, older_than_ns, keep),
        ).fetchall()
        gone += [Ended(job_id, created_ns, str(state), finished_ns or 0) for job_id, created_ns, finished_ns in rows]
    db.executemany("UPDATE events SET job_id = 0, record = '' WHERE job_id = ?", [(one.job_id,) for one in gone])
    db.execute(
        "DELETE FROM events WHERE job_id = 0 AND event_id <= (SELECT event_id FROM events WHERE job_id = 0"
        " ORDER BY event_id DESC LIMIT 1 OFFSET ?)",
        (most_keys,),
    )
    return gone


# -- ids ---------------------------------------------------------------------------------------------------------


def last_job_id(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone()
    return 0 if row is None else int(row[0])


def skip_ids(db: sqlite3.Connection, last: int) -> None:
    """Let the next job id be above `last`."""
    db.execute("DELETE FROM sqlite_sequence WHERE name = 'jobs'")
    db.execute("INSERT INTO sqlite_sequence(name, seq) VALUES ('jobs', ?)", (last,))
