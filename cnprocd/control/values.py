"""Jobs and past matches as JSON values, in one form for the daemon's answers and for commands that read its spool."""

from __future__ import annotations

from dataclasses import asdict

from cnprocd.json_value import JsonDict
from cnprocd.spool.job import Job
from cnprocd.spool.rows import PastMatch


def job_value(job: Job) -> JsonDict:
    """Return a job as JSON."""
    # The events were stored before the job had a number; the hook gets them with it.
    events = [{**event, "job_id": job.job_id} for event in job.events]
    return {**asdict(job), "state": str(job.state), "events": events}


def match_value(match: PastMatch) -> JsonDict:
    """Return a past match as JSON, with the state of its job now."""
    job = {"job_state": match.job_state, "job_reason": match.job_reason}
    return {"time_ns": match.time_ns, **match.record, **job}
