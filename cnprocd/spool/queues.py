"""The queue of each rule within the spool: SQL on the index `queues`, and what is dropped when the spool is full.

`queue_limit` bounds the waiting jobs of all rules together. When it is reached, the rule with the most waiting jobs
makes room: its newest waiting job is dropped, which may be the one that was to be added. So a flood drops jobs of its
own rule only, and rules that flood together end with equal shares. The newest is dropped because the oldest has waited
longest and is next. A dropped job that was stored already becomes dead, so `cnprocctl jobs retry` can run it.
"""

from __future__ import annotations

import sqlite3
from collections import Counter

from cnprocd.spool.rows import RuleQueue

FULL = "dropped: the queue was full, and its rule had the most waiting jobs (queue_limit)"


def waiting_rules(db: sqlite3.Connection) -> dict[str, int]:
    """Return the rules with waiting jobs, and the oldest job of each: two steps in the index for each rule."""
    rows = db.execute(
        "WITH RECURSIVE found(rule) AS (SELECT min(rule) FROM jobs INDEXED BY queues WHERE state = 'waiting'"
        " UNION ALL SELECT (SELECT min(rule) FROM jobs INDEXED BY queues"
        " WHERE state = 'waiting' AND rule > found.rule) FROM found WHERE found.rule IS NOT NULL)"
        " SELECT rule, (SELECT min(job_id) FROM jobs INDEXED BY queues WHERE state = 'waiting' AND rule = found.rule)"
        " FROM found WHERE rule IS NOT NULL"
    )
    return {str(rule): int(job_id) for rule, job_id in rows}


def queues(db: sqlite3.Connection, now_ns: int) -> dict[str, RuleQueue]:
    """Return the length of each rule's queue, and the age of its oldest job."""
    rows = db.execute(
        "SELECT rule, count(*), min(created_ns) FROM jobs INDEXED BY queues WHERE state = 'waiting' GROUP BY rule"
    )
    return {str(rule): RuleQueue(count, max(0.0, (now_ns - oldest_ns) / 1e9)) for rule, count, oldest_ns in rows}


def heaviest(waiting: Counter[str], rule: str) -> str:
    """Return the rule with the most waiting jobs if one of `rule` is added. Of several, `rule` itself if it is one."""
    most, count = max(waiting.items(), key=lambda item: item[1], default=(rule, 0))
    return rule if waiting[rule] + 1 >= count else most


class Room:
    """Makes room in a full queue, for one batch. Use it within one transaction."""

    def __init__(self, db: sqlite3.Connection, now_ns: int) -> None:
        self.shed: Counter[str] = Counter()  # dropped jobs and requests, by rule
        self.dropped: list[int] = []  # jobs that were waiting
        self._db = db
        self._now_ns = now_ns
        self._waiting: Counter[str] | None = None

    def make(self, rule: str) -> bool:
        """Return whether a job of `rule` can be added, because another one was dropped. Else it is the one to drop."""
        waiting = self._waiting = self._lengths() if self._waiting is None else self._waiting
        flooding = heaviest(waiting, rule)
        self.shed[flooding] += 1
        dropped = self._drop_newest(flooding) if flooding != rule else None
        if dropped is None:
            return False
        self.dropped.append(dropped)
        waiting[flooding] -= 1
        waiting[rule] += 1
        return True

    def _lengths(self) -> Counter[str]:
        rows = self._db.execute(
            "SELECT rule, count(*) FROM jobs INDEXED BY queues WHERE state = 'waiting' GROUP BY rule"
        )
        return Counter({str(rule): int(count) for rule, count in rows})

    def _drop_newest(self, rule: str) -> int | None:
        row = self._db.execute(
            "UPDATE jobs SET state = 'dead', finished_ns = ?, reason = ? WHERE state = 'waiting' AND job_id ="
            " (SELECT max(job_id) FROM jobs INDEXED BY queues WHERE state = 'waiting' AND rule = ?) RETURNING job_id",
            (self._now_ns, FULL, rule),
        ).fetchone()
        return None if row is None else int(row[0])
