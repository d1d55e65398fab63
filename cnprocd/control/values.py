"""Jobs and past matches as JSON values: one form, whether the daemon tells them or its spool is looked at."""

from __future__ import annotations

from dataclasses import asdict

from cnprocd.spool.job import Job
from cnprocd.spool.store import Match

Value = object


def job_value(job: Job) -> dict[str, Value]:
    # As the hook sees them: they were stored before the job had a number.
    events = [{**event, "job_id": job.job_id} for event in job.events]
    return {**asdict(job), "state": str(job.state), "events": events}


def match_value(match: Match) -> dict[str, Value]:
    return {"time_ns": match.time_ns, **match.record}
