"""Look at a process again when it is a second old: at its arguments, its cgroup and its login session. PURE.

Servers overwrite their arguments with a title soon after fork or exec (PostgreSQL's "postgres: checkpointer"), and
desktop sessions move a program into a scope of its own (systemd.scope(5)). No event reports either, nor the begin of
a login session (pam_loginuid(8)). With this look the table shows what a daemon that starts later would read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from cnprocd.process.model import Process, ProcLookup, Wanted
from cnprocd.process.table import Table, same_process

LOOKS_S = 0.005  # of one tick; one look takes about 20 microseconds, and a hundred times that on a busy machine
MOST_DUE = 10_000


class SecondLook:
    """The processes that are due. Call `look` about once a second."""

    def __init__(self, table: Table, procfs: ProcLookup, clock: Callable[[], float]) -> None:
        self._table = table
        self._procfs = procfs
        self._clock = clock
        self._due: dict[int, None] = {}  # tgids, in order

    def look(self, newcomers: Iterable[int], wanted: Wanted, asks_for: Callable[[Process], bool]) -> None:
        """Look at the newcomers of the last call; `newcomers` are those since then.

        `asks_for`: whether a rule could match the end of a process.
        """
        if not (wanted.cmdline or wanted.cgroup or wanted.loginuid):
            self._due.clear()
            return
        looks, deadline_s = replace(wanted, ids=False, exe=False), self._clock() + LOOKS_S
        due, self._due = self._due, {}
        for tgid in due:
            process = self._table.get(tgid)
            if process is None or process.ended_ns is not None or not asks_for(process):
                continue
            if self._clock() >= deadline_s:
                self._due[tgid] = None
                continue
            fresh = self._procfs.read(tgid, replace(looks, ids=process.unconfirmed), "procfs")
            if fresh is not None and fresh.threads and same_process(process, fresh):
                self._table.own(process).take_newer(fresh)
        for tgid in newcomers:
            if len(self._due) < MOST_DUE:
                self._due[tgid] = None
