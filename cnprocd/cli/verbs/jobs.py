"""Jobs: jobs list, show, log, retry, drop and kill. list, show and log need no daemon."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cnprocd.cli.grammar import Options
from cnprocd.cli.rule_names import known_names, require_rule
from cnprocd.cli.spool_access import ask_or_read
from cnprocd.cli.terminal import Style, ago, clock, columns, duration, print_json
from cnprocd.control.client import Client, RefusedError
from cnprocd.errors import EX_NO, EX_OK, CnprocdError, NotFoundError
from cnprocd.json_value import (
    JsonDict,
    JsonObject,
    JsonValue,
    as_dict,
    as_int,
    get_dict,
    get_int,
    get_int_or_none,
    get_list,
    get_number_or_none,
    get_str,
    get_str_or_none,
)

if TYPE_CHECKING:  # imported only without a daemon
    from cnprocd.spool.store import Store

_COLOURS = {"waiting": "yellow", "running": "cyan", "done": "green", "dead": "red"}
_LINES_SHOWN = 20  # of a job's output by `jobs show`
_FOLLOW_EVERY_S = 0.25


def listed(options: Options) -> int:
    """List the newest jobs."""

    def read(store: Store) -> JsonObject:
        from cnprocd.control.values import job_value

        return {"jobs": [job_value(job) for job in store.jobs(options.state, options.rule, options.limit)]}

    args = {"state": options.state, "rule": options.rule, "limit": options.limit}
    found = get_list(ask_or_read(options, "jobs", args, read), "jobs", as_dict)
    if not found:
        require_rule(options.rule, lambda: known_names(options))
    if options.json:
        print_json(found)
        return EX_OK
    style = Style()
    rows = [
        [
            str(get_int(job, "job_id")),
            get_str(job, "state"),
            get_str(job, "rule"),
            ago(get_int(job, "created_ns")),
            str(get_int(job, "attempts")),
            _outcome(job),
        ]
        for job in found
    ]
    head, *lines = columns(rows, ["JOB", "STATE", "RULE", "AGE", "ATTEMPTS", "LAST OUTCOME"], style)
    print(head if rows else "no jobs")
    for line, job in zip(lines, found, strict=True):
        colour = _COLOURS.get(get_str(job, "state"))
        print(style(colour, line) if colour in ("red", "yellow") else line)
    return EX_OK


def _outcome(job: JsonObject) -> str:
    if reason := get_str_or_none(job, "reason"):
        return reason
    if get_str(job, "state") == "done":
        return f"succeeded in {duration((get_number_or_none(job, 'duration_ms') or 0) / 1000)}"
    return "-"


def show(options: Options) -> int:
    """Show one job with its events and the end of its output."""
    job, output = find_job(options, options.job), _output(options, options.job)
    if options.json:
        print_json({**job, "output": get_str(output, "output")})
        return EX_OK
    style = Style()
    for name, value in _facts(job).items():
        if value is not None:
            print(f"{style('bold', name.rjust(10))}  {value}")
    lines = get_str(output, "output").splitlines()
    if len(lines) > _LINES_SHOWN:
        print(f"{style('bold', 'output'.rjust(10))}  the last {_LINES_SHOWN} of {len(lines)} lines; see `jobs log`")
    for line in lines[-_LINES_SHOWN:]:
        print(f"{style('bold', 'output'.rjust(10)) if len(lines) <= _LINES_SHOWN else ' ' * 10}  {line}")
    for event in get_list(job, "events", as_dict):
        print_json(event)
    return EX_OK


def _facts(job: JsonObject) -> dict[str, int | str | None]:
    state, created_ns = get_str(job, "state"), get_int(job, "created_ns")
    finished_ns = get_int_or_none(job, "finished_ns")
    return {
        "job": get_int(job, "job_id"),
        "rule": get_str(job, "rule"),
        "state": state,
        "created": f"{clock(created_ns)} ({ago(created_ns)})",
        "attempts": f"{get_int(job, 'attempts')}, {get_int(job, 'failures')} failed",
        "next": clock(get_int(job, "due_ns")) if state == "waiting" else None,
        "ended": clock(finished_ns) if finished_ns else None,
        "outcome": _outcome(job),
        "exit code": get_int_or_none(job, "exit_code"),
        "signal": get_int_or_none(job, "signal"),
        "took": _milliseconds(job, "duration_ms"),
        "latency": _milliseconds(job, "latency_ms"),
        "events": get_int(job, "event_count"),
    }


def _milliseconds(job: JsonObject, key: str) -> str | None:
    value = get_number_or_none(job, key)
    return None if value is None else duration(value / 1000)


def find_job(options: Options, job_id: int) -> JsonObject:
    """Return one job as JSON, from the daemon or its spool. Raises NotFoundError."""

    def read(store: Store) -> JsonObject:
        from cnprocd.control.values import job_value

        job = store.job(job_id)
        if job is None:
            raise _no_job(job_id)
        return {"job": job_value(job)}

    return get_dict(ask_or_read(options, "job", {"job_id": job_id}, read), "job")


def _no_job(job_id: int) -> NotFoundError:
    return NotFoundError(f"no such job: {job_id}", "`cnprocctl jobs list` shows the jobs that are kept")


def log(options: Options) -> int:
    """Print the output of a job's last attempt. With --follow, go on until the attempt ends."""
    first = _output(options, options.job)
    if options.json:
        print_json(first)
        return EX_OK
    printed = ""
    for output in _outputs(options, first):
        text = get_str(output, "output")
        # A new attempt begins anew.
        print(text.removeprefix(printed), end="", flush=True)
        printed = text
    if not printed:
        print(f"cnprocctl: job {options.job} has no output", file=sys.stderr)
    return EX_OK


def _outputs(options: Options, output: JsonObject) -> Iterator[JsonObject]:
    yield output
    while options.follow and get_str(output, "state") in ("waiting", "running"):
        time.sleep(_FOLLOW_EVERY_S)
        output = _output(options, options.job)
        yield output


def _output(options: Options, job_id: int) -> JsonObject:
    """Return the output of a job's last attempt as the daemon answers it. Raises NotFoundError."""

    def read(store: Store) -> JsonObject:
        job = store.job(job_id)
        if job is None:
            raise _no_job(job_id)
        output = store.output(job_id) or ""
        return {"job_id": job_id, "state": str(job.state), "attempt": job.attempts, "output": output}

    return ask_or_read(options, "output", {"job_id": job_id}, read)


def retry(options: Options) -> int:
    """Let dead jobs wait again, with all their attempts: those that are named, those of a rule, or all."""
    _require_choice(options, "retry")
    if options.jobs:
        return _each(options, lambda client, job_id: client.ask("retry", job_id=job_id), "waits again")
    return _together(options, "retry_dead", "waiting", ("job waits again", "jobs wait again", "no dead jobs"))


def drop(options: Options) -> int:
    """Cancel waiting jobs: those that are named, those of a rule, or all."""
    _require_choice(options, "drop")
    if options.jobs:
        return _each(options, lambda client, job_id: client.ask("drop", job_id=job_id), "is dead and will not run")
    texts = ("job is dead and will not run", "jobs are dead and will not run", "no waiting jobs")
    return _together(options, "drop_waiting", "dead", texts)


def _require_choice(options: Options, verb: str) -> None:
    """Raise an error unless the jobs are given in one of the three ways."""
    if sum([bool(options.jobs), options.all, options.rule is not None]) != 1:
        error = CnprocdError(f"which jobs to {verb} is not clear", "give job numbers, or --rule NAME, or --all")
        error.exit_status = 2
        raise error


def _together(options: Options, verb: str, state: str, texts: tuple[str, str, str]) -> int:
    """Change the jobs of a rule, or all. `texts`: for one, for several, and for none."""
    with Client(options.runtime_dir) as client:
        answer = client.ask(verb, rule=options.rule)
    done = get_list(answer, "job_ids", as_int)
    deferred = get_int_or_none(answer, "deferred") or 0
    if not done and not deferred:
        require_rule(options.rule, lambda: known_names(options))
    one, several, none = texts
    if options.json:
        print_json([{"job_id": job_id, "state": state} for job_id in done])
    else:
        if done or not deferred:
            print(f"{len(done)} {one if len(done) == 1 else several}" if done else none)
        if deferred:
            print(f"{deferred} deferred {'job' if deferred == 1 else 'jobs'} dropped, and their matches counted")
    return EX_OK


def kill(options: Options) -> int:
    """End running hooks."""
    after = "is being ended; the retries that are left follow" if options.retry else "is being ended; it will be dead"
    return _each(options, lambda client, job_id: client.ask("kill", job_id=job_id, retry=options.retry), after)


def _each(options: Options, change: Callable[[Client, int], JsonValue], after: str) -> int:
    """Change each of the jobs. Report those that cannot be changed, go on, and return 1 in the end."""
    done: list[JsonValue] = []
    failed = False
    style = Style(sys.stderr)
    with Client(options.runtime_dir) as client:
        for job_id in options.jobs:
            try:
                done.append(change(client, job_id))
            except RefusedError as error:
                if error.exit_status != EX_NO:
                    raise
                failed = True
                refused: JsonDict = {"job_id": job_id, "error": error.what}
                done.append(refused)
                if not options.json:
                    print(error.render(style("red", "cnprocctl:") + " "), file=sys.stderr)
                continue
            if not options.json:
                print(f"job {job_id} {after}")
    if options.json:
        print_json(done)
    return EX_NO if failed else EX_OK
