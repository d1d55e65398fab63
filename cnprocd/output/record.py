"""Make the record of a match, which is logged, spooled and passed to the hook: one flat mapping of fields. PURE.

Every match record has every field of the contract; an unknown one is None, which becomes null. Text that a process
chose is escaped UTF-8. If escaping changed a field, `<field>_hex` (`comm_hex`, `exe_hex`) is added with the exact
bytes, so that nothing is lost and two different names never look the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from cnprocd.connector.status import core_dumped, describe, exit_code, signal_name, term_signal
from cnprocd.escape import printable, unit_name
from cnprocd.json_value import JsonDict, JsonObject, JsonValue
from cnprocd.output.match_id import UNKNOWN_MACHINE, Machine, match_id
from cnprocd.process.cgroup_path import Placement, placement_of
from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.compile import Match
from cnprocd.rules.values import Template

MATCH_FIELDS = (
    "rule", "kind", "pid", "tid", "comm", "ppid", "uid", "gid", "exe", "cmdline", "unit", "exit_code", "signal",
    "core_dumped", "kernel_time_ns", "cpu", "recovered", "job_id", "match_id", "host", "machine_id", "boot_id",
)  # fmt: skip
"""The fields of a match record, in order; users and checks depend on them literally."""


MOST_ANCESTORS = 16  # of a record
_REMEMBERED = 512  # wait statuses, cgroups and names: in a burst all processes have the same


def match_record(
    match: Match,
    user_name: Callable[[int], str | None] = str,
    machine: Machine = UNKNOWN_MACHINE,
    unique: str = "",
) -> JsonDict:
    """Return the record of a match; `job_id` is None until the job is in the spool.

    `user_name` returns the user name of a uid. Without a boot id there is no match id; `unique`: see match_id().
    """
    occurrence = match.occurrence
    process, status, kind = occurrence.process, occurrence.status, occurrence.kind
    comm, exe, cmdline, cgroup = process.comm, process.exe, process.cmdline, process.cgroup
    place = _UNPLACED if cgroup is None else _place_of(cgroup)
    end = _end_of(status)
    uid = process.uid
    record: JsonDict = {
        "rule": match.rule.name,
        "kind": match.event,
        "pid": process.tgid,
        "tid": occurrence.tid,
        "comm": None if comm is None else _shown(comm),
        "ppid": process.ppid,
        "uid": uid,
        "gid": process.gid,
        "exe": None if exe is None else _shown(exe),
        "cmdline": None if cmdline is None else printable(cmdline),
        "unit": place.unit,
        "exit_code": end.code,
        "signal": end.signal,
        "core_dumped": end.core_dumped,
        "kernel_time_ns": occurrence.kernel_time_ns,
        "cpu": occurrence.cpu,
        "recovered": occurrence.recovered,
        "job_id": None,
        "match_id": match_id(machine.boot_id, match, unique) if machine.boot_id is not None else None,
        "host": machine.host,
        "machine_id": machine.machine_id,
        "boot_id": machine.boot_id,
        "user": user_name(uid) if uid is not None else None,
        "container": None,
        "pod_uid": place.pod_uid,
    }
    if kind == "exit":
        record["status"] = end.text
        record["oom_killed"] = occurrence.oom_killed
    parent = occurrence.ancestors[0] if occurrence.ancestors else None
    if parent is not None:
        record["parent_comm"] = None if parent.comm is None else _shown(parent.comm)
    record.update(place.fields)
    _add_exact_texts(record, process, parent)
    record.update(place.hex_fields)
    _add_more(record, occurrence)
    return record


def _add_more(record: JsonDict, occurrence: Occurrence) -> None:
    """Add the fields that not every process has."""
    process = occurrence.process
    if process.image is not None:
        record.update(_image(process))
    if process.more_ids is not None:
        record.update(_more_ids(process))
    if occurrence.details:
        record.update(occurrence.details)
    if occurrence.kind == "exit":
        record.update(_usage(occurrence))
    if occurrence.ancestors:
        record.update(_ancestors(occurrence))


def _add_exact_texts(record: JsonDict, process: Process, parent: Process | None) -> None:
    """Add the exact bytes of texts that escaping changed, but for those of the cgroup."""
    comm, exe, cmdline = process.comm, process.exe, process.cmdline
    if comm is not None and record["comm"] != comm:
        record["comm_hex"] = _hex(comm)
    if exe is not None and record["exe"] != exe:
        record["exe_hex"] = _hex(exe)
    if cmdline is not None and record["cmdline"] != cmdline:
        record["cmdline_hex"] = _hex(cmdline)
    if parent is not None and parent.comm is not None and record["parent_comm"] != parent.comm:
        record["parent_comm_hex"] = _hex(parent.comm)


class _End(NamedTuple):
    """What a wait status says."""

    code: int | None
    signal: str | None
    core_dumped: bool | None
    text: str


@lru_cache(maxsize=_REMEMBERED)
def _end_of(status: int | None) -> _End:
    if status is None:
        return _End(None, None, None, describe(status))
    number = term_signal(status)
    signal = None if number is None else signal_name(number)
    return _End(exit_code(status), signal, core_dumped(status), describe(status))


class _Place(NamedTuple):
    """What a cgroup says. `fields` and `hex_fields` are in every record of its processes; they are not changed."""

    unit: str | None = None
    pod_uid: str | None = None
    fields: JsonObject = {}  # noqa: RUF012  # not a class attribute
    hex_fields: JsonObject = {}  # noqa: RUF012


_UNPLACED = _Place()


@lru_cache(maxsize=_REMEMBERED)
def _place_of(cgroup: str) -> _Place:
    placement = placement_of(cgroup)
    container = placement.container
    texts = {"cgroup": cgroup} | ({} if container is None else {"container": container.id})
    fields = _placement(cgroup, placement)
    hexes: JsonDict = {f"{name}_hex": _hex(text) for name, text in texts.items() if text != fields[name]}
    return _Place(_unit(placement.unit), _escaped(placement.pod_uid), fields, hexes)


def _hex(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").hex()


def _placement(cgroup: str, placement: Placement) -> JsonDict:
    """Return the cgroup, and the fields of a container and of a user's unit that not every process has."""
    record: JsonDict = {}
    record["cgroup"] = printable(cgroup)
    if placement.user_unit is not None:
        record["user_unit"] = _unit(placement.user_unit)
    if placement.container is not None:
        record["container"] = _escaped(placement.container.id)
        record["runtime"] = placement.container.runtime
    if len(placement.containers) > 1:
        record["containers"] = [_escaped(container.id) for container in placement.containers]
    return record


def early_fields(process: Process) -> JsonDict:
    """Return the fields of a record that need no look at /proc, without those that are still unknown."""
    return {
        "pid": process.tgid, "ppid": process.ppid, "uid": process.uid, "gid": process.gid, **comm_fields(process.comm),
    }  # fmt: skip


def comm_fields(comm: str | None) -> JsonDict:
    """Return the fields of a record that show a comm."""
    record: JsonDict = {"comm": _escaped(comm)}
    if comm is not None and comm != record["comm"]:
        record["comm_hex"] = _hex(comm)
    return record


def _more_ids(process: Process) -> JsonDict:
    """Return the user ids beside the real one that are known."""
    record: JsonDict = {}
    if process.euid is not None:
        record["euid"] = process.euid
    if process.loginuid is not None:
        record["loginuid"] = process.loginuid
    return record


def _ancestors(occurrence: Occurrence) -> JsonDict:
    """Return the ancestors, if more than the parent is known of them, or if it is the only one."""
    chain = occurrence.ancestors or ()
    record: JsonDict = {}
    if len(chain) > 1 or (chain and chain[0].ppid == 0):
        record["ancestors"] = [_ancestor(process) for process in chain[:MOST_ANCESTORS]]
    return record


def _ancestor(process: Process) -> JsonDict:
    found: JsonDict = {"pid": process.tgid, "comm": _escaped(process.comm)}
    if process.comm is not None and found["comm"] != process.comm:
        found["comm_hex"] = _hex(process.comm)
    return found


def _image(process: Process) -> JsonDict:
    """Return what is to be said of the program beside its path and arguments."""
    record: JsonDict = {}
    claimed = process.exe_claimed
    if claimed is not None and claimed != process.exe:
        record["exe_claimed"] = _escaped(claimed)
        if record["exe_claimed"] != claimed:
            record["exe_claimed_hex"] = _hex(claimed)
    if process.exe_deleted:
        record["exe_deleted"] = True
    if process.cmdline_is_cut:
        record["cmdline_truncated"] = True
    return record


def _usage(occurrence: Occurrence) -> JsonDict:
    """Return what a process that ended has used, as far as an exit record has it."""
    usage, lifetime_s = occurrence.usage, occurrence.lifetime_s
    record: JsonDict = {"lifetime_ms": round(lifetime_s * 1000, 3) if lifetime_s is not None else None}
    if usage is not None:
        record |= {
            "cpu_time_ms": usage.cpu_time_us / 1000,
            "max_rss_kib": usage.max_rss_kib,
            "read_bytes": usage.read_bytes,
            "write_bytes": usage.write_bytes,
        }
    return record


_shown = lru_cache(maxsize=_REMEMBERED)(printable)  # not of arguments: they are long, and seldom the same


def _escaped(text: str | None) -> str | None:
    return printable(text) if text is not None else None


def _unit(name: str | None) -> str | None:
    return unit_name(name) if name is not None else None


def message(template: Template | None, record: JsonObject) -> str:
    """Return the message of a match record: the rule's own, or one line that names the rule, process and event.

    An unknown field is `unknown` in the text.
    """
    if template is not None:
        return template.render(_Texts(record))
    comm, pid = record["comm"], record["pid"]
    subject = f"{record['rule']}: {'unknown' if comm is None else comm}[{'unknown' if pid is None else pid}]"
    if "status" not in record:
        return f"{subject}: {record['kind']}"
    verb = "vanished unseen" if record["recovered"] else "ended"
    return f"{subject} {verb}: {record['status']}"


class _Texts(dict[str, str]):
    """The texts of a record's fields, made on demand."""

    def __init__(self, record: JsonObject) -> None:
        super().__init__()
        self._record = record

    def __missing__(self, name: str) -> str:
        value = self._record.get(name)
        return "unknown" if value is None else _text(value)


def _text(value: JsonValue) -> str:
    if isinstance(value, list):
        return ", ".join(_text(one) for one in value)
    if isinstance(value, dict):  # an ancestor
        return f"{value.get('comm') or 'unknown'}[{value.get('pid')}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
