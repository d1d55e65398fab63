"""A plain way to make the record of a match: every field of every record is made anew. What record.py makes is compared
with it.
"""

from __future__ import annotations

from collections.abc import Callable

from cnprocd.connector.status import core_dumped, describe, exit_code, signal_name, term_signal
from cnprocd.escape import printable, unit_name
from cnprocd.json_value import JsonDict
from cnprocd.output.match_id import UNKNOWN_MACHINE, Machine, match_id
from cnprocd.output.record import MOST_ANCESTORS
from cnprocd.process.cgroup_path import Placement
from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.compile import Match

_UNPLACED = Placement()


def plain_record(
    match: Match,
    user_name: Callable[[int], str | None] = str,
    machine: Machine = UNKNOWN_MACHINE,
    unique: str = "",
) -> JsonDict:
    """Return the record of a match; `job_id` is None until the job is in the spool.

    `user_name` returns the user name of a uid. Without a boot id there is no match id; `unique`: see match_id().
    """
    occurrence = match.occurrence
    process, status = occurrence.process, occurrence.status
    placement = process.placement or _UNPLACED
    number = term_signal(status) if status is not None else None
    record: JsonDict = {
        "rule": match.rule.name,
        "kind": match.event,
        "pid": process.tgid,
        "tid": occurrence.tid,
        "comm": _escaped(process.comm),
        "ppid": process.ppid,
        "uid": process.uid,
        "gid": process.gid,
        "exe": _escaped(process.exe),
        "cmdline": _escaped(process.cmdline),
        "unit": _unit(placement.unit),
        "exit_code": exit_code(status) if status is not None else None,
        "signal": signal_name(number) if number is not None else None,
        "core_dumped": core_dumped(status) if status is not None else None,
        "kernel_time_ns": occurrence.kernel_time_ns,
        "cpu": occurrence.cpu,
        "recovered": occurrence.recovered,
        "job_id": None,
        "match_id": match_id(machine.boot_id, match, unique) if machine.boot_id is not None else None,
        "host": machine.host,
        "machine_id": machine.machine_id,
        "boot_id": machine.boot_id,
        "user": user_name(process.uid) if process.uid is not None else None,
        "container": None,
        "pod_uid": _escaped(placement.pod_uid),
    }
    texts = {"comm": process.comm, "exe": process.exe, "cmdline": process.cmdline}
    if occurrence.kind == "exit":
        record |= {"status": describe(status), "oom_killed": occurrence.oom_killed}
    parent = occurrence.ancestors[0] if occurrence.ancestors else None
    if parent is not None:
        texts["parent_comm"] = parent.comm
        record["parent_comm"] = _escaped(parent.comm)
    if process.cgroup is not None:
        texts["cgroup"] = process.cgroup
        record["cgroup"] = _escaped(process.cgroup)
    if placement.container is not None:
        texts["container"] = placement.container.id
    record.update(_placement(placement))
    for name, text in texts.items():
        if text is not None and text != record[name]:
            record[f"{name}_hex"] = text.encode("utf-8", "surrogateescape").hex()
    record |= {**_image(process), **_more_ids(process), **(occurrence.details or {}), **_usage(occurrence)}
    record.update(_ancestors(occurrence))
    return record


def _placement(placement: Placement) -> JsonDict:
    """Return the fields of a container and of a user's unit that not every process has."""
    record: JsonDict = {}
    if placement.user_unit is not None:
        record["user_unit"] = _unit(placement.user_unit)
    if placement.container is not None:
        record["container"] = _escaped(placement.container.id)
        record["runtime"] = placement.container.runtime
    if len(placement.containers) > 1:
        record["containers"] = [_escaped(container.id) for container in placement.containers]
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
        found["comm_hex"] = process.comm.encode("utf-8", "surrogateescape").hex()
    return found


def _image(process: Process) -> JsonDict:
    """Return what is to be said of the program beside its path and arguments."""
    record: JsonDict = {}
    claimed = process.exe_claimed
    if claimed is not None and claimed != process.exe:
        record["exe_claimed"] = _escaped(claimed)
        if record["exe_claimed"] != claimed:
            record["exe_claimed_hex"] = claimed.encode("utf-8", "surrogateescape").hex()
    if process.exe_deleted:
        record["exe_deleted"] = True
    if process.cmdline_is_cut:
        record["cmdline_truncated"] = True
    return record


def _usage(occurrence: Occurrence) -> JsonDict:
    """Return what the process used until its exit, as far as an exit record has it."""
    usage, lifetime_s = occurrence.usage, occurrence.lifetime_s
    if occurrence.kind != "exit":
        return {}
    record: JsonDict = {"lifetime_ms": round(lifetime_s * 1000, 3) if lifetime_s is not None else None}
    if usage is not None:
        record |= {
            "cpu_time_ms": usage.cpu_time_us / 1000,
            "max_rss_kib": usage.max_rss_kib,
            "read_bytes": usage.read_bytes,
            "write_bytes": usage.write_bytes,
        }
    return record


def _escaped(text: str | None) -> str | None:
    return printable(text) if text is not None else None


def _unit(name: str | None) -> str | None:
    return unit_name(name) if name is not None else None
