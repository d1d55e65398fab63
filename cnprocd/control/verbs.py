"""What the daemon does for cnprocctl: a table of verbs, each a small function of the daemon and its arguments.

Every verb answers with JSON values, and all but `reload` at once. Arguments are checked here, for they come from
outside; what is wrong with them is told as the command line would tell it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from cnprocd.control import view
from cnprocd.control.problems import problem_value
from cnprocd.control.protocol import Value
from cnprocd.control.server import Args, Verb, VerbError
from cnprocd.control.tap import MATCHES
from cnprocd.control.values import job_value, match_value
from cnprocd.output import metrics
from cnprocd.spool.job import State

MOST = 1000


def verbs_of(daemon: view.Daemon) -> Mapping[str, Verb]:
    """The daemon's verbs, by name."""
    return {
        "status": Verb(lambda args: view.status(daemon)),
        "metrics": Verb(lambda args: metrics.render(view.status(daemon))),
        "reload": Verb(partial(_reload, daemon), changes=True),
        "jobs": Verb(partial(_jobs, daemon)),
        "job": Verb(partial(_job, daemon)),
        "retry": Verb(partial(_retry, daemon), changes=True),
        "drop": Verb(partial(_drop, daemon), changes=True),
        "history": Verb(partial(_history, daemon)),
        "watch": Verb(lambda args: {"topic": MATCHES}, topic=MATCHES),
    }


async def _reload(daemon: view.Daemon, args: Args) -> Value:
    problem = await daemon.reload()
    if problem is not None:
        raise VerbError(
            problem.what,
            "the rules in force stay in force",
            problem.exit_status,
            rendered=problem.render(),
            problems=[problem_value(found) for found in problem.problems],
        )
    return {
        "rules": len(daemon.pipeline.matcher.rules),
        "files": [str(path) for path in daemon.loaded.files],
        "warnings": [warning.render() for warning in daemon.loaded.warnings],
    }


def _jobs(daemon: view.Daemon, args: Args) -> Value:
    state = _text(args, "state")
    if state is not None and state not in set(State):
        raise VerbError(f"{state!r} is not a state of jobs", "one of " + ", ".join(State))
    found = daemon.actions.spool.jobs(
        state=State(state) if state is not None else None, rule=_text(args, "rule"), limit=_limit(args)
    )
    return [job_value(job) for job in found]


def _job(daemon: view.Daemon, args: Args) -> Value:
    job_id = _number(args, "job_id")
    job = daemon.actions.spool.job(job_id)
    if job is None:
        raise VerbError(f"there is no job {job_id}", "`cnprocctl jobs list` shows those that are kept", 1)
    return job_value(job)


def _retry(daemon: view.Daemon, args: Args) -> Value:
    job_id = _number(args, "job_id")
    if not daemon.actions.spool.revive(job_id):
        raise VerbError(f"job {job_id} is not dead", "only dead jobs can be retried: `cnprocctl jobs show`", 1)
    daemon.actions.runner.wake()
    return {"job_id": job_id, "state": "waiting"}


def _drop(daemon: view.Daemon, args: Args) -> Value:
    job_id = _number(args, "job_id")
    if not daemon.actions.spool.drop(job_id):
        raise VerbError(f"job {job_id} does not wait", "only waiting jobs can be dropped: `cnprocctl jobs show`", 1)
    return {"job_id": job_id, "state": "dead"}


def _history(daemon: view.Daemon, args: Args) -> Value:
    since_ns = args.get("since_ns", 0)
    if not isinstance(since_ns, int):
        raise VerbError("since_ns is a number of nanoseconds since 1970")
    found = daemon.actions.spool.matches(
        rule=_text(args, "rule"), comm=_text(args, "comm"), since_ns=since_ns, limit=_limit(args)
    )
    return [match_value(match) for match in found]


def _text(args: Args, name: str) -> str | None:
    value = args.get(name)
    if value is not None and not isinstance(value, str):
        raise VerbError(f"{name} is a text")
    return value


def _number(args: Args, name: str) -> int:
    value = args.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise VerbError(f"{name} is a number")
    return value


def _limit(args: Args) -> int:
    value = args.get("limit", 100)
    if not isinstance(value, int) or not 1 <= value <= MOST:
        raise VerbError(f"limit is a number from 1 to {MOST}")
    return value
