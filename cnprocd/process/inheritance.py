"""What a process has from its fork alone, and what confirms it. PURE.

A fork event names the parent that the kernel gave the child (drivers/connector/cn_proc.c: real_parent). With
CLONE_PARENT (clone(2)) that is the parent of the caller (kernel/fork.c copy_process). So a user's program that root's
process started (cron, runuser, a service) can have a child that the table takes for a child of root's process. Its
ids, program and cgroup are those of the caller, and no event names the caller.

The real uid is the sign. The child has that of the caller, so if it is the uid of the named parent, the caller is of
the same user. These show it:

  exit record   before anything is matched at the end of the process
  exec, tick    /proc, read anyway
  uid event     it has the uid after a change. If that differs, /proc is read: a set-user-ID program or a user namespace
                can change the uid of a user's process, too

At other events of a process of root that nothing has confirmed yet, /proc or an exit record that waits is asked. If
neither answers, its attributes are unknown at that event. A fork event itself has those of the named parent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cnprocd.connector.event import Uid
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.model import MoreIds, Process, ProcLookup, Wanted
from cnprocd.process.table import Table, same_process


def is_doubtful(process: Process) -> bool:
    """Return whether a process has the ids of root's process, and nothing but its fork says so."""
    return process.unconfirmed and process.uid == 0


def confirmed(
    process: Process, procfs: ProcLookup, wanted: Wanted, record_of: Callable[[int], TaskRecord | None]
) -> Process:
    """Return a doubtful process, or a copy of it, with what /proc or its exit record confirms."""
    fresh = procfs.read(process.tgid, wanted, "procfs")
    if fresh is not None and fresh.uid is not None and same_process(process, fresh):
        if fresh.uid == process.uid:
            process.unconfirmed = False
            return process
        return as_recorded(process, None)  # of another user, or its uid has changed after the event
    return as_recorded(process, record_of(process.tgid))


def as_recorded(process: Process, record: TaskRecord | None) -> Process:
    """Return a doubtful process if its exit record confirms it, or a copy of it without what is doubtful."""
    if record is not None and record.uid == process.uid:
        return process
    copy = replace(process, is_shared=False)
    copy.forget_inherited()
    return copy


def take_uid(event: Uid, table: Table, procfs: ProcLookup, wanted: Wanted) -> bool:
    """Take the user ids of an event, and what it says of a process that nothing has confirmed. Return as Table.uid."""
    process = table.get(event.process_tgid, event.timestamp_ns)
    if process is not None and process.unconfirmed and event.process_pid == event.process_tgid:
        process = table.own(process)
        if process.uid == event.ruid:
            process.unconfirmed = False
        else:
            _read_changed(process, procfs, wanted)
    return table.uid(event)


def _read_changed(process: Process, procfs: ProcLookup, wanted: Wanted) -> None:
    """Keep of what was inherited what /proc still shows of a process that has another uid by now."""
    fresh = procfs.read(process.tgid, wanted, "procfs")
    if fresh is None or not same_process(process, fresh):
        process.forget_inherited()
        return
    process.unconfirmed = False
    process.more_ids = MoreIds(None, fresh.loginuid)
    process.cgroup, process.cgroup_source = fresh.cgroup, fresh.cgroup_source
    is_same = (fresh.exe, fresh.exe_file) == (process.exe, process.exe_file)
    if fresh.cmdline != process.cmdline or not is_same:
        process.cmdline = None
    if not is_same:  # it may execute a program by now whose event comes later
        process.exe = process.image = None
