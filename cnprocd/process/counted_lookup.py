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

    def zombie_cgroup(self, tgid: int, ended_ns: int) -> str | None:
        """Return the cgroup in which a process ended that is not reaped yet; None if /proc does not show it."""
        self.count += 1
        return self._lookup.zombie_cgroup(tgid, ended_ns)
