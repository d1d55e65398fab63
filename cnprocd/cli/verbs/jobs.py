"""The queue of hooks and the past matches: jobs list, show, retry, drop; history.

With the daemon it answers, for it alone has the spool open. Without it, looking works on a copy of the spool: opening
the file itself would lock it, and a daemon that starts just then would do without. Changing needs the daemon.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnprocd.cli.grammar import Options
from cnprocd.cli.quantities import window_ns
from cnprocd.cli.terminal import Style, ago, clock, columns, duration, print_json, text
from cnprocd.control.client import Client, NotRunningError
from cnprocd.errors import EX_OK, NotFoundError, StateError

_COLOURS = {"waiting": "yellow", "running": "cyan", "done": "green", "dead": "red"}
_SPOOL = "spool.sqlite3"
Look = Callable[[Any], object]  # at a hooks.store.Store, which is imported only when there is no daemon


def listed(options: Options) -> int:
    """The newest jobs."""
    found: Any = _ask_or_look(
        options,
        "jobs",
        {"state": options.state, "rule": options.rule, "limit": options.limit},
        lambda store: store.jobs(options.state, options.rule, options.limit),
    )
    if options.json:
        print_json(found)
        return EX_OK
    style = Style()
    rows = [
        [
            str(job["job_id"]),
            job["state"],
            job["rule"],
            ago(job["created_ns"]),
            str(job["attempts"]),
            _outcome(job),
        ]
        for job in found
    ]
    lines = list(columns(rows, ["JOB", "STATE", "RULE", "AGE", "TRIES", "LAST OUTCOME"], style))
    for line, job in zip(lines, [None, *found], strict=True):
        colour = _COLOURS.get(job["state"]) if job is not None else None
        print(style(colour, line) if colour in ("red", "yellow") else line)
    if not rows:
        print("no jobs")
    return EX_OK


def _outcome(job: dict[str, Any]) -> str:
    if job["reason"]:
        return str(job["reason"])
    if job["state"] == "done":
        return f"succeeded in {duration((job['duration_ms'] or 0) / 1000)}"
    return "-"


def show(options: Options) -> int:
    """One job with its events."""
    job = find_job(options, options.job)
    if options.json:
        print_json(job)
        return EX_OK
    style = Style()
    facts = {
        "job": job["job_id"],
        "rule": job["rule"],
        "state": job["state"],
        "made": f"{clock(job['created_ns'])} ({ago(job['created_ns'])})",
        "tries": f"{job['attempts']}, {job['failures']} failed",
        "next try": clock(job["due_ns"]) if job["state"] == "waiting" else None,
        "ended": clock(job["finished_ns"]) if job["finished_ns"] else None,
        "outcome": _outcome(job),
        "exit code": job["exit_code"],
        "signal": job["signal"],
        "took": duration(job["duration_ms"] / 1000) if job["duration_ms"] is not None else None,
        "latency": duration(job["latency_ms"] / 1000) if job["latency_ms"] is not None else None,
        "events": job["event_count"],
    }
    for name, value in facts.items():
        if value is not None:
            print(f"{style('bold', name.rjust(10))}  {value}")
    for event in job["events"]:
        print_json(event)
    return EX_OK


def find_job(options: Options, job_id: int) -> dict[str, Any]:
    """One job as JSON, from the daemon or its spool. Raises NotFoundError."""
    job: Any = _ask_or_look(options, "job", {"job_id": job_id}, lambda store: store.job(job_id))
    if job is None:
        raise NotFoundError(f"no job {job_id}", "`cnprocctl jobs list` shows the jobs that are kept")
    found: dict[str, Any] = job
    return found


def retry(options: Options) -> int:
    """A dead job waits again, with all its tries."""
    return _change(options, "retry", "waits again")


def drop(options: Options) -> int:
    """A waiting job will not run."""
    return _change(options, "drop", "will not run; it is kept among the dead")


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
    """Past matches, the newest last, as a log is read."""
    since_ns, _ = window_ns(options.since, None, time.time())
    found: Any = _ask_or_look(
        options,
        "history",
        {"rule": options.rule, "comm": options.comm, "since_ns": since_ns, "limit": options.limit},
        lambda store: store.matches(options.rule, options.comm, since_ns, options.limit),
    )
    found.reverse()
    if options.json:
        print_json(found)
        return EX_OK
    rows = [
        [
            clock(match["time_ns"]),
            match["rule"],
            f"{text(match['comm'])}[{match['pid']}]",
            text(match.get("user")),
            str(match.get("status") or match["kind"]),
            f"job {match['job_id']}" if match.get("job_id") else "-",
        ]
        for match in found
    ]
    for line in columns(rows, ["TIME", "RULE", "PROCESS", "USER", "WHAT", "HOOK"], Style()) if rows else ["no matches"]:
        print(line)
    return EX_OK


def _ask_or_look(options: Options, verb: str, args: dict[str, Any], look: Look) -> object:
    """The daemon's answer, or without it what is in its spool."""
    try:
        with Client(options.runtime_dir) as client:
            return client.ask(verb, **args)
    except NotRunningError as not_running:
        if not (options.state_dir / _SPOOL).exists():
            raise
        return _plain(_look(options.state_dir, look, not_running))


def _look(state_dir: Path, look: Look, not_running: NotRunningError) -> object:
    from cnprocd.spool import database
    from cnprocd.spool.store import Store

    try:
        with tempfile.TemporaryDirectory(prefix="cnprocctl-") as directory:
            for name in (_SPOOL, f"{_SPOOL}-wal"):
                if (state_dir / name).exists():
                    shutil.copyfile(state_dir / name, Path(directory) / name)
            return look(Store(database.in_file(Path(directory) / _SPOOL)))
    except PermissionError as error:
        raise StateError(
            f"{not_running.what}, and its spool is private ({error.filename})", "run it as root"
        ) from error
    except sqlite3.Error as error:
        raise StateError(f"{state_dir / _SPOOL} cannot be read: {error}", "the daemon will move it aside") from error


def _plain(found: object) -> object:
    """Jobs and matches as the daemon would have told them."""
    from cnprocd.control.values import job_value, match_value
    from cnprocd.spool.job import Job

    if isinstance(found, list):
        return [job_value(one) if isinstance(one, Job) else match_value(one) for one in found]
    return job_value(found) if isinstance(found, Job) else None
