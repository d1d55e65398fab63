"""The processes of hooks: every process that a hook root forks, and its descendants, for as long as they live. PURE.

A root is the daemon itself, or the runner service. Its children are hooks, or spares that are ready to become one
(launch/starter.py). Only the announcement distinguishes them, and it may come before the fork event is read. So both
belong to the family, and a spare does not count as a running hook. Later descendants are known by the fork events that
are asked for while hooks run (subscription.HookFollower). A descendant that daemonizes still belongs to the family.
"""

from __future__ import annotations

from collections.abc import Callable


class HookFamily:
    """The PIDs of hooks and of their descendants."""

    def __init__(self, own_tgid: int) -> None:
        self._own_tgid = own_tgid
        self.roots: dict[int, Callable[[], bool]] = {own_tgid: lambda: True}  # PID -> whether it still runs
        self._dead_roots: set[int] = set()  # at the last sweep
        self.hooks: set[int] = set()
        self._spares: set[int] = set()  # children of a root that were not announced as hooks
        self._dead: set[int] = set()  # at the last sweep

    def __contains__(self, tgid: int | None) -> bool:
        return tgid in self.hooks

    @property
    def alive(self) -> bool:
        """Whether any hook or descendant of one may still be running."""
        return not self.hooks <= self._spares

    def add(self, tgid: int) -> None:
        """Add a process that is a hook or a descendant of one."""
        self.hooks.add(tgid)
        self._spares.discard(tgid)

    def add_root(self, tgid: int, is_alive: Callable[[], bool]) -> None:
        """Add a process whose children are hooks, for as long as `is_alive` says that it runs."""
        self.roots[tgid] = is_alive
        self._dead_roots.discard(tgid)

    def is_root(self, tgid: int | None) -> bool:
        """Whether this PID belongs to a root that still runs: a runner ends when idle, and its PID is reused."""
        return tgid == self._own_tgid or (tgid is not None and tgid in self.roots and self.roots[tgid]())

    def fork(self, parent_tgid: int, tgid: int) -> None:
        """Add a new process whose parent is a root or in the family; remove a reused PID otherwise."""
        if self._dead:
            self._dead.discard(tgid)  # the PID has a new owner
        if tgid in self.roots:
            del self.roots[tgid]  # a new owner of a dead root's PID
        if parent_tgid in self.roots:  # dead or not: the fork may have been queued before its death
            if tgid not in self.hooks:
                self.hooks.add(tgid)
                self._spares.add(tgid)
        elif parent_tgid in self.hooks:
            self.hooks.add(tgid)
        else:
            self.hooks.discard(tgid)  # a new owner of a dead hook's PID

    def sweep(self, is_alive: Callable[[int], bool]) -> None:
        """Remove the processes that were dead at this sweep and at the last: an exit event may still be queued."""
        dead = {tgid for tgid in self.hooks if not is_alive(tgid)}
        self.hooks -= dead & self._dead
        self._dead = dead
        self._spares &= self.hooks
        dead_roots = {tgid for tgid, runs in self.roots.items() if not runs()}
        for tgid in dead_roots & self._dead_roots:
            del self.roots[tgid]
        self._dead_roots = dead_roots
