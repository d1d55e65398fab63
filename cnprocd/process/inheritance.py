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

from cnprocd.connector.event import Uid
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.model import MoreIds, Process, ProcLookup
from cnprocd.process.table import Table, same_process
from cnprocd.process.tracking import Tracking


def confirmed(
    process: Process,
    procfs: ProcLookup,
    tracking: Tracking,
    record_of: Callable[[int], TaskRecord | None],
    is_gone: bool,
) -> Process:
    """Return a process with the ids of root's process, or a copy without what its fork alone says.

    `is_gone`: /proc has been asked already. What was executed is read early, and confirms the process.
    """
    fresh = None if is_gone else procfs.read(process.tgid, tracking.wanted_anew, "procfs")
    if fresh is not None and fresh.uid is not None and same_process(process, fresh):
        if fresh.uid == process.uid:
            process.unconfirmed = False
            return process
        # It is of another user, or its uid has changed after the event.
    elif (record := record_of(process.tgid)) is not None and record.uid == process.uid:
        return process
    return Process(process.tgid, process.ppid, process.start_ns, process.comm, process.comm_source)


def take_uid(event: Uid, table: Table, procfs: ProcLookup, tracking: Tracking) -> bool:
    """Take the user ids of an event, and what it says of a process that nothing has confirmed. Return as Table.uid."""
    process = table.get(event.process_tgid, event.timestamp_ns)
    if process is not None and process.unconfirmed and event.process_pid == event.process_tgid:
        process = table.own(process)
        if process.uid == event.ruid:
            process.unconfirmed = False
        else:
            _read_changed(process, procfs, tracking)
    return table.uid(event)


def _read_changed(process: Process, procfs: ProcLookup, tracking: Tracking) -> None:
    """Keep of what was inherited what /proc still shows of a process that has another uid by now."""
    fresh = procfs.read(process.tgid, tracking.wanted_anew, "procfs")
    if fresh is None or not same_process(process, fresh):
        process.forget_inherited()
        return
    process.unconfirmed = False
    process.more_ids = MoreIds(None, fresh.loginuid)
    process.cgroup, process.cgroup_source = fresh.cgroup, fresh.cgroup_source
    # After a reload the table may still know the program that former rules needed. It is not read any more.
    is_same = not tracking.wanted.exe or (fresh.exe, fresh.exe_file) == (process.exe, process.exe_file)
    if fresh.cmdline != process.cmdline or not is_same:
        process.cmdline = None
    if not is_same:  # it may execute a program by now whose event comes later
        process.exe = process.image = None
