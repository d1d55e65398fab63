"""The spool's file: it is opened, merged with the memory, written to and searched, one request at a time.

Runs in the process that may wait for the disk (disk_child.py), never on the daemon's loop.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from cnprocd.spool import copies, salvage
from cnprocd.spool import disk_messages as m
from cnprocd.spool.database import NewerSpoolError
from cnprocd.spool.job import State
from cnprocd.spool.rows import Rows
from cnprocd.spool.store import Store

MOST_WAL_BYTES = 4 << 20
MOST_KEYS = 20_000  # only the events of the last moments can be seen twice
PAGE_MATCHES = PAGE_JOBS = 100
PAGE_BYTES = 128 << 10  # of records: the daemon decodes a page in about a millisecond
MOST_SNAPSHOTS = 1000


class SpoolFile:
    """The file of one path. `handle` never raises for a bad file: the answer is Failed."""

    def __init__(self) -> None:
        self.path = Path()
        self._store: Store | None = None
        self._damage: Exception | None = None  # found in use: the next Open renames the file

    def handle(self, request: m.Request) -> m.Answer:
        """Carry out one request."""
        try:
            return self._handle(request)
        except (*salvage.FAILURES, OSError) as error:
            self._discard()
            damaged = salvage.is_damage(error)
            self._damage = error if damaged else None
            return m.Failed(salvage.sentence(error), damaged)

    def upkeep(self) -> None:
        """Move a long WAL into the file. Between two requests: it takes two fsyncs."""
        if self._store is not None and salvage.size_of_wal(self.path) > MOST_WAL_BYTES:
            with contextlib.suppress(sqlite3.Error):  # the next request meets the error as well
                self._store.checkpoint()

    def _handle(self, request: m.Request) -> m.Answer:
        if isinstance(request, m.Open):
            return self._open(request)
        if isinstance(request, m.Close):
            return self._close(request)
        store = self._store
        if store is None:
            return m.Failed("the file is not open")
        match request:
            case m.Write():
                store.write(request.rows, request.ended, request.gone)
                return m.Done()
            case m.Prune():
                rows = store.prune(keep=request.keep, older_than_ns=request.older_than_ns, clock=request.clock)
                counts = store.counts()
                return m.Pruned(rows, counts[State.DONE], counts[State.DEAD])
            case _:
                return _answered(store, request)

    def _open(self, request: m.Open) -> m.Answer:
        self._discard()
        self.path = Path(request.path)
        damage, self._damage = self._damage, None
        damaged: m.Damaged | None = None
        try:
            store = self._store = self._opened_file(damage)
            merged = store.merge(request.memory, request.ended)
        except salvage.FAILURES as error:
            if not salvage.is_damage(error):
                return self._refused(request, error)
            self._discard()
            damaged = self._replaced(error, request)
            store = self._store = salvage.private_file(self.path)
            merged = store.merge(request.memory, request.ended)
        except OSError as error:
            return self._refused(request, error)
        counts = store.counts()
        keys = store.ended_keys(MOST_KEYS)
        return m.Opened(
            merged.foreign,
            keys,
            counts[State.DONE],
            counts[State.DEAD],
            merged.superseded,
            tuple(store.snapshots(MOST_SNAPSHOTS)),
            damaged,
        )

    def _opened_file(self, damage: Exception | None) -> Store:
        if damage is not None:
            raise damage
        return salvage.private_file(self.path)

    def _refused(self, request: m.Open, error: Exception) -> m.Failed:
        """Run the jobs of a read-only file from memory, but not those of another process or of a newer cnprocd."""
        self._discard()
        others = isinstance(error, NewerSpoolError) or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
        rows = salvage.copied(self.path) if request.copy and not others else Rows()
        return m.Failed(salvage.sentence(error), False, copies.in_time_of(rows, request.memory.clock))

    def _replaced(self, error: Exception, request: m.Open) -> m.Damaged:
        """Rename the damaged file, and make a new one with the jobs that are still readable."""
        live = copies.in_time_of(salvage.salvaged(self.path), request.memory.clock)
        aside = salvage.rename_damaged(self.path)
        carried = len(live.jobs)
        with contextlib.closing(salvage.private_file(self.path)) as store:
            try:
                store.merge(live, ())
            except salvage.FAILURES:
                carried = 0
            if live.last_job_id == 0:
                salvage.with_new_ids(store)
        return m.Damaged(str(aside), salvage.sentence(error), carried)

    def _close(self, request: m.Close) -> m.Done:
        store, self._store = self._store, None
        if store is not None:
            with contextlib.suppress(sqlite3.Error):
                store.put_clock(request.clock)
            with contextlib.suppress(sqlite3.Error):
                store.close()
        return m.Done()

    def _discard(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            with contextlib.suppress(sqlite3.Error):
                store.close()


def _answered(store: Store, query: m.Query) -> m.Answer:
    """Answer a question. It comes from users that may only read, so its own fault is none of the file."""
    try:
        return _found(store, query)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF != sqlite3.SQLITE_ERROR:
            raise
        return m.Unanswerable(salvage.sentence(error))
    except (UnicodeEncodeError, OverflowError) as error:
        return m.Unanswerable(str(error))


def _found(store: Store, query: m.Query) -> m.Answer:
    match query:
        case m.FindJobs():
            most = min(query.limit, PAGE_JOBS)
            jobs = store.jobs(query.state, query.rule, most, query.before)
            return m.Page(jobs=tuple(jobs), following=jobs[-1].job_id if len(jobs) == most else 0)
        case m.FindJob():
            return store.job(query.job_id)
        case m.FindOutput():
            return store.output(query.job_id)
        case m.FindDead():
            return store.dead_rows(query.job_id, query.rule)
        case m.FindMatches():
            return store.page_of_matches(query.wanted, query.following, PAGE_MATCHES, PAGE_BYTES)
        case m.CountMatches():
            return m.Counted(store.count_matches(query.wanted))
