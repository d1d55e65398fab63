"""The verbs of the control socket: a table of small functions of the daemon and the arguments.

`status` and `metrics` look at the rule files first, and `reload` loads them; every other verb answers at once. The
accessors of json_value check the arguments, which come from outside; the server answers a JsonError as wrong usage.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from cnprocd.control import view
from cnprocd.control.problems import problem_value
from cnprocd.control.server import Args, Verb, VerbError
from cnprocd.control.tap import MATCHES
from cnprocd.control.values import job_value, match_value
from cnprocd.errors import EX_NO
from cnprocd.json_value import JsonValue, get_choice_or_none, get_int, get_str, get_str_or_none
from cnprocd.output import metrics
from cnprocd.rules.written import written_rule
from cnprocd.spool.job import State

MAX_LIMIT = 1000
_MAX_ID = (1 << 62) - 1  # of 64 bits, as SQLite keeps them
_MAX_NS = (1 << 63) - 1


def verbs_of(daemon: view.DaemonView) -> Mapping[str, Verb]:
    """Return the verbs of the daemon, by name."""
    return {
        "status": Verb(partial(_status, daemon)),
        "metrics": Verb(partial(_metrics, daemon)),
        "rule": Verb(partial(_rule, daemon)),
        "reload": Verb(partial(_reload, daemon), changes=True),
        "jobs": Verb(partial(_jobs, daemon)),
        "job": Verb(partial(_job, daemon)),
        "retry": Verb(partial(_retry, daemon), changes=True),
        "drop": Verb(partial(_drop, daemon), changes=True),
        "history": Verb(partial(_history, daemon)),
        "watch": Verb(lambda args: {"topic": MATCHES}, topic=MATCHES),
    }


async def _status(daemon: view.DaemonView, args: Args) -> JsonValue:
    await daemon.load_state.check()
    return view.status(daemon)


async def _metrics(daemon: view.DaemonView, args: Args) -> JsonValue:
    await daemon.load_state.check()
    return metrics.render(view.status(daemon))


async def _reload(daemon: view.DaemonView, args: Args) -> JsonValue:
    problem = await daemon.reload()
    if problem is not None:
        raise VerbError(
            problem.what,
            "keeping the current rules",
            problem.exit_status,
            rendered=problem.render(),
            problems=[problem_value(found) for found in problem.problems],
        )
    return {
        "rules": len(daemon.pipeline.matcher.rules),
        "files": [str(path) for path in daemon.loaded.files],
        "warnings": [problem_value(warning) for warning in daemon.loaded.warnings],
    }


def _rule(daemon: view.DaemonView, args: Args) -> JsonValue:
    name = get_str(args, "name")
    rule = next((rule for rule in daemon.loaded.rules if rule.name == name), None)
    if rule is None:
        raise VerbError(f'no rule named "{name}" is in force', "`cnprocctl rules list` shows the rules", EX_NO)
    return {"rule": written_rule(rule)}


def _jobs(daemon: view.DaemonView, args: Args) -> JsonValue:
    state = get_choice_or_none(args, "state", list(State))
    found = daemon.dispatcher.spool.jobs(
        state=State(state) if state is not None else None, rule=get_str_or_none(args, "rule"), limit=_limit(args)
    )
    return [job_value(job) for job in found]


def _job(daemon: view.DaemonView, args: Args) -> JsonValue:
    job_id = get_int(args, "job_id", minimum=0, maximum=_MAX_ID)
    job = daemon.dispatcher.spool.job(job_id)
    if job is None:
        raise VerbError(f"no job {job_id}", "`cnprocctl jobs list` shows the jobs that are kept", 1)
    return job_value(job)


def _retry(daemon: view.DaemonView, args: Args) -> JsonValue:
    job_id = get_int(args, "job_id", minimum=0, maximum=_MAX_ID)
    if not daemon.dispatcher.spool.revive(job_id):
        raise VerbError(f"job {job_id} is not dead", "only dead jobs can be retried; see `cnprocctl jobs show`", 1)
    daemon.dispatcher.scheduler.wake()
    return {"job_id": job_id, "state": "waiting"}


def _drop(daemon: view.DaemonView, args: Args) -> JsonValue:
    job_id = get_int(args, "job_id", minimum=0, maximum=_MAX_ID)
    if not daemon.dispatcher.spool.drop(job_id):
        raise VerbError(
            f"job {job_id} is not waiting", "only waiting jobs can be dropped; see `cnprocctl jobs show`", 1
        )
    return {"job_id": job_id, "state": "dead"}


def _history(daemon: view.DaemonView, args: Args) -> JsonValue:
    found = daemon.dispatcher.spool.matches(
        rule=get_str_or_none(args, "rule"),
        comm=get_str_or_none(args, "comm"),
        since_ns=get_int(args, "since_ns", 0, minimum=-_MAX_NS, maximum=_MAX_NS),
        limit=_limit(args),
    )
    return [match_value(match) for match in found]


def _limit(args: Args) -> int:
    return get_int(args, "limit", 100, minimum=1, maximum=MAX_LIMIT)
