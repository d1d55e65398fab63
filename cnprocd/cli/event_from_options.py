"""From a described event to an occurrence that rules can be evaluated on, for `test`, `explain` and `watch --match`.

A description is a flat JSON object with the field names of log records. The options of a command line are turned into
one, a log record or the event of a job is one, and a live process is read into one. So a description means the same
everywhere, and a log record can be pasted. A field that is not given is unknown. The defaults: the kind is exit, an
exit without a status succeeded, and the OOM killer had no part in it.

Users and groups are looked up by the functions given; all else is pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from cnprocd.connector.status import CORE_FLAG, SIGNAL_NAMES, term_signal
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.errors import CnprocdError
from cnprocd.json_value import (
    JsonError,
    JsonObject,
    JsonValue,
    as_dict,
    get_bool,
    get_int,
    get_int_or_none,
    get_list,
    get_number_or_none,
    get_str_or_none,
)
from cnprocd.launch.render import exact
from cnprocd.output.record import MATCH_FIELDS
from cnprocd.process.cgroup_path import Container, Placement, placement_of
from cnprocd.process.model import NO_LOGIN, Image, Kind, MoreIds, Occurrence, Process
from cnprocd.process.oom import SIGKILL
from cnprocd.rules.language.syntax import signal_numbers
from cnprocd.rules.language.value_problem import did_you_mean
from cnprocd.rules.ruleset import LOGIN_UNSET

FIELDS = (
    *MATCH_FIELDS, "status", "wait_status", "oom_killed", "exe_claimed", "exe_deleted", "cmdline_truncated", "user",
    "group", "cgroup", "user_unit", "container", "containers", "runtime", "pod_uid", "parent_comm", "ancestors",
    "lifetime_ms", "cpu_time_ms", "max_rss_kib", "read_bytes", "write_bytes", "from_hook", "thread", "ruid", "euid",
    "loginuid", "rgid", "egid", "tracer_pid", "tracer_tid", "time_ns", "timestamp", "level", "event", "message",
    "held_by", "job_state", "job_reason",
)  # fmt: skip
_EXITS = ("exit", "nonzero_exit")
_SIGNALS = {name: number for number, name in SIGNAL_NAMES.items()}


class DescriptionError(CnprocdError):
    """The description contradicts itself or has an unknown field or value."""

    exit_status = 2


@dataclass(slots=True)
class _DescribedProcess(Process):
    """A process whose unit, container and pod may be given without a cgroup."""

    described: Placement | None = None

    @property
    def placement(self) -> Placement | None:
        return placement_of(self.cgroup) if self.cgroup is not None else self.described


@dataclass(frozen=True, slots=True)
class Accounts:
    """Look up the ids of users and groups by name; None if there is no such name."""

    user: Callable[[str], int | None]
    group: Callable[[str], int | None]


def occurrence_of(event: JsonObject, accounts: Accounts) -> Occurrence:
    """Return the occurrence that is described. Raises DescriptionError."""
    _check_fields(event)
    try:
        return _occurrence(event, accounts)
    except JsonError as error:
        raise DescriptionError(f"invalid event: {error.what}") from error


def _occurrence(event: JsonObject, accounts: Accounts) -> Occurrence:
    kind = str(event.get("kind") or "exit")
    status = _status(event, kind)
    process = _process(event, accounts)
    pid = process.tgid
    at_ns = get_int_or_none(event, "kernel_time_ns")
    lifetime_ms = get_number_or_none(event, "lifetime_ms")
    if lifetime_ms is not None:
        at_ns = at_ns if at_ns is not None else 1 << 60
        process.start_ns = at_ns - round(lifetime_ms * 1e6)
    return Occurrence(
        kind="exit" if kind in _EXITS else cast(Kind, kind),
        process=process,
        tid=get_int_or_none(event, "tid") or pid,
        status=status,
        kernel_time_ns=at_ns,
        cpu=get_int_or_none(event, "cpu"),
        recovered=_flag(event, "recovered"),
        of_thread=_flag(event, "thread"),
        usage=_usage(event, process, status),
        ancestors=_ancestors(event, process),
        from_hook=_flag(event, "from_hook"),
        oom=_oom_killed(event, status),
    )


def _check_fields(event: JsonObject) -> None:
    for name in event:
        if name not in FIELDS and not name.endswith("_hex"):
            raise DescriptionError(f'unknown field "{name}"', did_you_mean(name, FIELDS) or ", ".join(FIELDS))
    kind = event.get("kind")
    known = (*_EXITS, "fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "coredump")
    if kind is not None and kind not in known:
        raise DescriptionError(f"unknown kind of event {_quoted(kind)}", f"one of {', '.join(known)}")


def _status(event: JsonObject, kind: str) -> int | None:
    """Return the wait status, or None. Raises DescriptionError if it is given twice, or for an event without one."""
    code, name, wait = get_int_or_none(event, "exit_code"), event.get("signal"), get_int_or_none(event, "wait_status")
    given = [one for one, value in (("exit_code", code), ("signal", name), ("wait_status", wait)) if value is not None]
    if kind not in _EXITS:
        if given:
            raise DescriptionError(f"{given[0]} is only valid for an exit, and the kind is {kind}", "use --kind exit")
        return None
    if len(given) > 1:
        raise DescriptionError(f"{given[0]} conflicts with {given[1]}", "give one of them")
    if _flag(event, "recovered") and not given:
        return None
    if wait is not None:
        if not 0 <= wait <= 0xFFFF:
            raise DescriptionError(
                f"invalid wait status {wait}", "code*256 for exit(code), or the number of the signal"
            )
        return wait
    if name is not None:
        return _signal_number(name) | (CORE_FLAG if _flag(event, "core_dumped") else 0)
    if code is not None:
        if not 0 <= code <= 255:
            raise DescriptionError(f"invalid exit code {code}", "0 to 255")
        return code << 8
    if kind == "nonzero_exit":
        raise DescriptionError("a nonzero_exit needs a failure", "add --exit-code N or --signal NAME")
    return 0


def _oom_killed(event: JsonObject, status: int | None) -> bool | None:
    """Return whether the OOM killer ended the process; None if that is given as null, or the status is unknown."""
    if "oom_killed" not in event:
        return None if status is None else False
    given = event["oom_killed"]
    if given and (status is None or term_signal(status) != SIGKILL):
        raise DescriptionError("oom_killed is only valid for an exit by SIGKILL", "add --signal KILL")
    return None if given is None else get_bool(event, "oom_killed")


def _signal_number(name: JsonValue) -> int:
    if isinstance(name, str) and name.upper() in _SIGNALS:
        return _SIGNALS[name.upper()]
    try:
        numbers = signal_numbers(name)
    except ValueError as error:
        raise DescriptionError(f"invalid signal {_quoted(name)}", "expected SIGKILL, KILL or 9") from error
    if len(numbers) != 1:
        raise DescriptionError(f"invalid signal {_quoted(name)}: more than one", "expected SIGKILL, KILL or 9")
    return next(iter(numbers))


def _process(event: JsonObject, accounts: Accounts) -> Process:
    process = _DescribedProcess(get_int_or_none(event, "pid") or 0, get_int_or_none(event, "ppid"))
    process.comm, process.exe = _text(event, "comm"), _text(event, "exe")
    is_cut = bool(event.get("cmdline_truncated"))
    process.image = Image(_text(event, "exe_claimed") or process.exe, cmdline_is_cut=is_cut)
    process.cmdline, process.cgroup = _text(event, "cmdline"), _text(event, "cgroup")
    process.described = _placement(event)
    process.uid = _identity(event, "uid", "user", accounts.user)
    process.gid = _identity(event, "gid", "group", accounts.group)
    process.more_ids = MoreIds(_user_id(event, "euid", accounts), _user_id(event, "loginuid", accounts))
    process.set_provenance("event")
    return process


def _placement(event: JsonObject) -> Placement | None:
    """Return the unit, container and pod of an event without a cgroup; None if it names none of them."""
    unit, user_unit, container, pod_uid = (_text(event, name) for name in ("unit", "user_unit", "container", "pod_uid"))
    if (unit, user_unit, container, pod_uid) == (None, None, None, None):
        return None
    containers = () if container is None else (Container(container, None),)
    return Placement(unit, user_unit, containers, pod_uid)


def _identity(event: JsonObject, number: str, name: str, look_up: Callable[[str], int | None]) -> int | None:
    given = get_int_or_none(event, number)
    if given is not None or event.get(name) is None:
        return given
    return _id_of(str(event[name]), name, look_up)


def _id_of(text: str, name: str, look_up: Callable[[str], int | None]) -> int:
    found = int(text) if text.isdecimal() else look_up(text)
    if found is None:
        raise DescriptionError(f'unknown {name} "{text}" on this machine', "give its number")
    return found


def _user_id(event: JsonObject, field: str, accounts: Accounts) -> int | None:
    """Return a user id that is given as a number or as a name."""
    given = event.get(field)
    if not isinstance(given, str):
        return get_int_or_none(event, field)
    return NO_LOGIN if field == "loginuid" and given == LOGIN_UNSET else _id_of(given, "user", accounts.user)


def _ancestors(event: JsonObject, process: Process) -> tuple[Process, ...] | None:
    """Return the ancestors, parent first. Above the last given one they are unknown.

    A record has all of them as objects; a description has the comm of each above the parent.
    """
    given = [] if event.get("ancestors") is None else get_list(event, "ancestors", _ancestor)
    parent = _text(event, "parent_comm")
    if given and isinstance(event["ancestors"], list) and isinstance(event["ancestors"][0], dict):
        return tuple(given)
    if parent is None and not given:
        return None
    return (Process(process.ppid or 1, comm=parent), *given)


def _ancestor(value: JsonValue) -> Process:
    if isinstance(value, str):
        return Process(0, comm=value)
    known = as_dict(value)
    return Process(get_int(known, "pid"), comm=_text(known, "comm"))


def _usage(event: JsonObject, process: Process, status: int | None) -> TaskRecord | None:
    """Return the exit record, if any of its values is given; the others are 0."""
    values = {name: get_number_or_none(event, name) for name in ("lifetime_ms", "cpu_time_ms", "max_rss_kib")}
    if status is None or all(values[name] is None for name in ("cpu_time_ms", "max_rss_kib")):
        return None
    return TaskRecord(
        pid=process.tgid, tgid=process.tgid, ppid=process.ppid or 0, status=status, last=True, threaded=False,
        comm=process.comm or "", uid=process.uid or 0, gid=process.gid or 0, begin_time_s=0,
        lifetime_us=round((values["lifetime_ms"] or 0) * 1000), cpu_time_us=round((values["cpu_time_ms"] or 0) * 1000),
        max_rss_kib=round(values["max_rss_kib"] or 0), read_bytes=get_int_or_none(event, "read_bytes") or 0,
        write_bytes=get_int_or_none(event, "write_bytes") or 0, minor_faults=0, major_faults=0, exe_device=0,
        exe_inode=0,
    )  # fmt: skip


def _flag(event: JsonObject, field: str) -> bool:
    """Return a boolean; False if it is null or missing."""
    return event.get(field) is not None and get_bool(event, field)


def _text(event: JsonObject, field: str) -> str | None:
    """Return a text as it was before escaping. Raises JsonError if it is not a text."""
    get_str_or_none(event, field)
    value = exact(event, field)
    return None if value is None else str(value)


def _quoted(value: JsonValue) -> str:
    return f'"{value}"'
