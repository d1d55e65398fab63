"""What is left of a process after events were lost. PURE.

A lost event may have changed anything that the table has from /proc or from events: another program, other arguments,
another user. So until /proc was read again (Table.doubt) the table's entry is out of date. If the process ends first,
its exit record tells its comm, its user and group, and which file it executed. The rest is unknown.

Without an exit record the comm stays the last known one: else no rule on a comm could match a process that is found
gone. The cgroup stays the last one that was seen: a move never has an event. The login session stays if it is set,
because it then changes no more (see proc_pid_loginuid(5)).
"""

from __future__ import annotations

from dataclasses import replace

from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.files import FileId
from cnprocd.process.model import NO_LOGIN, FileLookup, MoreIds, Process


def forget_doubtful(process: Process, is_same_file: bool = False) -> None:
    """Forget what a lost event may have changed. `is_same_file`: the process executes the known file."""
    loginuid = None if process.unconfirmed or process.loginuid == NO_LOGIN else process.loginuid
    process.uid = process.gid = None
    process.ids_source = "unknown"
    process.more_ids = None if loginuid is None else MoreIds(None, loginuid)
    if process.unconfirmed:  # the cgroup is that of its parent
        process.cgroup, process.cgroup_source = None, "unknown"
    process.unconfirmed = process.in_doubt = False
    if is_same_file:
        process.take_cmdline(None, False, "unknown")
    else:
        process.forget_image()


def sure(process: Process) -> Process:
    """Return a process, or a copy with what is sure of it."""
    if not process.in_doubt:
        return process
    copy = replace(process, is_shared=False)
    forget_doubtful(copy)
    return copy


def forget_at_death(process: Process, record: TaskRecord | None, files: FileLookup | None) -> None:
    """Forget what is not sure of a process that ended, except the program if the exit record names the known file."""
    if not process.in_doubt:
        return
    shown, is_same = process.exe_file, False
    if shown is not None and record is not None and record.exe_inode and files is not None:
        is_same = files.is_same(shown, FileId(record.exe_device, record.exe_inode)) is True
    forget_doubtful(process, is_same)
