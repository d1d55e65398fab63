"""Which program a process executed, by the file that its exit record names. PURE."""

from __future__ import annotations

from cnprocd.connector.event import Exit
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.files import FileId
from cnprocd.process.model import FileLookup, Occurrence, Process


def ended(event: Exit, record: TaskRecord, files: FileLookup | None) -> Occurrence:
    """Return the exit of a process with one thread that no table has, as its event and its record show it."""
    process = Process(event.process_tgid)
    process.take_exit_records(record, record, event.timestamp_ns)
    occurrence = Occurrence("exit", process, event.process_pid, event.exit_code, event.timestamp_ns, event.cpu)
    occurrence.usage, occurrence.reaped = record, event.parent_tgid == 0
    if files is not None:
        take_executed_file(process, record, files)
    if event.parent_tgid:
        process.ppid = event.parent_tgid
    return occurrence


def take_executed_file(process: Process, record: TaskRecord, files: FileLookup) -> None:
    """Take the file that the exit record names. If it is not the one that /proc showed, an exec was missed."""
    shown = process.exe_file if process.exe_deleted is False else None
    if shown is not None and process.exe is not None and files.is_replaced(process.exe, shown):
        process.take_replacement()
    if not record.exe_inode:
        return
    file = FileId(record.exe_device, record.exe_inode)
    if process.exe_file is not None:
        is_same = files.is_same(process.exe_file, file)
        if is_same is False:
            process.forget_image()
        elif process.exe is not None and is_same is None:
            return
    found = files.find(file, process.comm, process.start_ns)
    if found is not None and not found.paths:  # in doubt: a rule on one of the paths is undecided, and that is counted
        process.exe_is_unnamed = False
        return
    if process.exe is None or (found is not None and found.is_named):
        process.take_executed_file(file, found)
    process.exe_is_unnamed = files.knows_all_named and not (found is not None and found.is_named)
