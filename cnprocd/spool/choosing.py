"""Choose the job whose hook starts next: fair turns (turns.py) on the queues in the spool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from cnprocd.spool.job import NS, Job
from cnprocd.spool.spool import Spool
from cnprocd.spool.turns import KEYS_COMPARED, Turns, may_start


class Chooser:
    """Chooses jobs. `guaranteed` slots are kept free for each rule; jobs up to `last_old_job` are the backlog."""

    def __init__(self, spool: Spool, guaranteed: Mapping[str, int]) -> None:
        self.guaranteed = dict(guaranteed)
        self.last_old_job = 0
        self._spool = spool
        self._turns = Turns()
        self._held: dict[str, int] = {}  # serialize keys whose next job waits -> until when
        self._held_rules: dict[str, int] = {}  # rules whose hooks cannot be started now -> until when

    def note_start(self, job: Job) -> None:
        """Note that the hook of a job starts."""
        self._turns.note_start(job, self._spool.last_job_id())

    def use(self, guaranteed: Mapping[str, int]) -> None:
        """Use new rules. They may be what was missing: hold no rule any more."""
        self.guaranteed = dict(guaranteed)
        self._held_rules.clear()

    def hold(self, job: Job, due_ns: int, *, whole_rule: bool = False) -> None:
        """Let no job with the serialize key of this one pass it. It waits until `due_ns`, and its hook has not failed.

        `whole_rule`: let no other job of its rule start either. A job that waits for its next attempt after a failure
        is not held: its pause may be hours.
        """
        if job.serialize_key is not None:
            self._held[job.serialize_key] = due_ns
        if whole_rule:
            self._held_rules[job.rule] = due_ns

    def next_in_s(self, searched_ns: int) -> float | None:
        """Return the seconds until another job may start than those of the search at `searched_ns`; None: none will."""
        held_ns = (*self._held.values(), *self._held_rules.values())
        times_s = [max(0.0, (until_ns - self._spool.clock()) / NS) for until_ns in held_ns]
        due_s = self._spool.next_due_in_s(searched_ns)
        return min(times_s if due_s is None else [*times_s, due_s], default=None)

    def next_job(
        self,
        limit_of: Callable[[str], int | None],
        slots: int,
        busy: Sequence[Job],
        ending: Collection[Job],
        only: Job | None = None,
    ) -> Job | None:
        """Return the job that may start next in one of the `slots`, or None.

        `limit_of` returns the `slots:` of a rule. `busy` jobs have a running hook. The former hook of an `ending` job
        is still being ended. `only`: the one job that waits, if it is known. It is due, and no spool is asked for it.
        """
        running = Counter(job.rule for job in (*busy, *ending))
        now_ns = self._spool.clock()
        self._held = {key: due_ns for key, due_ns in self._held.items() if due_ns > now_ns}
        self._held_rules = {rule: due_ns for rule, due_ns in self._held_rules.items() if due_ns > now_ns}
        skip_keys = [job.serialize_key for job in (*busy, *ending) if job.serialize_key is not None] + list(self._held)
        skip_jobs = [job.job_id for job in ending]
        waiting = self._spool.waiting_rules() if only is None else {only.rule: only.job_id}
        oldest = {
            rule: job_id
            for rule, job_id in waiting.items()
            if rule not in self._held_rules
            and may_start(rule, running, limit=limit_of(rule), total=slots, guaranteed=self.guaranteed)
        }
        if only is not None:
            return only if oldest and only.serialize_key not in skip_keys else None
        for after_id in self._ages(slots, busy):
            for rule in self._turns.order(oldest, running):
                job = self._next_of(rule, after_id, skip_keys, skip_jobs)
                if job is not None:
                    return job
        return None

    def _ages(self, slots: int, busy: Sequence[Job]) -> Sequence[int]:
        """Return the job ids after which to search. The backlog takes at most half of the slots."""
        old = sum(job.job_id <= self.last_old_job for job in busy)
        if old >= max(1, slots // 2):
            return (self.last_old_job,)
        return (self.last_old_job, 0) if slots == 1 else (0,)

    def _next_of(self, rule: str, after_id: int, skip_keys: list[str], skip_jobs: list[int]) -> Job | None:
        """Return the next job of a rule: the oldest, but a key that started a hook lately lets others go first."""
        skipped: list[str] = list(skip_keys)
        found: list[Job] = []
        for _ in range(KEYS_COMPARED):
            jobs = self._spool.due(1, rule=rule, after_id=after_id, skip_keys=skipped, skip_jobs=skip_jobs)
            found += jobs
            if not jobs or jobs[0].serialize_key is None or self._turns.is_first(jobs[0]):
                break
            skipped.append(jobs[0].serialize_key)
        chosen = min(found, key=self._turns.of_key, default=None)
        if chosen is None or not after_id or chosen.serialize_key is None:
            return chosen
        # A new job does not pass one of the backlog with its key.
        return self._spool.due(1, rule=rule, key=chosen.serialize_key, skip_jobs=skip_jobs)[0]
