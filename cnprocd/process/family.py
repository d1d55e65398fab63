"""Who came of a hook: every process that a hook root forks, and whatever that forks, for as long as it lives. PURE.

A root is the daemon itself, or the runner service. Its children are hooks, or spares that stand ready to become one
(launch/starter.py); nothing but the announcement tells them apart, and it may come before the fork is read. So both are
of the family, and a spare is no hook that runs. Grandchildren are known by the forks that are asked for while hooks run
(subscription.HookFollower), wherever they daemonize to: descent does not end with a session or with a parent.
"""

from __future__ import annotations

from collections.abc import Callable

from cnprocd.connector.event import Fork


class HookFamily:
    """The PIDs of hooks and all that came of them."""

    def __init__(self, own_tgid: int) -> None:
        self.roots = {own_tgid}
        self.hooks: set[int] = set()
        self._spares: set[int] = set()  # children of a root that nobody has announced
        self._dead: set[int] = set()  # at the last sweep

    def __contains__(self, tgid: int | None) -> bool:
        return tgid in self.hooks

    @property
    def alive(self) -> bool:
        """Whether any hook or descendant of one may still be running."""
        return not self.hooks <= self._spares

    def add(self, tgid: int) -> None:
        """This process is a hook or a descendant of one."""
        self.hooks.add(tgid)
        self._spares.discard(tgid)

    def fork(self, event: Fork) -> None:
        """A new process."""
        tgid = event.child_tgid
        if self._dead:
            self._dead.discard(tgid)  # that was the last owner of its PID
        if event.parent_tgid in self.roots:
            if tgid not in self.hooks:
                self.hooks.add(tgid)
                self._spares.add(tgid)
        elif event.parent_tgid in self.hooks:
            self.hooks.add(tgid)
        else:
            self.hooks.discard(tgid)  # the PID of a dead hook has a new owner

    def sweep(self, is_alive: Callable[[int], bool]) -> None:
        """Forget the dead. One's exit may still be in the queue, so only who was dead the last time too."""
        dead = {tgid for tgid in self.hooks if not is_alive(tgid)}
        self.hooks -= dead & self._dead
        self._dead = dead
        self._spares &= self.hooks
