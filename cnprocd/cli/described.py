"""An event in words, as an occurrence that the rules can judge: what `test`, `explain` and `watch --match` share.

An event is described by a flat mapping with the field names of the log: options of a command line become one, a JSON
record of the log or of a job is one, and a live process is read into one. So the same description means the same thing
everywhere, and a record can be pasted back. What is not said is unknown, and stays so: nothing is guessed but the kind
(an exit) and, for an exit that says nothing of its end, that it succeeded.

Pure but for names: users and groups are looked up by the functions given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from cnprocd.connector.status import CORE_FLAG, SIGNAL_NAMES
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.errors import CnprocdError
from cnprocd.launch.render import exact
from cnprocd.output.record import MATCH_FIELDS
from cnprocd.process.model import Kind, Occurrence, Process
from cnprocd.rules.language.syntax import signal_numbers
from cnprocd.rules.language.value_problem import did_you_mean

Description = Mapping[str, object]
FIELDS = (
    *MATCH_FIELDS, "status", "wait_status", "user", "group", "cgroup", "container", "parent_comm", "ancestors",
    "lifetime_ms", "cpu_time_ms", "max_rss_kib", "read_bytes", "write_bytes", "from_hook", "thread", "ruid", "euid",
    "rgid", "egid", "tracer_pid", "tracer_tid", "time_ns", "timestamp", "level", "event", "message",
)  # fmt: skip
_EXITS = ("exit", "nonzero_exit")
_SIGNALS = {name: number for number, name in SIGNAL_NAMES.items()}


class DescriptionError(CnprocdError):
    """The description contradicts itself or says something unknown."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class Names:
    """Names of users and groups to ids; None where there is no such name."""

    user: Callable[[str], int | None]
    group: Callable[[str], int | None]


def occurrence_of(said: Description, names: Names) -> Occurrence:
    """The occurrence that is described. Raises DescriptionError."""
    _check_fields(said)
    kind = str(said.get("kind") or "exit")
    status = _status(said, kind)
    process = _process(said, names)
    pid = process.tgid
    at_ns = _int(said, "kernel_time_ns")
    lifetime_ms = _number(said, "lifetime_ms")
    if lifetime_ms is not None:
        at_ns = at_ns if at_ns is not None else 1 << 60
        process.start_ns = at_ns - round(lifetime_ms * 1e6)
    return Occurrence(
        kind="exit" if kind in _EXITS else cast(Kind, kind),
        process=process,
        tid=_int(said, "tid") or pid,
        status=status,
        kernel_time_ns=at_ns,
        cpu=_int(said, "cpu"),
        recovered=bool(said.get("recovered")),
        of_thread=bool(said.get("thread")),
        usage=_usage(said, process, status),
        ancestors=_ancestors(said, process),
        from_hook=bool(said.get("from_hook")),
    )


def _check_fields(said: Description) -> None:
    for name in said:
        if name not in FIELDS and not name.endswith("_hex"):
            raise DescriptionError(f"an event has no field {name!r}", did_you_mean(name, FIELDS) or ", ".join(FIELDS))
    kind = said.get("kind")
    known = (*_EXITS, "fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "coredump")
    if kind is not None and kind not in known:
        raise DescriptionError(f"{kind!r} is no kind of event", ", ".join(known))


def _status(said: Description, kind: str) -> int | None:
    """The wait status. Raises DescriptionError where an exit is told in two ways, or is none."""
    code, name, wait = _int(said, "exit_code"), said.get("signal"), _int(said, "wait_status")
    given = [one for one, value in (("exit_code", code), ("signal", name), ("wait_status", wait)) if value is not None]
    if kind not in _EXITS:
        if given:
            raise DescriptionError(f"{given[0]} says how a process ended, and the kind is {kind}", "--kind exit")
        return None
    if len(given) > 1:
        raise DescriptionError(f"{given[0]} and {given[1]}: a process ends in one way", "give one of them")
    if said.get("recovered") and not given:
        return None
    if wait is not None:
        if not 0 <= wait <= 0xFFFF:
            raise DescriptionError(f"{wait} is no wait status", "code*256 for exit(code), or the signal's number")
        return wait
    if name is not None:
        return _signal_number(name) | (CORE_FLAG if said.get("core_dumped") else 0)
    if code is not None:
        if not 0 <= code <= 255:
            raise DescriptionError(f"exit code {code} is not possible", "0 to 255")
        return code << 8
    if kind == "nonzero_exit":
        raise DescriptionError("a nonzero_exit needs a failure", "--exit-code N or --signal NAME")
    return 0


def _signal_number(name: object) -> int:
    if isinstance(name, str) and name.upper() in _SIGNALS:
        return _SIGNALS[name.upper()]
    try:
        numbers = signal_numbers(name)
    except ValueError as error:
        raise DescriptionError(f"signal {name!r}: {error}", "SIGKILL, KILL or 9") from error
    if len(numbers) != 1:
        raise DescriptionError(f"{name!r} is more than one signal", "SIGKILL, KILL or 9")
    return next(iter(numbers))


def _process(said: Description, names: Names) -> Process:
    process = Process(_int(said, "pid") or 0, _int(said, "ppid"))
    for field in ("comm", "exe", "cmdline", "cgroup"):
        setattr(process, field, _text(said, field))
    unit = _text(said, "unit")
    if process.cgroup is None and unit is not None:
        process.cgroup = f"/system.slice/{unit}"
    process.uid = _identity(said, "uid", "user", names.user)
    process.gid = _identity(said, "gid", "group", names.group)
    process.set_provenance("event")
    return process


def _identity(said: Description, number: str, name: str, look_up: Callable[[str], int | None]) -> int | None:
    given = _int(said, number)
    if given is not None or said.get(name) is None:
        return given
    text = str(said[name])
    found = int(text) if text.isdecimal() else look_up(text)
    if found is None:
        raise DescriptionError(f"there is no {name} named {text!r} on this machine", "give its number")
    return found


def _ancestors(said: Description, process: Process) -> tuple[Process, ...] | None:
    """Parent first. One whose own parent is not said is unknown from there on up."""
    comms = said.get("ancestors")
    above = [str(comm) for comm in comms] if isinstance(comms, list | tuple) else []
    parent = _text(said, "parent_comm")
    if parent is None and not above:
        return None
    chain = [parent, *above]
    return tuple(Process((process.ppid or 1) if i == 0 else 0, comm=comm) for i, comm in enumerate(chain))


def _usage(said: Description, process: Process, status: int | None) -> TaskRecord | None:
    """What an exit record would tell; what is not said of it counts as 0 once anything of it is said."""
    values = {name: _number(said, name) for name in ("lifetime_ms", "cpu_time_ms", "max_rss_kib")}
    if status is None or all(values[name] is None for name in ("cpu_time_ms", "max_rss_kib")):
        return None
    return TaskRecord(
        pid=process.tgid, tgid=process.tgid, ppid=process.ppid or 0, status=status, last=True, threaded=False,
        comm=process.comm or "", uid=process.uid or 0, gid=process.gid or 0, begin_time_s=0,
        lifetime_us=round((values["lifetime_ms"] or 0) * 1000), cpu_time_us=round((values["cpu_time_ms"] or 0) * 1000),
        max_rss_kib=round(values["max_rss_kib"] or 0), read_bytes=_int(said, "read_bytes") or 0,
        write_bytes=_int(said, "write_bytes") or 0, minor_faults=0, major_faults=0, exe_device=0, exe_inode=0,
    )  # fmt: skip


def _text(said: Description, field: str) -> str | None:
    value = exact(said, field)
    return None if value is None else str(value)


def _int(said: Description, field: str) -> int | None:
    value = said.get(field)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise DescriptionError(f"{field} is a number, not {value!r}")


def _number(said: Description, field: str) -> float | None:
    value: Any = said.get(field)
    if value is not None and not isinstance(value, int | float):
        raise DescriptionError(f"{field} is a number, not {value!r}")
    return None if value is None else float(value)
