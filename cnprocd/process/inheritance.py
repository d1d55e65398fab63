"""What a process has from its fork alone, and what confirms it. PURE.

A fork event names the parent that the kernel gave the child (drivers/connector/cn_proc.c: real_parent). With
CLONE_PARENT (clone(2)) that is the parent of the caller. So a user's program that root started (cron, runuser, PID 1)
can have a child that the table takes for a child of root's process. Its ids, program and cgroup are those of the
caller, and nothing but the parent is known from the event.

So they are guesses until something confirms them:

  exit record  the real uid, and the device and inode of the executable. If the real uid is the parent's, the caller
               was of that user. The effective uid is confirmed only if it is the real one
  /proc        the ids, the executable's file and the cgroup, at an exec, a change of ids, or when an answer is due

An attribute that is not confirmed is unknown. The comm and the arguments are claims of the process in any
case and stay, if nothing disproves them.

Of a parent with another user than root the guesses stay where no exit record comes: its children have its user, unless
a set-user-ID program executed a program of another user in its own place.
"""

from __future__ import annotations

from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.files import FileId
from cnprocd.process.model import FileLookup, Image, MoreIds, Process, Provenance


def inherits(process: Process) -> bool:
    """Return whether something is known only from the fork of the process."""
    return "inherited" in (process.ids_source, process.cgroup_source) or process.image_is_inherited


def confirm_by_record(process: Process, record: TaskRecord, files: FileLookup | None) -> None:
    """Keep of what was inherited what an exit record confirms. Call it before anything is taken from the record."""
    if not (process.unconfirmed and inherits(process)):
        return
    same_user = process.uid == record.uid
    is_same = _is_same(process, record, files)
    if process.ids_source == "inherited" and not (same_user and process.euid == record.uid):
        process.more_ids = None  # a set-user-ID program may have children without its privilege
    if process.image_is_inherited and not (is_same or (same_user and is_same is None)):
        process.forget_image()
    if process.cgroup_source == "inherited" and not (same_user and is_same is not False):
        process.cgroup, process.cgroup_source = None, "unknown"
    _confirm_rest(process, "taskstats")


def _is_same(process: Process, record: TaskRecord, files: FileLookup | None) -> bool | None:
    """Return whether the record names the inherited executable; None if that cannot be said."""
    known, named = process.exe_file, FileId(record.exe_device, record.exe_inode)
    if known is None or not named.inode or not process.image_is_inherited:
        return None
    is_same = files.is_same(known, named) if files is not None else None
    # Where the device differs (files.py), another inode number still means another file.
    return False if is_same is None and known.inode != named.inode else is_same


def confirm_by_proc(process: Process, fresh: Process) -> None:
    """Keep of what was inherited what /proc confirms. `fresh`: the process as /proc shows it now."""
    if fresh.uid is None:
        forget_inherited(process)
        return
    same_user = (process.uid, process.euid) in ((fresh.uid, fresh.euid), (fresh.uid, None))
    if process.image_is_inherited:
        is_seen = process.exe_file is not None and fresh.exe_file is not None  # not of a zombie
        if not (process.exe_file == fresh.exe_file if is_seen else same_user):
            process.forget_image()
    if process.cgroup_source == "inherited" and (fresh.cgroup is not None or not same_user):
        process.cgroup, process.cgroup_source = fresh.cgroup, fresh.cgroup_source
    if process.ids_source == "inherited":
        process.take_ids(fresh, "procfs")
        process.more_ids = fresh.more_ids
    _confirm_rest(process, "procfs")


def take_changed_ids(process: Process, fresh: Process | None) -> None:
    """Keep of what was inherited what /proc still shows of a process that executed nothing yet and got other ids.

    In a user namespace its user can change them, so they confirm nothing. What /proc shows besides can be of a program
    that the process executed after the change.
    """
    if fresh is None:
        forget_inherited(process)
        process.more_ids = MoreIds(process.euid)
        return
    process.unconfirmed = False
    process.more_ids = MoreIds(process.euid, fresh.loginuid)
    if process.cgroup_source == "inherited":
        process.cgroup, process.cgroup_source = fresh.cgroup, fresh.cgroup_source
    if not process.image_is_inherited:
        return
    if (fresh.exe, fresh.exe_file) != (process.exe, process.exe_file):
        process.forget_image()
    elif fresh.cmdline != process.cmdline:
        process.cmdline = None
    _confirm_rest(process, "procfs")


def forget_inherited(process: Process) -> None:
    """Nothing confirms what was inherited: forget it, but for the comm and the arguments, which are claims anyway."""
    process.unconfirmed = False
    if process.ids_source == "inherited":
        process.uid = process.gid = process.more_ids = None
        process.ids_source = "unknown"
    if process.cgroup_source == "inherited":
        process.cgroup, process.cgroup_source = None, "unknown"
    image = process.image
    if process.image_source == "inherited" or (image is not None and image.exe_source == "inherited"):
        process.exe = None
        process.image = Image(cmdline_is_cut=True) if process.cmdline_is_cut else None


def _confirm_rest(process: Process, provenance: Provenance) -> None:
    """Name what confirmed the attributes that are still inherited."""
    process.unconfirmed = False
    if process.ids_source == "inherited":
        process.ids_source = provenance
    if process.cgroup_source == "inherited":
        process.cgroup_source = provenance
    if process.image is not None and process.image.exe_source == "inherited":
        process.image = process.image._replace(exe_source=provenance)
    if process.image_source == "inherited":
        process.image_source = provenance
