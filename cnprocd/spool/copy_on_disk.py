"""Keep the spool's file equal to the store in memory, without ever waiting for the disk longer than a moment.

A change is noted by the number of its job. `commit` hands the rows of all noted jobs over, as they are now, and waits
for the answer: PATIENCE_S at most, and a tenth of the time in all. So nothing has to be replayed: while the disk does
not answer, the noted numbers wait, and the rows go to the file as they are when it does.

    opening   the file is not open yet: the disk has not answered since the start
    open      the file follows the memory. It is `late` if a commit was not answered in time; then nothing waits for it
              until one is answered in time again
    failed    the file cannot be used. `try_open` opens it again and merges the two (copies.merge)

The memory forgets jobs that have ended long ago. If the file may have such a job as live, a tombstone (Ended) is kept
until the file has it as ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cnprocd.log import Log, ThrottledLog
from cnprocd.patience import Patience
from cnprocd.spool import disk_messages as m
from cnprocd.spool.changes import MOST_WAITING_MATCHES, Changes, Row
from cnprocd.spool.copies import LIVE
from cnprocd.spool.disk import Disk
from cnprocd.spool.history import hits_of
from cnprocd.spool.job import State
from cnprocd.spool.rows import ClockReading, Rows, RuleHits
from cnprocd.spool.store import Store

PATIENCE_S = 0.1
START_S = 2.0  # how long a start waits for the file
STOP_S = 2.0
LATE_S = 1.0  # without a commit that waits: how long an answer may take until the disk counts as late
QUERY_S = 2.0
REPORT_EVERY_S = 10.0
MOST_MATCHES = 500  # in one Write: the commit of a job may have to wait for it
MOST_RECENT_MATCHES = 1000
MEMORY_KEEPS = 500  # done jobs, and dead jobs
MOST_KEYS = 20_000
_CREATED = 6  # the place of created_ns in a row of jobs


class _Phase(enum.Enum):
    OPENING = enum.auto()
    OPEN = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class TakenIn:
    """What the file had that the memory had not: the number of jobs, those that ran, and the ended ones it keeps.

    `snapshots` are those that its jobs refer to, or None if the file is not in use.
    """

    jobs: int
    running: tuple[int, ...]
    done: int
    dead: int
    hits: Mapping[str, RuleHits]
    snapshots: tuple[str, ...] | None


class CopyOnDisk:
    """The file's side of the spool. For the thread of the event loop."""

    def __init__(
        self,
        path: Path,
        store: Store,
        disk: Disk,
        log: Log,
        reading: Callable[[], ClockReading],
        on_taken_in: Callable[[TakenIn], None],
    ) -> None:
        self.path = path
        self.recent: deque[Row] = deque(maxlen=MOST_RECENT_MATCHES)
        self.on_pruned: Callable[[m.Pruned], None] = lambda pruned: None
        self._store = store
        self._disk = disk
        self._log = log
        self._reading = reading
        self._throttled = ThrottledLog(log, REPORT_EVERY_S)
        self._on_taken_in = on_taken_in
        self._phase = _Phase.OPENING
        self._reason = ""
        self._late = False
        self._reported = False  # that the spool is not durable
        self._patience = Patience(PATIENCE_S, shortest_s=0.0)
        self.waited_s = 0.0  # for commits, since start
        self._changes = Changes()
        self._sent = Changes()
        self._sent_ended: tuple[m.Ended, ...] = ()
        self._sent_done: list[int] = []  # jobs that the file has as ended when these changes are committed
        self._busy_since_s: float | None = None  # one request at a time
        self._on_file: dict[int, int] = {}  # jobs that the file may have as live -> created_ns
        self._tombstones: dict[int, m.Ended] = {}
        self._prune: m.Prune | None = None
        self._opened_before = False
        self._queries: deque[tuple[m.Query, Callable[[m.Answer], None]]] = deque()

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def durable(self) -> bool:
        """Whether every change so far is on the file, or was handed over a moment ago."""
        return self._phase is _Phase.OPEN and not self._late

    @property
    def why(self) -> str | None:
        """Why the jobs are in memory only."""
        if self.durable:
            return None
        if self._phase is _Phase.FAILED:
            return self._reason
        return f"the disk has not answered for {max(0.1, self._disk.stalled_s):.1f} s"

    @property
    def has_changes(self) -> bool:
        """Whether the file does not have everything yet."""
        return bool(self._changes) or bool(self._sent)

    # -- changes -------------------------------------------------------------------------------------------------

    def note(self, *job_ids: int) -> None:
        """Note that jobs have changed."""
        self._changes.jobs.update(dict.fromkeys(job_ids))

    def note_events(self, after: int, last: int) -> None:
        """Note that events were added."""
        if last > after:
            self._changes.events.append((after, last))

    def note_output(self, job_id: int, output: str) -> None:
        """Note the output of a job's last attempt."""
        self._changes.put_output(job_id, output)

    def note_hits(self, hits: Mapping[str, RuleHits], gone: Iterable[str]) -> None:
        """Note the hits of rules, and the rules that are gone."""
        self._changes.put_hits(hits, gone)

    def note_matches(self, rows: Iterable[Row]) -> None:
        """Note past matches."""
        for row in rows:
            self._changes.matches.append(row)
            self.recent.append(row)

    def output_of(self, job_id: int) -> str | None:
        """Return an output that the file does not have yet."""
        return self._changes.outputs.get(job_id, self._sent.outputs.get(job_id))

    def commit(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Hand all changes over, and wait until the jobs among them are committed, for a bounded time."""
        self._wait_while(lambda: bool(self._changes.jobs or self._sent.jobs), meanwhile)

    def send(self) -> None:
        """Hand all changes over, and wait until the process has them: it commits them if this one is killed."""
        self._wait_while(lambda: bool(self._changes.jobs))

    def hand_over(self) -> None:
        """Hand all changes over as soon as the process can take them, and wait for nothing."""
        self._next()

    def _wait_while(self, unfinished: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        self._next()
        meanwhile()
        if self._late or self._phase is not _Phase.OPEN or not unfinished():
            return
        began_s = time.monotonic()
        until_s = began_s + self._patience.wait_s(began_s)
        in_time = True
        while in_time and self._phase is _Phase.OPEN and unfinished():
            in_time = self._disk.wait(until_s - time.monotonic())
        self.waited_s += time.monotonic() - began_s
        if not in_time:
            self._patience.spend(time.monotonic() - began_s)
            self._be_late()

    def forget_ended(self, keep: int, older_than_ns: int) -> dict[State, int]:
        """Forget all but the newest ended jobs of the memory. Return how many of each state."""
        gone = self._store.forget_ended(min(keep, MEMORY_KEEPS), older_than_ns, MOST_KEYS)
        for one in gone:
            if one.job_id in self._on_file:
                self._tombstones[one.job_id] = one
            elif one.job_id not in self._sent.jobs:
                self._changes.jobs.pop(one.job_id, None)
        return {state: sum(one.state == state for one in gone) for state in (State.DONE, State.DEAD)}

    def prune(self, keep: int, older_than_ns: int) -> None:
        """Delete history of the file, when nothing else is to be done."""
        self._prune = m.Prune(keep, older_than_ns, self._reading())
        self.hand_over()

    def check(self) -> None:
        """Note a disk that does not answer although no commit waits for it. About once a second."""
        if self._phase is _Phase.OPEN and self._disk.stalled_s > LATE_S:
            self._be_late()
        self.hand_over()
        self._throttled.flush_due(time.monotonic())

    # -- opening and closing -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the file, and wait for it for a bounded time."""
        self.try_open()
        until_s = time.monotonic() + START_S
        while self._phase is _Phase.OPENING and self._disk.wait(until_s - time.monotonic()):
            """Until the process is ready, and has opened the file."""
        if self._phase is _Phase.OPENING:
            self._report_not_durable()

    def try_open(self) -> None:
        """Open the file if it has failed, and merge it with the memory."""
        if self._phase is _Phase.OPEN or self._busy_since_s is not None:
            return
        self._send(self._open_request(), self._opened)

    def _open_request(self) -> m.Open:
        """Take all changes out, and return them with all jobs of the memory."""
        rows = self._store.rows(*State)
        filled = self._take_changes(rows, MOST_WAITING_MATCHES)
        copy, self._opened_before = not self._opened_before, True
        return m.Open(str(self.path), filled, self._sent_ended, copy)

    def close(self) -> None:
        """Write everything, and close the file; wait for a bounded time.

        If the disk does not answer, the last changes are left to its process, which writes them when it does.
        """
        if not self._closed_in_time(time.monotonic() + (STOP_S if self.durable else 0.0)):
            self._leave()
        self._throttled.flush(time.monotonic())
        self._disk.close()

    def _closed_in_time(self, until_s: float) -> bool:
        """Hand over what is left, then close the file. Return whether the disk has answered."""
        while self._phase is _Phase.OPEN:
            self._next()
            if self._busy_since_s is None:
                break
            if not self._disk.wait(until_s - time.monotonic()):
                return False
        if self._phase is not _Phase.OPEN:
            return False
        closed: list[m.Answer] = []
        self._disk.send(m.Close(self._reading()), closed.append)
        while not closed and self._disk.wait(until_s - time.monotonic()):
            """Until the file is closed: the next daemon opens it."""
        return bool(closed)

    def _leave(self) -> None:
        if self._changes.jobs or self._sent.jobs:
            reason = self.why or "the disk does not answer"
            self._log(
                "error",
                "spool_not_durable",
                path=str(self.path),
                reason=reason,
                message=f"stopping although the last changes of jobs are not on disk ({reason}); hooks may run again",
            )
        if self._phase is _Phase.FAILED:
            return
        opening = self._phase is _Phase.OPENING
        self._disk.leave(self._open_request() if opening else self._write_request(MOST_WAITING_MATCHES))
        self._disk.leave(m.Close(self._reading()))

    # -- searching -----------------------------------------------------------------------------------------------

    async def find(self, query: m.Query, within_s: float = QUERY_S) -> m.Answer:
        """Return what the file has. Failed: it has not answered in time, or cannot be used."""
        if not self.durable:
            return m.Failed(self.why or "")
        answers: list[m.Answer] = []
        arrived: asyncio.Event | None = None

        def take(answer: m.Answer) -> None:
            answers.append(answer)
            if arrived is not None:
                arrived.set()

        self._queries.append((query, take))
        self._next()
        if not answers:
            arrived = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(arrived.wait(), within_s)
        return answers[0] if answers else m.Failed(f"the disk has not answered for {within_s:g} s")

    # -- one request after the other -----------------------------------------------------------------------------

    def _next(self) -> None:
        """Hand over the next request, if none is being carried out: jobs first, then all else, then questions."""
        if self._busy_since_s is not None or self._phase is not _Phase.OPEN:
            return
        if self._changes:
            self._send(self._write_request(), self._written)
        elif self._prune is not None:
            prune, self._prune = self._prune, None
            self._send(prune, self._pruned)
        elif self._queries:
            self._send(*self._queries.popleft())

    def _send(self, request: m.Request, done: Callable[[m.Answer], None]) -> None:
        self._busy_since_s = time.monotonic()

        def answered(answer: m.Answer) -> None:
            began_s, self._busy_since_s = self._busy_since_s, None
            if isinstance(answer, m.Failed):
                self._failed(answer)
                return
            done(answer)
            in_time = began_s is not None and time.monotonic() - began_s < PATIENCE_S
            self._late = self._late and not in_time and bool(self._changes)
            self._report_durable()
            self._next()

        self._disk.send(request, answered)

    def _write_request(self, most_matches: int = MOST_MATCHES) -> m.Write:
        """Take the changes out, and return them as rows: all of the jobs, and a share of the matches."""
        rows = self._store.rows_of(self._changes.jobs, self._changes.events)
        filled = self._take_changes(rows, most_matches)
        return m.Write(filled, self._sent_ended, tuple(self._sent.gone))

    def _take_changes(self, jobs: Rows, most_matches: int) -> Rows:
        """Move the changes to those that are sent. Return them as rows, with these jobs."""
        sent, self._changes = self._changes, Changes()
        self._changes.matches.extend(islice(sent.matches, most_matches, None))
        sent.matches = deque(islice(sent.matches, most_matches), maxlen=MOST_WAITING_MATCHES)
        self._sent, self._sent_ended = sent, tuple(self._tombstones.values())
        self._sent_done = [row[0] for row in jobs.jobs if row[2] not in LIVE] + [one.job_id for one in self._sent_ended]
        self._on_file.update((row[0], row[_CREATED]) for row in jobs.jobs if row[2] in LIVE)
        hits = [(rule, one.count, one.last_ns) for rule, one in sent.hits.items()]
        outputs, clock = list(sent.outputs.items()), self._reading()
        return Rows(jobs.jobs, jobs.events, list(sent.matches), outputs, hits, jobs.last_job_id, clock)

    # -- answers -------------------------------------------------------------------------------------------------

    def _written(self, answer: m.Answer) -> None:
        for job_id in self._sent_done:
            self._on_file.pop(job_id, None)
            self._tombstones.pop(job_id, None)
        self._sent, self._sent_ended = Changes(), ()

    def _opened(self, answer: m.Answer) -> None:
        assert isinstance(answer, m.Opened)
        self._phase, self._late = _Phase.OPEN, False
        self._written(answer)
        if answer.damaged is not None:
            damaged = answer.damaged
            self._log("error", "spool_damaged", path=str(self.path), kept_as=damaged.kept_as, reason=damaged.reason)
            self._log("warning", "spool_moved", durable=True, carried=damaged.carried)
        self._take_in(answer.rows, answer)

    def _take_in(self, rows: Rows, opened: m.Opened | None = None) -> None:
        """Add the jobs of the file to the memory."""
        keys, superseded = (opened.keys, opened.superseded) if opened else ((), ())
        left_out = self._store.take_in(rows, keys, superseded)
        self._on_file.update((row[0], row[_CREATED]) for row in rows.jobs)
        now_ns = self._reading().now_ns
        ended = [m.Ended(job_id, self._on_file[job_id], State.DONE, now_ns) for job_id in left_out]
        self._tombstones |= {one.job_id: one for one in ended}  # another job has its events
        running = tuple(int(row[0]) for row in rows.jobs if row[2] == State.RUNNING)
        done, dead, snapshots = (opened.done, opened.dead, opened.snapshots) if opened else (0, 0, None)
        self._on_taken_in(TakenIn(len(rows.jobs), running, done, dead, hits_of(rows.hits), snapshots))

    def _pruned(self, answer: m.Answer) -> None:
        assert isinstance(answer, m.Pruned)
        self.on_pruned(answer)

    def _failed(self, failed: m.Failed) -> None:
        self._changes.put_back(self._sent)
        self._sent, self._sent_ended, self._sent_done = Changes(), (), []
        in_use = self._phase is _Phase.OPEN
        self._phase, self._reason, self._late = _Phase.FAILED, failed.reason, False
        while self._queries:
            self._queries.popleft()[1](failed)
        if failed.rows is not None and not in_use:
            self._take_in(failed.rows)
            self._log("warning", "spool_moved", durable=False, carried=len(failed.rows.jobs))
        if failed.damaged and in_use:
            self.try_open()  # it is renamed, and the next one gets all jobs
        elif not self._reported:
            self._report_not_durable()

    # -- reports -------------------------------------------------------------------------------------------------

    def _be_late(self) -> None:
        if not self._late:
            self._late = True
            self._report_not_durable()

    def _report_not_durable(self) -> None:
        self._reported = True
        self._throttled.add(
            "error",
            "spool_not_durable",
            time.monotonic(),
            {"count": 1},
            f"jobs are kept in memory only: {self.why}",
            path=str(self.path),
            reason=self.why,
        )

    def _report_durable(self) -> None:
        if self._reported and self.durable:
            self._reported = False
            self._throttled.flush(time.monotonic())
            self._log("notice", "spool_durable", path=str(self.path))
