"""The part of the plan that the tracker needs: which events rules look at, and what is read of a process. PURE.

rules/plan.py makes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cnprocd.connector.status import EVERY_STATUS, StatusSet
from cnprocd.process.model import Kind, Wanted


@dataclass(frozen=True, slots=True)
class Tracking:
    """The part of the plan that the tracker needs (see rules/plan.py)."""

    table: bool
    records: bool  # exit records show deaths, or no rule asks for them; else threads are counted
    wanted: Wanted  # what rules need
    kinds: frozenset[Kind]
    thread_kinds: frozenset[Kind]
    exe_files: bool = False  # some rule needs the path of the file that an exit record names
    statuses: StatusSet = EVERY_STATUS  # of exits that a rule could match; others come only for the table
    passes_over: bool = False  # the exit record of a process whose name no rule asks for is not needed

    @property
    def looks_up(self) -> bool:
        """Whether attributes are read from /proc while the process may still be there."""
        return self.table or not (self.kinds | self.thread_kinds) <= {"exit"}

    @property
    def wanted_at_exec(self) -> Wanted | None:
        """What to read of a process that has executed a program; None: nothing, because no rule looks at it."""
        # Of a known process as well: the ids that it inherited at fork may not be its own (inheritance.py).
        is_needed = self.table or "exec" in self.kinds or "exec" in self.thread_kinds
        return self.wanted_anew if is_needed else None

    @property
    def wanted_anew(self) -> Wanted:
        """What to read of a process that is not known yet."""
        wanted = self.wanted
        return Wanted(ids=True, exe=wanted.exe, cmdline=wanted.cmdline, cgroup=wanted.cgroup, loginuid=wanted.loginuid)
