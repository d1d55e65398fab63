"""How old the history is, without a wall clock: a clock that is wrong for some time must delete nothing, nor keep it.

A clock that stands ahead makes everything look old, and one that stands behind makes new rows look old. So age is the
time for which the machine ran (CLOCK_BOOTTIME, summed over boots). Now and then a mark is made: the running time, and
the last row and job of that moment. All of before a mark are at least as old as the mark.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from cnprocd.spool.rows import ClockReading

_MARKS = 64  # within the age that is kept

# Files of before 2026-11-26 lack them. An older cnprocd leaves them alone.
TABLES = """
CREATE TABLE IF NOT EXISTS running_time(
    id INTEGER PRIMARY KEY CHECK(id = 1), running_ns INTEGER NOT NULL, boot_id TEXT NOT NULL, boot_ns INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS marks(running_ns INTEGER PRIMARY KEY, row_id INTEGER NOT NULL, job_id INTEGER NOT NULL);
"""


class Old(NamedTuple):
    """The last match and the last job that are old; 0: none is."""

    row_id: int
    job_id: int


def find_old(db: sqlite3.Connection, age_ns: int, clock: ClockReading) -> Old:
    """Count the running time up to now, and return what is older than `age_ns`."""
    boot_ns = clock.now_ns - clock.offset_ns  # CLOCK_BOOTTIME
    row = db.execute("SELECT running_ns, boot_id, boot_ns FROM running_time").fetchone()
    before_ns, boot_id, then_ns = row or (0, clock.boot_id, boot_ns)
    now_ns = before_ns + max(0, boot_ns - then_ns if boot_id == clock.boot_id else boot_ns)
    db.execute("INSERT OR REPLACE INTO running_time VALUES (1, ?, ?, ?)", (now_ns, clock.boot_id, boot_ns))
    db.execute(
        "INSERT INTO marks SELECT ?1, (SELECT coalesce(max(row_id), 0) FROM matches),"
        " (SELECT coalesce(max(job_id), 0) FROM jobs)"
        " WHERE NOT EXISTS (SELECT 1 FROM marks WHERE running_ns > ?1 - ?2)",
        (now_ns, max(1, age_ns // _MARKS)),
    )
    old = db.execute(
        "SELECT running_ns, row_id, job_id FROM marks WHERE running_ns <= ? ORDER BY running_ns DESC LIMIT 1",
        (now_ns - age_ns,),
    ).fetchone()
    if old is None:
        return Old(0, 0)
    db.execute("DELETE FROM marks WHERE running_ns < ?", (old[0],))
    return Old(*old[1:])
