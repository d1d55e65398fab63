"""The processes of hooks: every process that a hook root forks, and its descendants, for as long as they live. PURE.

A root is the daemon itself, or the runner service. Its children are hooks, or spares that are ready to become one
(launch/starter.py). Only the announcement distinguishes them, and it may come before the fork event is read. So both
belong to the family, and a spare does not count as a running hook. Later descendants are known by the fork events that
are asked for while hooks run (subscription.HookFollower). A descendant that daemonizes still belongs to the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cnprocd.process.handed_on import FormerHooks
from cnprocd.process.model import Process
from cnprocd.process.table import START_TOLERANCE_NS

RUNNER_UNIT = "cnprocd-runner.service"
RUNNER_LEAF = f"/{RUNNER_UNIT}/runner"  # where the runner itself is (runner/service.py delegated_cgroup)


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
        self.hooks.discard(tgid)
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


def left_by_hooks(former: FormerHooks, scan: Sequence[Process]) -> set[int]:
    """Return the processes of hooks of an earlier daemon: those that it knew, and what they have become.

    Root alone decides which they are: by the daemon's own file, and by the cgroup of the runner's service. What has
    ended is among them as long as no other process has its PID: its events may still be queued.
    """
    starts = {process.tgid: process.start_ns for process in scan}
    found = {
        hook.tgid
        for hook in former.hooks
        if abs((starts.get(hook.tgid) or hook.start_ns) - hook.start_ns) <= START_TOLERANCE_NS
    }
    runners = {runner.tgid for runner in former.runners}
    found |= {process.tgid for process in scan if _is_in_runner(process) and process.tgid not in runners}
    children: dict[int, list[int]] = {}
    for process in scan:
        children.setdefault(process.ppid or 0, []).append(process.tgid)
    left = list(found)
    while left:
        for child in children.get(left.pop(), ()):
            if child not in found:
                found.add(child)
                left.append(child)
    return found


def _is_in_runner(process: Process) -> bool:
    placement = process.placement
    in_unit = placement is not None and placement.unit == RUNNER_UNIT
    return in_unit and not (process.cgroup or "").endswith(RUNNER_LEAF)
