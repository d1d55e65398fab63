"""The forks and exits of processes that no rule asks for: most events of a busy machine. PURE.

They are handled as rows (connector/event.py), and no object is made of them. A new process whose fork no rule can match
by its name enters the table as a birth (table.py). Its exit removes it, if no answer is due. None is, because:

- Where exit records show deaths, the record of a whole process that no rule asks for was passed over
  (connector/taskrecord.py). It names the process, so this does not depend on what the table believes.
- Where the status is one that no rule can match, the kernel filtered the record. Only the record of a leader that ends
  before its process always comes, and such a process stays in the table.
- Where threads are counted, a process that had a second thread is no birth any more.
"""

from __future__ import annotations

from typing import Protocol

from cnprocd.connector.event import Row
from cnprocd.connector.taskrecord import AsksFor
from cnprocd.connector.uapi import PROC_EVENT_EXIT, PROC_EVENT_FORK
from cnprocd.process.deaths import Deaths
from cnprocd.process.family import HookFamily
from cnprocd.process.model import Kind
from cnprocd.process.table import Table
from cnprocd.process.tracking import Tracking

_REMEMBERED_COMMS = 4096


class Cares(Protocol):
    """Whether any rule could match this kind of event, of a thread or of a process, with this comm and wait status."""

    def __call__(self, kind: Kind, of_thread: bool, comm: str | None, status: int | None = None, /) -> bool: ...


def about_everything(kind: Kind, of_thread: bool, comm: str | None, status: int | None = None) -> bool:
    """Return that a rule could match: for every event."""
    return True


class Unasked:
    """Takes the events that need no answer."""

    def __init__(
        self,
        table: Table,
        deaths: Deaths,
        family: HookFamily,
        newcomers: set[int],
        tracking: Tracking,
        cares: Cares,
    ) -> None:
        """`newcomers`: gets the births whose exit a rule could match."""
        self._table = table
        self._deaths = deaths
        self._family = family
        self._newcomers = newcomers
        self._tracking, self._cares = tracking, cares
        self._has_records, self._wanted = tracking.records, deaths.wanted
        self._births: set[str] = set()  # no rule could match a fork of a process that is called so
        self._mortals: set[str] = set()  # of these: a rule could match its exit

    @property
    def asks_for(self) -> AsksFor | None:
        """Whether the record of a process that ended with this comm and status is needed; None: every record is."""
        cares = self._cares
        return (lambda comm, status: cares("exit", False, comm, status)) if self._tracking.passes_over else None

    def remember(self, comm: str) -> None:
        """Let the next processes that are forked with this comm be births, if possible. No rule could match a fork."""
        if self._tracking.thread_kinds & {"fork", "exit"}:
            return
        asked = self._cares("exit", False, comm)
        if asked and not self._tracking.records:
            return  # its exit is the event of its last thread, which only a count of an entry's threads shows
        if len(self._births) >= _REMEMBERED_COMMS:
            self._births.clear()
            self._mortals.clear()
        self._births.add(comm)
        if asked:
            self._mortals.add(comm)

    def takes(self, row: Row) -> bool:
        """Take a fork or an exit that needs no answer. Return whether it was one; else nothing has changed."""
        what = row[0]
        if what == PROC_EVENT_FORK:
            if not self._births:
                return False
            family = self._family
            if row[5] == row[6] and (family.hooks or row[4] in family.roots):
                family.fork(row[4], row[6])  # once more if the event is handled otherwise, which changes nothing
            parent = self._table.birth(row, self._births)
            if parent is not None and parent.comm in self._mortals:
                self._newcomers.add(row[6])
            return parent is not None
        if what != PROC_EVENT_EXIT:
            return False
        tid: int = row[3]
        tgid: int = row[4]
        if self._has_records:
            if row[5] in self._wanted:
                if not self._deaths.take_passed(tid):
                    return False
                if not self._table.end_birth(tgid, row[2]):
                    self.ended(tgid, row[2])
                return True
            if tid != tgid or self._deaths.is_early_leader(tgid):
                return tid != tgid
        return tid == tgid and self._table.end_birth(tgid, row[2])

    def ended(self, tgid: int, at_ns: int | None) -> None:
        """Take the end of a process that was passed over. Without its event the time is unknown."""
        known = self._table.get(tgid, at_ns) if self._tracking.table else None
        if known is not None:
            self._table.end(known, at_ns or known.start_ns or 0, certain=True)
