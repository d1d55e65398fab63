"""SQL on the past: matches, the hits of rules, and the last output of each job. store.py makes the transactions."""

from __future__ import annotations

import math
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping

from cnprocd.json_value import JsonError, JsonObject, as_dict, json_text, parse_json
from cnprocd.spool.changes import Row
from cnprocd.spool.disk_messages import Page
from cnprocd.spool.rows import CountFilter, MatchCount, MatchFilter, PastMatch, RuleHits

MOST_OUTPUT_BYTES = 64 << 20  # of the outputs of all jobs together; those of the oldest jobs are deleted first
COLUMNS = "time_ns, rule, comm, pid, record, job_id, uid, user, unit, match_id"
MARKS = "?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
OTHERS = "others"  # the key of counts that are not among the MOST_KEYS largest
MOST_KEYS = 7
_KEYS = {"rule": "rule", "unit": "unit", "kind": "CASE WHEN json_valid(record) THEN json_extract(record, '$.kind') END"}
COUNTING_SINCE = ""  # the row of `hits` that says since when hits are counted; no rule has this name


def match_row(
    time_ns: int, rule: str, comm: str | None, pid: int | None, record: JsonObject, text: str | None = None
) -> Row:
    """Return a row of `matches`. What `cnprocctl history` filters by has a column of its own.

    `text`: the record as JSON, if it was made for the log already.
    """
    stored = json_text(record) if text is None else text
    return (time_ns, rule, comm, pid, stored, *filtered_fields(record), _text(record, "match_id"))


def filtered_fields(record: JsonObject) -> tuple[int | None, int | None, str | None, str | None]:
    """Return the job id, uid, user and unit of a record, as stored beside it."""
    return _int(record, "job_id"), _int(record, "uid"), _text(record, "user"), _text(record, "unit")


def _int(record: JsonObject, key: str) -> int | None:
    value = record.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63 else None


def _text(record: JsonObject, key: str) -> str | None:
    value = record.get(key)
    return value if isinstance(value, str) else None


def match_rows(matches: Iterable[PastMatch]) -> list[Row]:
    """Return matches as rows."""
    return [match_row(one.time_ns, one.rule, one.comm, one.pid, one.record, one.text) for one in matches]


def replace_matches(db: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Keep these matches instead of the former ones."""
    db.execute("DELETE FROM matches")
    put_matches(db, rows)


def put_matches(db: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Add matches. One that was reported before keeps its place."""
    db.executemany(f"INSERT OR IGNORE INTO matches({COLUMNS}) VALUES ({MARKS})", rows)  # noqa: S608  # constants


def find_matches(
    db: sqlite3.Connection, wanted: MatchFilter, following: int, most: int, most_bytes: float = math.inf
) -> Page:
    """Return the newest matches that `wanted` accepts, newest first, each with the state of its job: at most `most`.

    With `wanted.after`, return the first ones after that match, the oldest first. The page ends with the match that
    makes it `most_bytes` long. `following` is that of the page before, or 0.
    """
    if (known := wanted.after or wanted.before) and not following:
        row_id = db.execute("SELECT row_id FROM matches WHERE match_id = ?", (known,)).fetchone()
        if row_id is None:
            return Page((), 0, knows_after=False)
        (following,) = row_id
    conditions, values = ["time_ns >= ?"], [*_bounds(wanted)]
    if wanted.until_ns is not None:
        conditions.append("time_ns <= ?")
    if following:
        conditions.append("row_id < ?" if wanted.after is None else "row_id > ?")
        values.append(following)
    for column, pattern in (("rule", wanted.rule), ("comm", wanted.comm), ("unit", wanted.unit)):
        if pattern is not None:
            conditions.append(f"matches.{column} GLOB ?")
            values.append(glob(pattern))
    for column, value in _exact(wanted):
        if value is not None:
            conditions.append(f"{column} = ?")
            values.append(value)
    most = min(most, wanted.limit)
    cursor = db.execute(
        "SELECT time_ns, matches.rule, comm, pid, record, jobs.state, jobs.reason, row_id"  # noqa: S608  # constants
        " FROM matches LEFT JOIN jobs ON jobs.job_id = matches.job_id"
        f" WHERE {' AND '.join(conditions)} ORDER BY row_id {'DESC' if wanted.after is None else 'ASC'} LIMIT ?",
        (*values, most),
    )
    rows: list[Row] = []
    size = 0
    for row in cursor:
        rows.append(row)
        size += len(row[4])
        if size >= most_bytes:
            break
    more = len(rows) == most or size >= most_bytes
    found = ((row, record_of(row[4])) for row in rows)
    matches = [
        PastMatch(row[0], row[1], row[2], row[3], record, row[5], row[6]) for row, record in found if record is not None
    ]
    return Page(tuple(matches), rows[-1][7] if rows and more else 0)


def _exact(wanted: MatchFilter) -> list[tuple[str, int | str | None]]:
    return [
        ("pid", wanted.pid), ("uid", wanted.uid), ("user", wanted.user), ("match_id", wanted.match_id),
    ]  # fmt: skip


def count_matches(db: sqlite3.Connection, wanted: CountFilter) -> tuple[MatchCount, ...]:
    """Return how many matches there were in each period, by key. The keys with the fewest matches are counted as one.

    So the answer is bounded, although processes can choose the names of units.
    """
    rows = db.execute(
        f"SELECT time_ns / ?1, {_KEYS[wanted.by]}, count(*) FROM matches"  # noqa: S608  # constants
        " WHERE time_ns BETWEEN ?2 AND ?3 GROUP BY 1, 2",
        (wanted.per_ns, wanted.since_ns, wanted.until_ns),
    ).fetchall()
    totals: Counter[str | None] = Counter()
    for _, key, count in rows:
        totals[key] += count
    named = {key for key, _ in totals.most_common(MOST_KEYS)}
    counts: Counter[tuple[int, str | None]] = Counter()
    for period, key, count in rows:
        counts[period, key if key in named else OTHERS] += count
    found = sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] or ""))
    return tuple(MatchCount(period * wanted.per_ns, key, count) for (period, key), count in found)


def _bounds(wanted: MatchFilter) -> list[int | str]:
    most = (1 << 63) - 1
    return [max(-most, min(most, one)) for one in (wanted.since_ns, wanted.until_ns) if one is not None]


def glob(pattern: str) -> str:
    """Return a glob of the rule language as one of SQLite, which negates a set with ^ instead of !."""
    return re.sub(r"\[!", "[^", pattern)


def prune_matches(db: sqlite3.Connection, *, keep: int, old: int) -> int:
    """Delete matches beyond the newest `keep`, and those up to the row `old`. Return the number of rows."""
    return db.execute(
        "DELETE FROM matches WHERE row_id <= max(?, (SELECT max(row_id) FROM matches) - ?)", (old, keep)
    ).rowcount


def record_of(text: str) -> JsonObject | None:
    """Return a stored record, or None if it is damaged."""
    try:
        return as_dict(parse_json(text))
    except (JsonError, TypeError):
        return None


# -- output ------------------------------------------------------------------------------------------------------


def put_output(db: sqlite3.Connection, job_id: int, output: str) -> None:
    """Store the output of a job's last attempt in place of the former one."""
    db.execute("DELETE FROM outputs WHERE job_id = ?", (job_id,))
    if not output:
        return
    values = (job_id, len(output.encode("utf-8", "replace")), output)
    db.execute("INSERT INTO outputs(job_id, bytes, output) VALUES (?, ?, ?)", values)


def find_output(db: sqlite3.Connection, job_id: int) -> str | None:
    """Return the output of a job's last attempt, or None if there is none."""
    row = db.execute("SELECT output FROM outputs WHERE job_id = ?", (job_id,)).fetchone()
    return None if row is None else str(row[0])


def prune_outputs(db: sqlite3.Connection, most_bytes: int = MOST_OUTPUT_BYTES) -> None:
    """Delete the outputs of jobs that are gone, and those of the oldest jobs beyond `most_bytes` in all."""
    db.execute("DELETE FROM outputs WHERE job_id NOT IN (SELECT job_id FROM jobs)")
    db.execute(
        "DELETE FROM outputs WHERE job_id <= (SELECT max(job_id) FROM (SELECT job_id, sum(bytes) OVER"
        " (ORDER BY job_id DESC) AS total FROM outputs) WHERE total > ?)",
        (most_bytes,),
    )


# -- hits --------------------------------------------------------------------------------------------------------


def put_hits(db: sqlite3.Connection, hits: Mapping[str, RuleHits], gone: Iterable[str] = ()) -> None:
    """Store the hits of rules, and forget the rules in `gone`."""
    rows = [(rule, one.count, one.last_ns) for rule, one in hits.items()]
    db.executemany("INSERT OR REPLACE INTO hits(rule, count, last_ns) VALUES (?, ?, ?)", rows)
    db.executemany("DELETE FROM hits WHERE rule = ?", [(rule,) for rule in gone])


def hits_of(rows: Iterable[Row]) -> dict[str, RuleHits]:
    """Return the stored hits by rule, and under COUNTING_SINCE the time since which they are counted.

    A row that is damaged is left out.
    """
    return {
        rule: RuleHits(count, last_ns)
        for rule, count, last_ns in rows
        if isinstance(rule, str) and isinstance(count, int) and isinstance(last_ns, int | None)
    }
