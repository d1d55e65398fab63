"""Which hook a job runs: that of the rules in force, or else the one that was promised to it. PURE.

A rule that was changed: its waiting jobs run the new hook, so correcting a hook helps the jobs that wait for it. A rule
that was removed or renamed: its jobs run as they were promised, from the snapshot of the rules that they name. To drop
them is a decision of the administrator (`cnprocctl jobs drop`), not a side effect of an edit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cnprocd.launch.request import HookUser, LaunchRequest, newest_that_fit
from cnprocd.rules.ruleset import Backoff, Hook
from cnprocd.spool.job import Job, time_left_s

MOST_SNAPSHOTS = 60  # of former rules that are kept for jobs; the runner keeps at most 64 in total
NO_RULE = "its rule does not exist any more, and the rules that promised its hook are not kept"
NO_SNAPSHOT = "its rule does not exist any more, and the runner has no snapshot of the rules that promised its hook"

# For an attempt that the runner has started, and whose rules are kept no more: it is waited for, and never repeated.
_FORGOTTEN = Hook(
    command=(), user=None, group=None, timeout_s=3600.0, deadline_s=None, retries=0, backoff=Backoff(1.0, 1.0), env={},
    working_directory="/", umask=0o077, nice=0, limits=None, slots=None, serialize="none", output_limit_bytes=65536,
    on_failure=None,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Promise:
    """A hook, the digest of the snapshot that it is from, and whether its rule is in force."""

    hook: Hook
    snapshot: str
    in_force: bool


def request_of(job: Job, promise: Promise, attempt_id: str, user: HookUser) -> LaunchRequest:
    """Return the request of an attempt that starts now. Of very many events it has the newest."""
    events = newest_that_fit(job.events)
    return LaunchRequest(
        rule=job.rule,
        hook=promise.hook,
        user=user,
        job_id=job.job_id,
        attempt=job.attempts,
        attempt_id=attempt_id,
        events=tuple(events),
        limit_s=time_left_s(promise.hook, job),
        kernel_time_ns=job.kernel_time_ns,
        snapshot=promise.snapshot,
        events_left_out=len(job.events) - len(events),
    )


class Promises:
    """The hooks of the rules in force, and of former rules that jobs still refer to."""

    def __init__(self, hooks: Mapping[str, Hook], snapshot: str) -> None:
        self.snapshot = snapshot
        self.sought = 0  # searches for former rules that have not ended: see former_rules.py
        self._hooks = dict(hooks)
        self._former: dict[str, Mapping[str, Hook]] = {}

    def use(self, hooks: Mapping[str, Hook], snapshot: str, needed: Collection[str] | None) -> None:
        """Put other rules in force. Former ones are kept if jobs refer to them: `needed` has their digests.

        None: that is not known, and the latest are kept.
        """
        former = {**self._former, self.snapshot: self._hooks}
        kept = [digest for digest in former if digest != snapshot and (needed is None or digest in needed)]
        self._former = {digest: former[digest] for digest in kept[-MOST_SNAPSHOTS:]}
        self._hooks, self.snapshot = dict(hooks), snapshot

    def missing(self, needed: Collection[str]) -> frozenset[str]:
        """Return which of these snapshots have no hooks here."""
        return frozenset(needed) - self._former.keys() - {self.snapshot}

    def remember(self, former: Mapping[str, Mapping[str, Hook]]) -> None:
        """Add the hooks of former rules, by the digest of their snapshot."""
        self._former.update(former)

    def of(self, job: Job) -> Promise | None:
        """Return the hook that a job runs, or None if its rule is not in force and its snapshot is not kept."""
        hook = self._hooks.get(job.rule)
        if hook is not None:
            return Promise(hook, self.snapshot, in_force=True)
        hook = self._former.get(job.snapshot, {}).get(job.rule)
        return None if hook is None else Promise(hook, job.snapshot, in_force=False)

    def is_in_force(self, job: Job) -> bool:
        """Whether the rule of a job is in force."""
        return job.rule in self._hooks

    def of_running(self, job: Job) -> Promise:
        """Return the hook of a job that the runner has started, also if it is kept no more."""
        return self.of(job) or Promise(_FORGOTTEN, job.snapshot, in_force=False)

    def slots_of(self, rule: str) -> int | None:
        """Return how many slots a rule may use, in force or former, or None if it sets no limit.

        None are for a former rule whose hook may still be found.
        """
        if self.sought and rule not in self._hooks:
            return 0
        former = (hooks[rule] for hooks in reversed(self._former.values()) if rule in hooks)
        hook = self._hooks.get(rule) or next(former, None)
        return None if hook is None else hook.slots
