"""`cnprocctl test`: which rules would fire on an event that somebody describes; runs nothing and needs no daemon."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from cnprocd.cli.event_from_options import DescriptionError, Names, occurrence_of
from cnprocd.cli.grammar import Options
from cnprocd.cli.reasons import afterwards
from cnprocd.cli.ruleset import loaded_rules
from cnprocd.cli.terminal import Style, print_json
from cnprocd.errors import EX_NO, EX_OK, NotFoundError
from cnprocd.json_value import JsonDict, JsonError, JsonObject, as_dict, as_str, get_list, parse_json
from cnprocd.launch import render
from cnprocd.output.record import match_record, message
from cnprocd.process import procfs
from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.compile import Match, Matcher
from cnprocd.rules.language.load import _system_group, _system_user

NAMES = Names(_system_user, _system_group)
_MOST_ANCESTORS = 64


def test(options: Options) -> int:
    """Each rule that would fire, with its record and its hook's argument list."""
    loaded = loaded_rules(options.rules)
    occurrence = occurrence_from(options)
    matches = Matcher(loaded.rules).match(occurrence)
    found = [_outcome(match) for match in matches]
    if options.json:
        print_json(found)
    elif not found:
        rules = sum(1 for rule in loaded.rules if rule.enabled)
        print(f"none of {rules} rules would fire; `cnprocctl explain` with the same options says why")
    else:
        _show(found)
    return EX_OK if found else EX_NO


def occurrence_from(options: Options) -> Occurrence:
    """The event of EVENT options: described, read as JSON, or of a process that runs now. Raises DescriptionError."""
    said = described(options)
    if options.pid is not None and options.comm is None and options.event is None:
        return _of_process(options.pid, said)
    return occurrence_of(said, NAMES)


def described(options: Options) -> JsonDict:
    """What the options say, as a record would say it."""
    said: JsonDict = _json(options.event) if options.event is not None else {}
    milliseconds = {"lifetime_ms": options.lifetime, "cpu_time_ms": options.cpu_time}
    given: JsonDict = {
        "kind": options.kind,
        "pid": options.pid,
        "comm": options.comm,
        "exit_code": options.exit_code,
        "signal": options.signal,
        "wait_status": options.status,
        "core_dumped": options.core or None,
        "recovered": options.lost or None,
        "user": options.user,
        "group": options.group,
        "exe": options.exe,
        "cmdline": options.cmdline,
        "unit": options.unit,
        "cgroup": options.cgroup,
        "parent_comm": options.parent,
        "ancestors": options.ancestor or None,
        "max_rss_kib": options.max_rss // 1024 if options.max_rss is not None else None,
        "from_hook": options.from_hook or None,
        "thread": options.thread or None,
        **{name: value * 1000 if value is not None else None for name, value in milliseconds.items()},
    }
    said.update({name: value for name, value in given.items() if value is not None})
    if isinstance(said.get("status"), str):  # a log record says it in words, besides exit_code and signal
        del said["status"]
    return said


def _json(given: str) -> JsonDict:
    text = given
    if given == "-":
        text = sys.stdin.read()
    elif given.startswith("@"):
        text = Path(given[1:]).read_text(encoding="utf-8")
    try:
        return dict(as_dict(parse_json(text)))
    except JsonError as error:
        raise DescriptionError(
            f"invalid --event: {error.what}", 'give an object like {"comm": "ora_pmon_X", "exit_code": 3}'
        ) from error


def _of_process(pid: int, said: JsonObject) -> Occurrence:
    """A process that runs now, as if what is said had happened to it now."""
    process = procfs.read_process(pid)
    if process is None:
        raise NotFoundError(f"no process {pid}", "`ps -e` shows the processes that run")
    occurrence = occurrence_of(said, NAMES)
    described = occurrence.process
    for field in ("uid", "gid", "exe", "cmdline", "cgroup"):
        if getattr(described, field) is not None:  # what is said besides --pid counts more
            setattr(process, field, getattr(described, field))
    occurrence.process = process
    occurrence.tid = pid
    if occurrence.kernel_time_ns is None:
        occurrence.kernel_time_ns = time.monotonic_ns()
    occurrence.ancestors = occurrence.ancestors or _ancestors(process)
    return occurrence


def _ancestors(process: Process) -> tuple[Process, ...]:
    chain: list[Process] = []
    while process.ppid and len(chain) < _MOST_ANCESTORS:
        parent = procfs.read_process(process.ppid)
        if parent is None:
            break
        chain.append(parent)
        process = parent
    return tuple(chain)


def _outcome(match: Match) -> JsonDict:
    rule = match.rule.rule
    record = match_record(match, procfs.user_name)
    if not match.occurrence.process.tgid:  # described without a PID
        record["pid"] = record["tid"] = None
    hook = None
    if rule.run is not None and not match.log_only:
        hook = {
            "argv": [
                part.decode("utf-8", "backslashreplace") for part in render.argv(rule.run, {**record, "job_id": 0})
            ],
            "user": rule.run.user if rule.run.user is not None else "root",
            "timeout_s": rule.run.timeout_s,
            "retries": rule.run.retries,
        }
    return {
        "rule": rule.name,
        "level": rule.log.level if rule.log is not None else None,
        "message": message(rule.log.message, record) if rule.log is not None else None,
        "record": record,
        "hook": hook,
        "only_logged": match.log_only,
        "may_be_held_back_by": afterwards(match.rule),
    }


def _show(found: list[JsonDict]) -> None:
    style = Style()
    for one in found:
        print(style("bold", f"{one['rule']} fires"))
        if one["level"]:
            print(f"    log   {one['level']}: {one['message']}")
        hook = one["hook"]
        if isinstance(hook, dict):
            print(f"    hook  {json.dumps(hook['argv'])} as {hook['user']}, at most {hook['timeout_s']:g} s")
        elif one["only_logged"]:
            print("    hook  not run: the exit status is unknown and on_unknown_exit is log")
        if held := get_list(one, "may_be_held_back_by", as_str):
            print(f"    may be held back by {', '.join(held)}")
        record = one["record"]
        assert isinstance(record, dict)
        known = {name: value for name, value in record.items() if value is not None and name != "rule"}
        print("    " + json.dumps(known))
