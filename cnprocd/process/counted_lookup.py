"""Count the attributes that are sought in /proc: while there are any, a process may soon be gone. PURE."""

from __future__ import annotations

from cnprocd.process.model import Process, ProcLookup, Provenance, Wanted


class CountedLookup:
    """A ProcLookup that counts."""

    def __init__(self, lookup: ProcLookup) -> None:
        self.count = 0  # since start
        self._lookup = lookup
        self.is_alive = lookup.is_alive
        self.is_ending = lookup.is_ending

    def read(self, tgid: int, wanted: Wanted, source: Provenance) -> Process | None:
        """Return the process as /proc shows it now, or None if it is gone."""
        self.count += 1
        return self._lookup.read(tgid, wanted, source)

    def read_parent(self, tgid: int) -> Process | None:
        """Return the parent of a process that matched: its PID, start, parent, and its name of now."""
        self.count += 1
        return self._lookup.read_parent(tgid)

    def zombie(self, tgid: int, ended_ns: int, wanted: Wanted) -> Process | None:
        """Return a process that ended and is not reaped yet, with its cgroup and login session if they are wanted."""
        self.count += 1
        return self._lookup.zombie(tgid, ended_ns, wanted)
