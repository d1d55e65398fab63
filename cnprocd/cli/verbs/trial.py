"""`cnprocctl test`: which rules would match a described event. Runs nothing and needs no daemon."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cnprocd.cli.drafts import draft_of
from cnprocd.cli.event_from_options import Accounts, DescriptionError, occurrence_of
from cnprocd.cli.grammar import Options
from cnprocd.cli.reasons import afterwards
from cnprocd.cli.ruleset import loaded_rules
from cnprocd.cli.standard_files import read_input
from cnprocd.cli.terminal import Style, print_json
from cnprocd.errors import EX_NO, EX_OK, CnprocdError, NotFoundError
from cnprocd.json_value import JsonDict, JsonError, JsonObject, as_dict, parse_json
from cnprocd.launch import render
from cnprocd.output.record import match_record, message
from cnprocd.process import procfs
from cnprocd.process.file_names import FileNames, look_up_here
from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.compile import Match, Matcher
from cnprocd.rules.language.load import system_group, system_user
from cnprocd.rules.ruleset import Hook

ACCOUNTS = Accounts(system_user, system_group)
_MOST_ANCESTORS = 64


def test(options: Options) -> int:
    """Show each rule that would fire, with its record and the argument list of its hook."""
    loaded = loaded_rules(options.rules, draft=draft_of(options))
    matcher = Matcher(loaded.rules)
    occurrence = occurrence_from(options, described(options), matcher)
    matches = matcher.match(occurrence)
    found = [_outcome(match) for match in matches]
    if options.json:
        print_json([asdict(one) for one in found])
        return EX_OK if found else EX_NO
    if _assumes_success(options, occurrence):
        print("taken as an exit with code 0, because no end is given: see --exit-code, --signal and --kind")
    if _may_have_had_another_path(occurrence.process):
        print(
            "its program was moved or changed after the process started: only the daemon knows paths that it had before"
        )
    if not found:
        rules = sum(1 for rule in loaded.rules if rule.enabled)
        print(f"{_none_of(rules)}; `cnprocctl explain` with the same options shows why")
    else:
        _show(found)
    return EX_OK if found else EX_NO


def occurrence_from(options: Options, event: JsonObject, matcher: Matcher) -> Occurrence:
    """Return the event of the EVENT options, which `described` returned, or of a running process.

    The program of a process that ends is known as its exit record will name it to these rules. Raises DescriptionError.
    """
    if options.pid is None or options.comm is not None or options.event is not None:
        return occurrence_of(event, ACCOUNTS)
    occurrence = _of_process(options.pid, event)
    if occurrence.kind == "exit" and options.exe is None:
        _take_executed_file(occurrence.process, matcher)
    return occurrence


def _assumes_success(options: Options, occurrence: Occurrence) -> bool:
    """Return whether the event is an exit whose status the options leave open."""
    given = (options.exit_code, options.status, options.event)
    return occurrence.kind == "exit" and occurrence.status == 0 and all(one is None for one in given)


def _none_of(rules: int) -> str:
    return {0: "no rule is enabled", 1: "the rule would not fire"}.get(rules, f"none of {rules} rules would fire")


def described(options: Options) -> JsonDict:
    """Return the event that the options describe, with the field names of a record."""
    event: JsonDict = _json(options.event) if options.event is not None else {}
    milliseconds = {"lifetime_ms": options.lifetime, "cpu_time_ms": options.cpu_time}
    given: JsonDict = {
        "kind": options.kind,
        "pid": options.pid,
        "comm": options.comm,
        "exit_code": options.exit_code,
        "signal": options.signal,
        "wait_status": options.status,
        "core_dumped": options.core or None,
        "oom_killed": options.oom_killed or None,
        "recovered": options.lost or None,
        "user": options.user,
        "euid": options.euid,
        "loginuid": options.loginuid,
        "group": options.group,
        "exe": options.exe,
        "exe_claimed": options.exe_claimed,
        "cmdline": options.cmdline,
        "unit": options.unit,
        "user_unit": options.user_unit,
        "container": options.container,
        "pod_uid": options.pod_uid,
        "cgroup": options.cgroup,
        "parent_comm": options.parent,
        "ancestors": options.ancestor or None,
        "max_rss_kib": options.max_rss // 1024 if options.max_rss is not None else None,
        "from_hook": options.from_hook or None,
        "thread": options.thread or None,
        **{name: value * 1000 if value is not None else None for name, value in milliseconds.items()},
    }
    event.update({name: value for name, value in given.items() if value is not None})
    if isinstance(event.get("status"), str):  # the text of a log record, which has exit_code and signal as well
        del event["status"]
    return event


def _json(given: str) -> JsonDict:
    text: str | bytes = given
    if given == "-":
        text = read_input()
    elif given.startswith("@"):
        try:
            text = Path(given[1:]).read_bytes()
        except OSError as error:
            raise CnprocdError(
                f"cannot read {given[1:]}: {error.strerror}", "give @FILE, or the JSON itself"
            ) from error
    try:
        return dict(as_dict(parse_json(text)))
    except JsonError as error:
        raise DescriptionError(
            f"invalid --event: {error.what}", 'give an object like {"comm": "ora_pmon_X", "exit_code": 3}'
        ) from error


def _of_process(pid: int, event: JsonObject) -> Occurrence:
    """Return the described event as if it happened to a running process now."""
    process = procfs.read_process(pid)
    if process is None:
        raise NotFoundError(f"no process {pid}", "`ps -e` shows the processes that run")
    occurrence = occurrence_of(event, ACCOUNTS)
    given = occurrence.process  # options beside --pid replace attributes of the process
    process.uid = process.uid if given.uid is None else given.uid
    process.gid = process.gid if given.gid is None else given.gid
    process.take_more_ids(given)
    process.exe = process.exe if given.exe is None else given.exe
    process.cmdline = process.cmdline if given.cmdline is None else given.cmdline
    process.cgroup = process.cgroup if given.cgroup is None else given.cgroup
    occurrence.process = process
    occurrence.tid = pid
    if occurrence.kernel_time_ns is None:
        occurrence.kernel_time_ns = time.monotonic_ns()
    occurrence.ancestors = occurrence.ancestors or _ancestors(process)
    return occurrence


def _take_executed_file(process: Process, matcher: Matcher) -> None:
    """Take what the exit record of a running process will show: a path that rules name, or that it is none of them."""
    if process.exe_file is None or not matcher.exe_paths:
        return
    try:
        files = FileNames(look_up_here)
    except OSError:  # no inotify instance: the daemon has none either, or it is another user's limit
        return
    with contextlib.closing(files):
        files.use(matcher.exe_paths, None)
        found = files.find(process.exe_file, process.comm)
        process.exe_is_unnamed = found is None and files.knows_all_named
    if found is not None:
        process.take_executed_file(process.exe_file, found)


def _may_have_had_another_path(process: Process) -> bool:
    """Whether a rule may name a former path of the program: a rename changes the ctime of the file."""
    if not process.exe_is_unnamed or process.exe is None or process.start_ns is None:
        return False
    try:
        changed_ns = os.stat(f"/proc/{process.tgid}/exe").st_ctime_ns
    except OSError:
        return False
    return changed_ns > time.time_ns() - (time.monotonic_ns() - process.start_ns)


def _ancestors(process: Process) -> tuple[Process, ...]:
    chain: list[Process] = []
    while process.ppid and len(chain) < _MOST_ANCESTORS:
        parent = procfs.read_process(process.ppid)
        if parent is None:
            break
        chain.append(parent)
        process = parent
    return tuple(chain)


@dataclass(frozen=True, slots=True)
class HookPreview:
    """The hook that a rule would run. The names of the fields are those of `test --json`."""

    argv: list[str]
    user: str | int
    timeout_s: float
    retries: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One match of the described event. The names of the fields are those of `test --json`."""

    rule: str
    level: str | None
    message: str | None
    record: JsonDict
    hook: HookPreview | None
    only_logged: bool
    may_be_held_back_by: list[str]
    counted_by: dict[str, str]  # of each of these keys: rule, or a field


def _outcome(match: Match) -> Outcome:
    rule = match.rule.rule
    record = match_record(match, procfs.user_name)
    if not match.occurrence.process.tgid:  # described without a PID
        record["pid"] = record["tid"] = None
    return Outcome(
        rule=rule.name,
        level=rule.log.level if rule.log is not None else None,
        message=message(rule.log.message, record) if rule.log is not None else None,
        record=record,
        hook=_preview(rule.run, record) if rule.run is not None and not match.log_only else None,
        only_logged=match.log_only,
        may_be_held_back_by=list(afterwards(match.rule)),
        counted_by=afterwards(match.rule),
    )


def _preview(hook: Hook, record: JsonObject) -> HookPreview:
    argv = render.argv(hook, {**record, "job_id": 0})  # the job gets its number when it is queued
    return HookPreview(
        argv=[part.decode("utf-8", "backslashreplace") for part in argv],
        user=hook.user if hook.user is not None else "root",
        timeout_s=hook.timeout_s,
        retries=hook.retries,
    )


def _show(found: list[Outcome]) -> None:
    style = Style()
    for one in found:
        print(style("bold", f"{one.rule} fires"))
        if one.level is not None:
            print(f"    log   {one.level}: {one.message}")
        if one.hook is not None:
            print(f"    hook  {json.dumps(one.hook.argv)} as {one.hook.user}, at most {one.hook.timeout_s:g} s")
        elif one.only_logged:
            print("    hook  not run: the exit status is unknown and on_unknown_exit is log")
        if one.may_be_held_back_by:
            counted = (f"{key} (by {by})" if by != "rule" else key for key, by in one.counted_by.items())
            print(f"    may be held back by {', '.join(counted)}")
        known = {name: value for name, value in one.record.items() if value is not None and name != "rule"}
        print("    " + json.dumps(known))
