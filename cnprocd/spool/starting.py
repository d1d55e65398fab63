"""An attempt from the choice of its job to its launch.

The job that a match has just made is chosen at once. While the process of the spool commits it, everything is prepared
that its hook needs but the order to start, which is given when the job is on the file. The commit contains the start.
So a job that the file has as running may not have been started: if the daemon is killed before the order, the next one
finds no process of the attempt, and runs the job again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from cnprocd.launch.attempt import Announce, Launcher, RunningAttempt
from cnprocd.launch.request import LaunchRequest
from cnprocd.launch.spawn import ReadyHook
from cnprocd.launch.user import ResolveUser
from cnprocd.spool.job import Job, JobRequest, job_of
from cnprocd.spool.promises import Promise, request_of
from cnprocd.spool.rows import Enqueued


@dataclass(slots=True)
class Starting:
    """A job that is marked as running, and whose hook is to be launched."""

    job: Job
    promise: Promise
    attempt_id: str
    request: LaunchRequest | None = None
    ready: ReadyHook | None = None

    def make_ready(self, launcher: Launcher, resolve_user: ResolveUser) -> None:
        """Prepare the launch. Never raises: an error comes again at the launch, where it is handled."""
        with contextlib.suppress(Exception):
            self.request = self.request_for(resolve_user)
            self.ready = launcher.make_ready(self.request)

    def request_for(self, resolve_user: ResolveUser) -> LaunchRequest:
        """Return the request of the attempt. Raises HookRefusedError or OSError: the user is not known, or not yet."""
        if self.request is not None:
            return self.request
        user = resolve_user(self.promise.hook.user, self.promise.hook.group)
        return request_of(self.job, self.promise, self.attempt_id, user)

    def launch(self, launcher: Launcher, request: LaunchRequest, announce: Announce) -> RunningAttempt:
        """Launch the hook. Raises HookRefusedError or OSError."""
        ready, self.ready = self.ready, None
        return launcher.launch(request, announce) if ready is None else launcher.launch(request, announce, ready)


def only_job(requests: Sequence[JobRequest], enqueued: Enqueued, boot_id: str) -> Job | None:
    """Return the job of a request if it is due and no other job waits: the spool need not be asked for it."""
    job_id = enqueued.job_ids[0] if len(requests) == 1 else None
    if job_id is None or requests[0].gather is not None or enqueued.waiting != 1:
        return None
    return job_of(job_id, requests[0], boot_id, enqueued.now_ns)
