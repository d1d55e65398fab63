"""The durable queue of jobs.

The queue is a store in memory (store.py): every live job, and the ones that have ended last. A file in the state
directory follows it (copy_on_disk.py), written by a process of its own (disk.py), so that a disk that does not answer
stops no cleanup. enqueue() waits for the commit, at most 0.1 s. While a commit is late or the file cannot be used,
`durable` is False and `why` is the reason; jobs run from memory. When the disk answers, the file gets the jobs as they
are then, and jobs that only the file had are taken up. A damaged file is renamed to spool.sqlite3.damaged-<time>, and a
new one gets every job that is still readable.

The price of durability (tests/unit/spool/measure_sync.py with chrt -r 50, ext4 on virtio, Linux 6.18, SQLite 3.40,
busy machine); one commit of 1 job / of 100 jobs, p50:

    synchronous=OFF      0.08 ms / 3.1 ms     daemon crash: no loss.  machine crash: the file may be damaged
    synchronous=NORMAL   0.08 ms / 3.3 ms     daemon crash: no loss.  machine crash: loses the commits since fsync()
    synchronous=FULL     0.42 ms / 7.0 ms     no loss; p99 of one job 1.4 to 17 ms, on a fast disk

NORMAL is used, with one fsync within a second of a commit (disk_child.py): 13 ms after 300 jobs. A crash, kill -9 or
OOM kill of the daemon loses nothing. A power cut or kernel panic loses at most the jobs of the last second and never
damages the file. A machine crash ends all processes unseen, so those jobs are a small part of its cleanup. FULL would
put an fsync between each death and its cleanup. The WAL is moved into the file when it is longer than MOST_WAL_BYTES,
and at the end. tests/unit/spool/measure_enqueue.py has the price of the other process. Times are of steady_clock.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path

from cnprocd.json_value import JsonObject
from cnprocd.launch.request import AttemptResult
from cnprocd.log import Log
from cnprocd.spool import database, history, paging, salvage
from cnprocd.spool.copy_on_disk import CopyOnDisk, TakenIn
from cnprocd.spool.disk import DirectDisk, Disk
from cnprocd.spool.disk_messages import FindDead, FindJob, FindJobs, FindMatches, FindOutput, Pruned, reason_of
from cnprocd.spool.job import NS, Job, JobRequest, State, after_interruption
from cnprocd.spool.rows import (
    ClockReading,
    CountFilter,
    Counts,
    Enqueued,
    Found,
    Keep,
    Leftover,
    MatchCount,
    MatchFilter,
    PastMatch,
    Rows,
    RuleHits,
    RuleQueue,
)
from cnprocd.spool.shedding import Shedding
from cnprocd.spool.steady_clock import Clock, SteadyClock
from cnprocd.spool.store import Store

FILE_NAME = "spool.sqlite3"
InCommit = Callable[[Enqueued], Callable[[], None]]
PRUNE_EVERY, FORGET_EVERY = 500, 100
DROPPED_AT_ONCE = 500


class Spool:
    """Jobs from match to history. While they are in memory only, `durable` is False and `why` is the reason."""

    def __init__(self, path: Path, *, disk: Disk, log: Log, keep: Keep, clock: Clock, boot_id: str) -> None:
        self.path = path
        self.keep = keep
        self.clock = clock
        self.boot_id = boot_id
        self.duplicates = 0
        self.on_recoverable: Callable[[], None] = lambda: None  # the file had jobs that a crash interrupted
        self._since_prune = self._since_forgotten = 0
        self._log = log
        self.shedding = Shedding(log)
        self._hits: dict[str, RuleHits] = {}
        self._snapshots: tuple[str, ...] | None = None  # of the jobs in the file, as it was opened
        self._interrupted: list[int] = []  # jobs that ran at a crash; recover() returns them
        self._forgotten = dict.fromkeys(State, 0)  # ended jobs that only the file has
        self._store = Store(database.in_memory())
        self._copy = CopyOnDisk(path, self._store, disk, log, self._reading, self._taken_in)
        self.waited_s = lambda: self._copy.waited_s  # for commits, since start
        self.also_needed: Callable[[], Iterable[str]] = tuple  # digests of rules that jobs to come refer to
        self._copy.on_pruned = self._pruned
        self._copy.start()
        if self._store.last_job_id() == 0 and not self.durable:
            salvage.with_new_ids(self._store)

    @classmethod
    def open(
        cls,
        state_dir: Path,
        *,
        log: Log,
        keep: Keep | None = None,
        clock: Clock | None = None,
        disk: Disk | None = None,
        boot_id: str | None = None,
    ) -> Spool:
        """Open the spool of a state directory, or log why it cannot be. Without `disk`, commits wait for the disk."""
        return cls(
            state_dir / FILE_NAME,
            disk=disk or DirectDisk(),
            log=log,
            keep=keep or Keep(),
            clock=clock or SteadyClock(),
            boot_id=boot_id or Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        )

    @property
    def durable(self) -> bool:
        """Whether the jobs are on disk."""
        return self._copy.durable

    @property
    def why(self) -> str | None:
        """Why the jobs are in memory only."""
        return self._copy.why

    @property
    def has_changes(self) -> bool:
        """Whether the file does not have everything yet."""
        return self._copy.has_changes

    def close(self) -> None:
        """Write everything, and close the file, as far as the disk answers in time."""
        self._copy.close()

    # -- matches in -------------------------------------------------------------------------------------

    def enqueue(self, requests: Sequence[JobRequest], in_commit: InCommit = lambda _: lambda: None) -> Enqueued:
        """Add a batch in one commit. If the queue is full, the rule with the most jobs drops its newest (queues.py).

        The commit contains what `in_commit` changes. What that returns is called while the commit is under way.
        """
        limit, before = self.keep.queue_limit, self._store.last_event_id
        result = self._store.enqueue(requests, boot_id=self.boot_id, now_ns=self.clock(), queue_limit=limit)
        self._copy.note(*(job_id for job_id in result.job_ids if job_id is not None), *result.made_room)
        self._since_prune += len(result.made_room)
        self._since_forgotten += len(result.made_room)
        self._copy.note_events(before, self._store.last_event_id)
        self._copy.commit(in_commit(result))
        self.duplicates += result.duplicates
        self.shedding.add(result.shed_by_rule, limit, self.clock() / NS)
        return result

    def note_dropped(self, dropped: Mapping[str, int]) -> None:
        """Count and log jobs, by rule, that were not added because the queue is full."""
        self.shedding.add(dropped, self.keep.queue_limit, self.clock() / NS)

    def record_matches(self, matches: Sequence[PastMatch]) -> None:
        """Store matches for `cnprocctl history`, some time soon."""
        self._since_prune += len(matches)
        self._copy.note_matches(history.match_rows(matches))
        self._copy.hand_over()

    def put_hits(self, hits: Mapping[str, RuleHits], gone: Iterable[str] = ()) -> None:
        """Store the hits of rules, and forget the rules in `gone`, some time soon."""
        gone = set(gone)
        self._hits = {rule: one for rule, one in {**self._hits, **hits}.items() if rule not in gone}
        self._copy.note_hits(hits, gone)
        self._copy.hand_over()

    def hits(self) -> dict[str, RuleHits]:
        """Return the stored hits: see history.hits_of()."""
        return dict(self._hits)

    # -- the scheduler's calls ------------------------------------------------------------------------------------

    def due(
        self,
        limit: int,
        *,
        rule: str | None = None,
        after_id: int = 0,
        key: str | None = None,
        skip_keys: Sequence[str] = (),
        skip_jobs: Sequence[int] = (),
    ) -> list[Job]:
        """Return the oldest jobs of a rule, or of all rules, that may start now, without those that `skip_*` name."""
        return self._store.due(
            self.clock(), limit, rule=rule, after_id=after_id, key=key, skip_keys=skip_keys, skip_jobs=skip_jobs
        )

    def waiting_rules(self) -> dict[str, int]:
        """Return the rules with waiting jobs, and the oldest job of each."""
        return self._store.waiting_rules()

    def queues(self) -> dict[str, RuleQueue]:
        """Return the length of each rule's queue, and the age of its oldest job."""
        return self._store.queues(self.clock())

    def events(self, job_id: int) -> tuple[JsonObject, ...]:
        """Return the events of a job, or () if one of them cannot be read."""
        return self._store.events(job_id)

    def next_due_in_s(self, searched_ns: int) -> float | None:
        """Return the seconds until the next job is due that was not yet when due() searched; None: there is none."""
        due_ns = self._store.next_due_ns(searched_ns)
        return None if due_ns is None else max(0.0, (due_ns - self.clock()) / NS)

    def start(self, job_id: int, attempt_id: str, *, in_commit: bool = False) -> None:
        """Mark the job as running, before the fork. `in_commit`: a commit follows at once."""
        self._store.start(job_id, attempt_id, self.boot_id)
        self._copy.note(job_id)
        if not in_commit:
            self._copy.send()

    def launched(self, job_id: int, hook_pid: int, hook_start_ticks: int | None, latency_ms: float | None) -> None:
        """Store the hook's PID and latency, after the exec, within a second."""
        self._store.launched(job_id, hook_pid, hook_start_ticks, latency_ms)
        self._copy.note(job_id)

    def finish(self, job_id: int, result: AttemptResult) -> None:
        """Mark the job as done: the hook succeeded."""
        self._store.end(job_id, State.DONE, result, self.clock(), None)
        self._ended(job_id)

    def retry(self, job_id: int, result: AttemptResult, due_ns: int, spent_ns: int = 0) -> None:
        """Let the job wait for its next attempt at `due_ns`: the hook failed. `spent_ns`: of its deadline."""
        self._store.retry(job_id, result, due_ns, spent_ns)
        self._hand_over(job_id)

    def bury(self, job_id: int, result: AttemptResult, reason: str) -> None:
        """Mark the job as dead: no further attempt follows."""
        self._store.end(job_id, State.DEAD, result, self.clock(), reason)
        self._ended(job_id)

    def put_output(self, job_id: int, output: str) -> None:
        """Store the output of a job's last attempt, with the job's next commit."""
        self._copy.note_output(job_id, output)

    def snapshots(self, limit: int) -> list[str] | None:
        """Return the digests of rules that jobs refer to which may still run. None: the file was not readable yet."""
        if self._snapshots is None:
            return None
        return list(dict.fromkeys((*self.also_needed(), *self._store.snapshots(limit), *self._snapshots)))[:limit]

    def interrupt(self, job_id: int, pause_s: float = 0.0) -> None:
        """Let the job wait again: its attempt was interrupted. The attempt is counted, and no retry is used up."""
        self._store.put_back(job_id, self.clock() + int(pause_s * NS), interrupted=True)
        self._hand_over(job_id)

    def postpone(self, job_id: int, due_ns: int) -> None:
        """Let the job wait until `due_ns`: its attempt could not be started. The attempt is not counted."""
        self._store.put_back(job_id, due_ns, interrupted=False)
        self._hand_over(job_id)

    def recover(self, *, resumable: bool = False) -> list[Leftover]:
        """Return the jobs that ran at a crash, and let them wait again (or die after too many interruptions).

        The hooks may still be alive. If attempts are `resumable`, those of this boot stay as they are. Call it whenever
        the file has become usable (`on_recoverable`).
        """
        interrupted, self._interrupted = set(self._interrupted), []
        found = [leftover for leftover in self._store.leftovers() if leftover.job.job_id in interrupted]
        for leftover in found:
            job = leftover.job
            if resumable and leftover.boot_id == self.boot_id:
                continue
            following = after_interruption(job, self.clock())
            if following.state is State.DEAD:
                assert following.reason is not None
                self.bury(job.job_id, AttemptResult(following.reason), following.reason)
                self._log("error", "job_dead", job_id=job.job_id, rule=job.rule, reason=following.reason)
            else:
                self.interrupt(job.job_id)
        return found

    def _hand_over(self, job_id: int) -> None:
        self._copy.note(job_id)
        self._copy.hand_over()

    def _ended(self, job_id: int) -> None:
        self._since_prune += 1
        self._since_forgotten += 1
        self._hand_over(job_id)

    # -- control ---------------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Return the number of jobs in each state, and whether they are durable."""
        by_state = self._store.counts()
        oldest_ns = self._store.oldest_waiting_ns()
        return Counts(
            waiting=by_state[State.WAITING],
            running=by_state[State.RUNNING],
            done=by_state[State.DONE] + self._forgotten[State.DONE],
            dead=by_state[State.DEAD] + self._forgotten[State.DEAD],
            oldest_waiting_s=None if oldest_ns is None else max(0.0, (self.clock() - oldest_ns) / NS),
            duplicates=self.duplicates,
            shed=self.shedding.count,
            durable=self.durable,
            why=self.why,
        )

    def last_job_id(self) -> int:
        """Return the highest job id ever given."""
        return self._store.last_job_id()

    def job(self, job_id: int) -> Job | None:
        """Return a job that is in memory with its events: every live one, and those that have ended last."""
        return self._store.job(job_id)

    def drop(self, *, job_id: int | None = None, rule: str | None = None) -> list[int]:
        """Mark waiting jobs as dead (`cnprocctl jobs drop`), at most DROPPED_AT_ONCE, and return them."""
        dropped = self._store.drop(job_id, rule, self.clock(), DROPPED_AT_ONCE)
        for one in dropped:
            self._ended(one)
        return dropped

    async def revive(self, *, job_id: int | None = None, rule: str | None = None) -> list[int]:
        """Let dead jobs wait again (`cnprocctl jobs retry`), and return them. Call the scheduler's wake() after it.

        While the file cannot be read, only jobs in memory are found.
        """
        found = await self._copy.find(FindDead(job_id, rule))
        if isinstance(found, Rows):
            known = self._store.counts()[State.DEAD]
            self._store.take_in(found)
            self._forgotten[State.DEAD] -= self._store.counts()[State.DEAD] - known
        revived = self._store.revive(job_id, rule, self.clock())
        self._copy.note(*revived)
        self._copy.commit()
        return revived

    # -- upkeep --------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Hand over what waits, delete old history, and log dropped jobs. About once a second after a change."""
        if self._since_forgotten >= FORGET_EVERY:
            self._forget()
        if self._since_prune >= PRUNE_EVERY:
            self.prune()
        self.shedding.flush_due(self.clock() / NS)
        self._copy.check()

    def prune(self) -> None:
        """Delete history beyond `keep`, some time soon."""
        self._since_prune = 0
        self._forget()
        self._copy.prune(self.keep.history_count, self._older_than_ns())

    def _forget(self) -> None:
        """Keep only the newest ended jobs in memory."""
        self._since_forgotten = 0
        for state, count in self._copy.forget_ended(self.keep.history_count, self._older_than_ns()).items():
            self._forgotten[state] += count

    def _older_than_ns(self) -> int:
        return self.clock() - int(self.keep.history_age_s * NS)

    def _reading(self) -> ClockReading:
        return ClockReading(self.boot_id, self.clock.offset_ns, self.clock())

    def try_durable(self) -> bool:
        """Open the file again if it has failed. Return whether the spool is durable."""
        self._copy.try_open()
        return self.durable

    def _pruned(self, pruned: Pruned) -> None:
        kept = self._store.counts()
        self._forgotten[State.DONE] = max(0, pruned.done - kept[State.DONE])
        self._forgotten[State.DEAD] = max(0, pruned.dead - kept[State.DEAD])

    def _taken_in(self, taken: TakenIn) -> None:
        """Note what the file had that the memory had not."""
        kept = self._store.counts()
        self._forgotten[State.DONE] = max(0, taken.done - kept[State.DONE])
        self._forgotten[State.DEAD] = max(0, taken.dead - kept[State.DEAD])
        self._hits = {**taken.hits, **self._hits}
        self._interrupted += taken.running
        self._snapshots = self._snapshots if taken.snapshots is None else taken.snapshots
        if taken.jobs:
            self.on_recoverable()

    # -- history -------------------------------------------------------------------------------------------------

    async def find_jobs(
        self, *, state: State | None = None, rule: str | None = None, limit: int = 100
    ) -> Found[list[Job]]:
        """Return jobs, newest first, without their events. `rule` is a glob."""
        pages = [page async for page in self.job_pages(FindJobs(state, rule, limit))]
        return Found([job for page in pages for job in page.value], pages[-1].why)

    def job_pages(self, query: FindJobs) -> AsyncIterator[Found[list[Job]]]:
        """Yield jobs, newest first, without their events, in pages that are read one after the other."""
        in_memory = self._store.jobs
        return paging.job_pages(self._copy.find, query, lambda: in_memory(query.state, query.rule, query.limit))

    async def find_job(self, job_id: int) -> Found[Job | None]:
        """Return one job with its events."""
        kept = self._store.job(job_id)
        if kept is not None:
            return Found(kept)
        found = await self._copy.find(FindJob(job_id))
        return Found(found) if isinstance(found, Job) else Found(None, reason_of(found))

    async def find_output(self, job_id: int) -> Found[str | None]:
        """Return the output of a job's last attempt that has ended, or None."""
        kept = self._copy.output_of(job_id)
        if kept is not None:
            return Found(kept or None)
        found = await self._copy.find(FindOutput(job_id))
        return Found(found) if isinstance(found, str) else Found(None, reason_of(found))

    async def find_matches(self, wanted: MatchFilter) -> Found[list[PastMatch]]:
        """Return past matches, newest first, or in order with `after`. Raises NotInHistoryError."""
        pages = [page async for page in self.match_pages(wanted)]
        return Found([match for page in pages for match in page.value], pages[-1].why)

    def match_pages(self, wanted: MatchFilter) -> AsyncIterator[Found[list[PastMatch]]]:
        """Yield past matches, newest first, in pages; the last may be empty. Raises NotInHistoryError."""
        return paging.match_pages(self._copy.find, FindMatches(wanted), lambda: self._memory().matches(wanted))

    async def count_matches(self, wanted: CountFilter) -> Found[tuple[MatchCount, ...]]:
        return await paging.count_matches(self._copy.find, wanted, lambda: self._memory().count_matches(wanted))

    def _memory(self) -> Store:
        self._store.replace_matches(self._copy.recent)
        return self._store
