"""Jobs and past matches: jobs list, show, retry, drop; history.

The daemon answers, because it has the spool open. Without a daemon, list, show and history read a copy of the spool: to
open the file itself would lock it, and a daemon that starts at that moment would run without it. retry and drop need
the daemon.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cnprocd.cli.grammar import Options
from cnprocd.cli.quantities import window_ns
from cnprocd.cli.terminal import Style, ago, clock, columns, duration, print_json, text
from cnprocd.control.client import Client, NotRunningError
from cnprocd.errors import EX_OK, NotFoundError, StateError
from cnprocd.json_value import (
    JsonObject,
    JsonValue,
    as_dict,
    get_int,
    get_int_or_none,
    get_list,
    get_number_or_none,
    get_str,
    get_str_or_none,
    list_of,
)

if TYPE_CHECKING:  # imported only without a daemon
    from cnprocd.spool.store import Store

_COLOURS = {"waiting": "yellow", "running": "cyan", "done": "green", "dead": "red"}
_SPOOL = "spool.sqlite3"
Read = Callable[["Store"], JsonValue]
_objects = list_of(as_dict)


def listed(options: Options) -> int:
    """List the newest jobs."""

    def read(store: Store) -> JsonValue:
        from cnprocd.control.values import job_value

        return [job_value(job) for job in store.jobs(options.state, options.rule, options.limit)]

    args = {"state": options.state, "rule": options.rule, "limit": options.limit}
    found = _objects(_ask_or_read(options, "jobs", args, read))
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
    print(head)
    for line, job in zip(lines, found, strict=True):
        colour = _COLOURS.get(get_str(job, "state"))
        print(style(colour, line) if colour in ("red", "yellow") else line)
    if not rows:
        print("no jobs")
    return EX_OK


def _outcome(job: JsonObject) -> str:
    if reason := get_str_or_none(job, "reason"):
        return reason
    if get_str(job, "state") == "done":
        return f"succeeded in {duration((get_number_or_none(job, 'duration_ms') or 0) / 1000)}"
    return "-"


def show(options: Options) -> int:
    """Show one job with its events."""
    job = find_job(options, options.job)
    if options.json:
        print_json(job)
        return EX_OK
    style = Style()
    state, created_ns, finished_ns = (
        get_str(job, "state"),
        get_int(job, "created_ns"),
        get_int_or_none(job, "finished_ns"),
    )
    facts: dict[str, int | str | None] = {
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
    for name, value in facts.items():
        if value is not None:
            print(f"{style('bold', name.rjust(10))}  {value}")
    for event in get_list(job, "events", as_dict):
        print_json(event)
    return EX_OK


def _milliseconds(job: JsonObject, key: str) -> str | None:
    value = get_number_or_none(job, key)
    return None if value is None else duration(value / 1000)


def find_job(options: Options, job_id: int) -> JsonObject:
    """Return one job as JSON, from the daemon or its spool. Raises NotFoundError."""

    def read(store: Store) -> JsonValue:
        from cnprocd.control.values import job_value

        job = store.job(job_id)
        return job_value(job) if job is not None else None

    found = _ask_or_read(options, "job", {"job_id": job_id}, read)
    if found is None:
        raise NotFoundError(f"no job {job_id}", "`cnprocctl jobs list` shows the jobs that are kept")
    return as_dict(found)


def retry(options: Options) -> int:
    """Let dead jobs wait again, with all their attempts."""
    return _change(options, "retry", "waits again")


def drop(options: Options) -> int:
    """Do not run waiting jobs."""
    return _change(options, "drop", "will not run; it is kept as dead")


def _change(options: Options, verb: str, said: str) -> int:
    with Client(options.runtime_dir) as client:
        done = [client.ask(verb, job_id=job_id) for job_id in options.jobs]
    if options.json:
        print_json(done)
    else:
        for job_id in options.jobs:
            print(f"job {job_id} {said}")
    return EX_OK


def history(options: Options) -> int:
    """List past matches, the newest last, as in a log."""
    since_ns, _ = window_ns(options.since, None, time.time())

    def read(store: Store) -> JsonValue:
        from cnprocd.control.values import match_value

        return [match_value(match) for match in store.matches(options.rule, options.comm, since_ns, options.limit)]

    args = {"rule": options.rule, "comm": options.comm, "since_ns": since_ns, "limit": options.limit}
    found = _objects(_ask_or_read(options, "history", args, read))[::-1]
    if options.json:
        print_json(found)
        return EX_OK
    rows = [
        [
            clock(get_int(match, "time_ns")),
            get_str(match, "rule"),
            f"{text(match.get('comm'))}[{text(match.get('pid'))}]",
            text(match.get("user")),
            str(match.get("status") or get_str(match, "kind")),
            f"job {match['job_id']}" if match.get("job_id") else "-",
        ]
        for match in found
    ]
    for line in columns(rows, ["TIME", "RULE", "PROCESS", "USER", "WHAT", "HOOK"], Style()) if rows else ["no matches"]:
        print(line)
    return EX_OK


def _ask_or_read(options: Options, verb: str, args: JsonObject, read: Read) -> JsonValue:
    """Return the daemon's answer, or without a daemon what `read` finds in its spool."""
    try:
        with Client(options.runtime_dir) as client:
            return client.ask(verb, **args)
    except NotRunningError as not_running:
        if not (options.state_dir / _SPOOL).exists():
            raise
        return _read_copy(options.state_dir, read, not_running)


def _read_copy(state_dir: Path, read: Read, not_running: NotRunningError) -> JsonValue:
    from cnprocd.spool import database
    from cnprocd.spool.store import Store

    try:
        with tempfile.TemporaryDirectory(prefix="cnprocctl-") as directory:
            for name in (_SPOOL, f"{_SPOOL}-wal"):
                if (state_dir / name).exists():
                    shutil.copyfile(state_dir / name, Path(directory) / name)
            return read(Store(database.in_file(Path(directory) / _SPOOL)))
    except PermissionError as error:
        raise StateError(
            f"{not_running.what}, and its spool is private ({error.filename})", "run it as root"
        ) from error
    except sqlite3.Error as error:
        raise StateError(
            f"cannot read {state_dir / _SPOOL}: {error}", "the daemon renames a damaged one when it starts"
        ) from error
