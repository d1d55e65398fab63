"""Complete the attributes of a matched process: read from /proc what no event and no exit record has carried. PURE.

Only matches are completed, so the price is paid per match. A PID may be reused at any moment, so what is read is taken
only if it can be the process that is meant.
"""

from __future__ import annotations

from dataclasses import replace

from cnprocd.process.model import KINDS_OF_LASTING_COMM, Occurrence, Process, ProcLookup, Wanted
from cnprocd.process.table import START_TOLERANCE_NS, same_process


def complete(occurrence: Occurrence, procfs: ProcLookup, parents: dict[int, Process | None]) -> None:
    """Fill the attributes of a record that are still unknown, as far as /proc still has them.

    A recovered or reaped process is not looked for: it is known to be gone. `parents`: those that were read for other
    matches of the same batch, which is read within milliseconds. In a storm all processes have the same parent.
    """
    process = occurrence.process
    if occurrence.ancestors is None and process.ppid:
        if process.ppid not in parents:
            parents[process.ppid] = procfs.read_parent(process.ppid)
        parent = parents[process.ppid]
        latest_ns = (process.start_ns or occurrence.kernel_time_ns or 0) + START_TOLERANCE_NS
        if parent is not None and (parent.start_ns or 0) <= latest_ns:
            occurrence.ancestors = (parent,)
    known = process.cmdline is not None and process.cgroup is not None and process.uid is not None
    if occurrence.recovered or occurrence.reaped or known:
        return
    if _lacks_only_cgroup(occurrence):
        if process.cgroup is None:
            read_zombie(occurrence, procfs, Wanted(cgroup=True))
        return
    fresh = procfs.read(process.tgid, _missing(occurrence), "procfs")
    if fresh is not None and _is_same(process, fresh, occurrence):
        if process.is_shared:  # its children were born without these attributes
            process = occurrence.process = replace(process, is_shared=False)
        if _may_differ(process, fresh, occurrence):
            fresh = fresh.without_program()
        process.fill_unknown(fresh, comm=not occurrence.of_thread)


def read_zombie(occurrence: Occurrence, procfs: ProcLookup, wanted: Wanted) -> None:
    """Read of a process that ended what no event reports: its cgroup and its login session, if they are wanted.

    Since its exec it may have been moved, as desktop sessions and cgclassify do, or have begun a session.
    """
    ended_ns = occurrence.kernel_time_ns
    if ended_ns is None or occurrence.reaped or not (wanted.cgroup or wanted.loginuid):
        return
    zombie = procfs.zombie(occurrence.process.tgid, ended_ns, wanted)
    if zombie is not None:
        occurrence.process.take_more_ids(zombie)
        if zombie.cgroup is not None:
            occurrence.process.cgroup, occurrence.process.cgroup_source = zombie.cgroup, "zombie"


def _lacks_only_cgroup(occurrence: Occurrence) -> bool:
    """Return whether all else that a zombie has is known. Its cgroup can be read without the worker of /proc."""
    process = occurrence.process
    ended = occurrence.kind == "exit" and not occurrence.of_thread and not process.is_shared
    named = process.comm is not None and process.uid is not None and process.ppid is not None
    return ended and named and occurrence.kernel_time_ns is not None


def _missing(occurrence: Occurrence) -> Wanted:
    """Return what to read: the attributes that are unknown. A zombie has no exe and no cmdline."""
    process = occurrence.process
    lasts = occurrence.kind == "comm" or occurrence.kind in KINDS_OF_LASTING_COMM
    lives = lasts and (occurrence.kind != "exit" or occurrence.of_thread)
    image = lives and process.cmdline is None and process.exe is None
    return Wanted(ids=process.uid is None, exe=image, cmdline=image, cgroup=process.cgroup is None)


def lives(known: Process, procfs: ProcLookup) -> bool:
    """Return whether a process of the table has not ended."""
    fresh = procfs.read(known.tgid, Wanted(), "procfs")
    return fresh is not None and fresh.threads > 0 and same_process(fresh, known)


def _may_differ(process: Process, fresh: Process, occurrence: Occurrence) -> bool:
    """Return whether /proc may show another program than at the event: most others are followed by an exec.

    What an exec has executed was read at once. If that came too late, so does this. After a comm event the comm shows
    whether an exec followed.
    """
    if occurrence.kind in ("exec", "comm"):
        return process.comm is None or fresh.comm != process.comm
    return occurrence.kind not in KINDS_OF_LASTING_COMM


def _is_same(process: Process, fresh: Process, occurrence: Occurrence) -> bool:
    """Return whether what /proc shows now can be the process of an occurrence: it started before that happened.

    A process that ended is a zombie at most, so a living one under that PID is another, however soon it got the PID.
    """
    if occurrence.kind == "exit" and not occurrence.of_thread and fresh.threads:
        return False
    if process.start_ns is not None and fresh.start_ns is not None:
        return abs(process.start_ns - fresh.start_ns) <= START_TOLERANCE_NS
    return (fresh.start_ns or 0) <= (occurrence.kernel_time_ns or 0)
