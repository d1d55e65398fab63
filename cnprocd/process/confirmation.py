"""Look into /proc and into exit records for what confirms the inheritance of a process (inheritance.py). PURE."""

from __future__ import annotations

from dataclasses import replace

from cnprocd.connector.event import Uid
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.inheritance import confirm_by_proc, confirm_by_record, forget_inherited, take_changed_ids
from cnprocd.process.model import FileLookup, Process, ProcLookup
from cnprocd.process.table import Table, same_process
from cnprocd.process.tracking import Tracking


class Confirmation:
    """Confirms the entries of the table, each when an answer is due."""

    def __init__(self, table: Table, procfs: ProcLookup, files: FileLookup | None, tracking: Tracking) -> None:
        self._table = table
        self._procfs = procfs
        self._files = files
        self._wanted = replace(tracking.wanted_anew, cmdline=False)
        self._wanted_anew = tracking.wanted_anew

    def of(self, process: Process) -> Process:
        """Return the process with what /proc confirms of it. A guess is looked at once."""
        if not process.unconfirmed or (process.uid != 0 and process.uid is not None):
            return process
        if process.is_shared:
            process = self._table.own(process)
        fresh = self._procfs.read(process.tgid, self._wanted, "procfs")
        if fresh is None or not same_process(process, fresh):
            forget_inherited(process)
        else:
            confirm_by_proc(process, fresh)
        return process

    def of_chain(self, chain: tuple[Process, ...]) -> tuple[Process, ...]:
        """Return the ancestors with what /proc confirms of them."""
        for process in chain:
            if process.unconfirmed:
                return tuple(self.of(one) if one.unconfirmed else one for one in chain)
        return chain

    def by_record(self, process: Process, record: TaskRecord | None) -> Process:
        """Return the process, as an entry that may be changed, with what its exit record confirms, or else /proc."""
        process = self._table.own(process)
        if record is None:
            return self.of(process)
        confirm_by_record(process, record, self._files)
        return process

    def after_change(self, event: Uid) -> None:
        """Read a process again whose ids are known by an event now: its parent's program and cgroup may not be its."""
        process = self._table.get(event.process_tgid, event.timestamp_ns)
        if process is None or process.ids_source != "event":
            return
        if process.cgroup_source == "inherited" or process.image_is_inherited:
            process = self._table.own(process)
            fresh = self._procfs.read(process.tgid, self._wanted_anew, "procfs")
            take_changed_ids(process, fresh if fresh is not None and same_process(process, fresh) else None)
