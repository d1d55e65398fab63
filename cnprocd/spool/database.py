"""The tables of the spool, and how its SQLite database is opened: in a file, or in memory.

Facts:
- WAL with synchronous=NORMAL: a commit is a write() to the WAL, which is in the page cache when COMMIT returns
  (sqlite.org/pragma.html#pragma_synchronous). It survives this process but not a power cut; see spool.py.
- locking_mode=EXCLUSIVE: no other process can lock the file or block a checkpoint of the WAL, and no shared memory file
  is needed. Two daemons cannot use one file. The kernel releases fcntl locks when the process ends.
- integrity_check verifies NOT NULL and CHECK constraints and that every index has exactly the rows of its table, so a
  flipped bit in a state, a number or an index is detected at open. quick_check skips the indexes: then a job missing in
  `waiting` would never run, and one listed twice would run for ever. The difference is 30 instead of 20 ms for 20,000
  jobs and 10,000 matches. A flipped bit in other text is not detected; store.py parses records with checks.
- page_size=1024: a commit writes whole pages to the WAL, about eight for a job. That is a quarter of the volume of 4096
  byte pages, and it takes no longer.
- wal_autocheckpoint=0: the two fsyncs of a checkpoint never happen inside a commit that a hook waits for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

from cnprocd.spool import aging, history

APPLICATION_ID = 0x636E7072  # "cnpr": a database of another program is renamed, not written to
SCHEMA_VERSION = 5
BUSY_TIMEOUT_S = 1.0  # the child of a daemon that was killed may be at its last commit

_SCHEMA = """
CREATE TABLE jobs(
    job_id INTEGER PRIMARY KEY AUTOINCREMENT,
    rule TEXT NOT NULL, state TEXT NOT NULL, serialize_key TEXT, gather_key TEXT,
    kernel_time_ns INTEGER, boot_id TEXT NOT NULL, created_ns INTEGER NOT NULL, due_ns INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, event_count INTEGER NOT NULL,
    spent_ns INTEGER NOT NULL DEFAULT 0, interruptions INTEGER NOT NULL DEFAULT 0,
    finished_ns INTEGER, exit_code INTEGER, signal INTEGER, reason TEXT,
    duration_ms REAL, latency_ms REAL, snapshot TEXT NOT NULL DEFAULT '',
    attempt_id TEXT, attempt_boot_id TEXT, hook_pid INTEGER, hook_start_ticks INTEGER,
    CHECK(state IN ('waiting', 'running', 'done', 'dead')),
    CHECK(typeof(created_ns) = 'integer' AND typeof(due_ns) = 'integer' AND typeof(attempts) = 'integer'
        AND typeof(failures) = 'integer' AND typeof(event_count) = 'integer'),
    CHECK(typeof(kernel_time_ns) IN ('integer', 'null') AND typeof(spent_ns) = 'integer'
        AND typeof(interruptions) = 'integer')
);
CREATE TABLE events(
    event_id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE, job_id INTEGER NOT NULL, record TEXT NOT NULL
);
CREATE TABLE matches(
    row_id INTEGER PRIMARY KEY,
    time_ns INTEGER NOT NULL, rule TEXT NOT NULL, comm TEXT, pid INTEGER, record TEXT NOT NULL,
    job_id INTEGER, uid INTEGER, user TEXT, unit TEXT, match_id TEXT
);
CREATE INDEX waiting ON jobs(job_id, due_ns, rule, serialize_key) WHERE state = 'waiting';
CREATE INDEX due ON jobs(due_ns) WHERE state = 'waiting';
CREATE INDEX gathering ON jobs(gather_key, job_id) WHERE gather_key IS NOT NULL AND state = 'waiting';
CREATE INDEX ended ON jobs(state, finished_ns) WHERE state IN ('done', 'dead');
CREATE INDEX events_of ON events(job_id);
CREATE INDEX matches_by_time ON matches(time_ns);
"""
# A match that is reported again has its row already. Matches of 0.1 have no id.
_MATCH_IDS = "CREATE UNIQUE INDEX match_ids ON matches(match_id);"
_OUTPUTS = "CREATE TABLE outputs(job_id INTEGER PRIMARY KEY, bytes INTEGER NOT NULL, output TEXT NOT NULL);"
_HITS = "CREATE TABLE hits(rule TEXT PRIMARY KEY, count INTEGER NOT NULL, last_ns INTEGER);"
_CLOCK = """CREATE TABLE clock(
    id INTEGER PRIMARY KEY CHECK(id = 1),
    boot_id TEXT NOT NULL, offset_ns INTEGER NOT NULL, now_ns INTEGER NOT NULL,
    CHECK(typeof(offset_ns) = 'integer' AND typeof(now_ns) = 'integer')
);"""
_MATCH_COLUMNS_OF_3 = ("job_id INTEGER", "uid INTEGER", "user TEXT", "unit TEXT")
# Files made before 2026-11-24 lack it and have the same version. Counting running jobs must not read all jobs.
_RUNNING = "CREATE INDEX IF NOT EXISTS running ON jobs(job_id) WHERE state = 'running';"

# Each rule's queue: see queues.py. Files of 0.1 lack it.
_QUEUES = (
    "CREATE INDEX IF NOT EXISTS queues ON jobs(rule, job_id, due_ns, serialize_key, created_ns)"
    " WHERE state = 'waiting';"
)


class NotOurDatabaseError(sqlite3.DatabaseError):
    """A valid SQLite file that another program made."""


class NewerSpoolError(sqlite3.DatabaseError):
    """A spool that a newer cnprocd made. It is left as it is, for that one."""


def in_file(path: Path) -> sqlite3.Connection:
    """Open or create the file. Raises sqlite3.Error if it is unusable or damaged."""
    db = connect(path)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA page_size = 1024")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute("PRAGMA journal_size_limit = 16777216")
        _make_or_check(db)
    except UnicodeDecodeError as error:  # sqlite3 quotes a damaged schema in its message and fails to decode it
        db.close()
        raise sqlite3.DatabaseError("malformed database schema") from error
    except BaseException:
        db.close()
        raise
    return db


def connect(path: Path) -> sqlite3.Connection:
    """Connect without checks. Invalid UTF-8 in text is replaced, not refused."""
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    db.text_factory = lambda raw: raw.decode("utf-8", "replace")
    return db


def in_memory() -> sqlite3.Connection:
    """Return an empty database that is lost in a crash."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    _make_or_check(db)
    return db


def _make_or_check(db: sqlite3.Connection) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if version == 0 and tables == 0:
        db.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} {_MATCH_IDS} {_OUTPUTS} {_HITS} {_CLOCK} {_RUNNING} {_QUEUES} {aging.TABLES}"
            f" PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
        )
        return
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application == APPLICATION_ID and version > SCHEMA_VERSION:
        raise NewerSpoolError(f"a newer cnprocd made it (version {version}; this one knows {SCHEMA_VERSION})")
    if application != APPLICATION_ID or version not in _STEPS:
        raise NotOurDatabaseError(f"not a spool (application {application:#x}, version {version})")
    (verdict,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(f"integrity_check: {verdict}")
    if version < SCHEMA_VERSION:
        _migrate(db, version)
    db.execute(_RUNNING)
    db.execute(_QUEUES)
    db.executescript(aging.TABLES)


def _migrate(db: sqlite3.Connection, version: int) -> None:
    """Take all steps from this version on in one transaction, which keeps every job and match."""
    db.execute("BEGIN IMMEDIATE")
    try:
        for one in range(version, SCHEMA_VERSION):
            _STEPS[one](db)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _from_2(db: sqlite3.Connection) -> None:
    for column in _MATCH_COLUMNS_OF_3:
        db.execute(f"ALTER TABLE matches ADD COLUMN {column}")
    db.execute("ALTER TABLE jobs ADD COLUMN snapshot TEXT NOT NULL DEFAULT ''")
    db.execute(_OUTPUTS)
    db.execute(_HITS)
    rows = db.execute("SELECT match_id, record FROM matches").fetchall()
    values = [(*history.filtered_fields(history.record_of(record) or {}), match_id) for match_id, record in rows]
    db.executemany("UPDATE matches SET job_id = ?, uid = ?, user = ?, unit = ? WHERE match_id = ?", values)


def _from_3(db: sqlite3.Connection) -> None:
    """Replace the start of the deadline by the time that was spent. The clock of the file is not known.

    So no job waits for longer than its pause was, from now on.
    """
    for column in ("spent_ns", "interruptions"):
        db.execute(f"ALTER TABLE jobs ADD COLUMN {column} INTEGER NOT NULL DEFAULT 0")
    db.execute("UPDATE jobs SET spent_ns = max(0, due_ns - first_started_ns) WHERE first_started_ns IS NOT NULL")
    db.execute(_CLOCK)
    db.execute("INSERT INTO clock VALUES (1, '', 0, CAST(strftime('%s', 'now') AS INTEGER) * 1000000000)")
    db.execute(
        "UPDATE jobs SET due_ns = min(due_ns, (SELECT now_ns FROM clock)"
        " + max(0, due_ns - coalesce(first_started_ns, created_ns))) WHERE state = 'waiting'"
    )


def _from_4(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE matches RENAME COLUMN match_id TO row_id")
    db.execute("ALTER TABLE matches ADD COLUMN match_id TEXT")
    db.execute(_MATCH_IDS)


_STEPS: Mapping[int, Callable[[sqlite3.Connection], None]] = {
    2: _from_2, 3: _from_3, 4: _from_4, SCHEMA_VERSION: lambda db: None,
}  # fmt: skip
