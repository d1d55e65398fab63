"""What is older than the horizon is deleted from the history. A clock that was wrong must delete nothing.

A clock that stands ahead makes everything look old. So the horizon goes on by at most PACE times the time for which the
machine ran since the last time. It jumps over a time of which there are no rows: that deletes nothing.

A clock that stood behind, until the network was there, leaves rows that look old as soon as they are made. So a row is
deleted only if no row that was made before it stays. A clock that stood ahead leaves rows from the future: they go when
there are too many rows, and keep no other row.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from cnprocd.spool.rows import ClockReading

PACE = 4  # a machine that runs for 6 hours a day keeps its history no longer than one that always runs
_DAY_NS = 86_400 * 10**9

# Files of before 2026-11-26 lack it. An older cnprocd leaves it alone.
TABLE = """CREATE TABLE IF NOT EXISTS horizon(
    id INTEGER PRIMARY KEY CHECK(id = 1), time_ns INTEGER NOT NULL, boot_id TEXT NOT NULL, boot_ns INTEGER NOT NULL
);"""
_OLDEST = (
    "SELECT min(oldest) FROM (SELECT min(time_ns) AS oldest FROM matches UNION ALL"
    " SELECT min(finished_ns) FROM jobs WHERE state IN ('done', 'dead'))"
)


class Horizon(NamedTuple):
    """Rows of before `time_ns` are old. Rows of after `future_ns` are from a clock that stood ahead."""

    time_ns: int
    future_ns: int


def advance(db: sqlite3.Connection, older_than_ns: int, clock: ClockReading) -> Horizon:
    """Move the horizon towards `older_than_ns`, and return it."""
    boot_ns = clock.now_ns - clock.offset_ns  # CLOCK_BOOTTIME
    (oldest_ns,) = db.execute(_OLDEST).fetchone()
    row = db.execute("SELECT time_ns, boot_id, boot_ns FROM horizon").fetchone()
    former_ns, boot_id, then_ns = row or (None, "", 0)
    ran_ns = max(0, boot_ns - then_ns if boot_id == clock.boot_id else boot_ns)
    reached = [one for one in (oldest_ns, None if former_ns is None else former_ns + PACE * ran_ns) if one is not None]
    time_ns = min(older_than_ns, max(reached, default=older_than_ns))
    stored_ns = time_ns if former_ns is None else max(former_ns, time_ns)
    db.execute("INSERT OR REPLACE INTO horizon VALUES (1, ?, ?, ?)", (stored_ns, clock.boot_id, boot_ns))
    return Horizon(time_ns, clock.now_ns + _DAY_NS)
