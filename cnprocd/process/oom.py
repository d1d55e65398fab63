"""Which processes the kernel killed for want of memory, from its own log. PURE.

The kernel logs one line for each victim (mm/oom_kill.c __oom_kill_process). It holds the victim's task_lock from before
the SIGKILL until after that line, and the victim takes this lock before its exit event is sent. So the line is in the
log when the exit event is read (measured: 140 of 140), and a process that died of SIGKILL without one was killed by
something else. The counters in memory.events show how many of a cgroup were killed, not which.

A line from user space has another facility, and a kernel line that begins with a comm has at most 15 bytes of it, so no
process can forge a victim. If the log overran, a death without a line is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from cnprocd.connector.status import term_signal

_SIGKILL = 9
_KERNEL_FACILITY = 0
_RECORD = re.compile(rb"([0-9]+),[0-9]+,([0-9]+),[^;]*;([^\n]*)")  # Documentation/ABI/testing/dev-kmsg
_VICTIM = re.compile(rb"(?:(?:Memory cgroup out|Out) of memory[^:]*: )Killed process ([0-9]+) \(")
_MOST_KILLS = 1024
_LINE_AGE_NS = 60_000_000_000  # a victim that still lives after this long is looked for in /proc
_CLOCK_TOLERANCE_NS = 10_000_000_000  # the log's clock is not adjusted as CLOCK_MONOTONIC is


class OomKill(NamedTuple):
    """One line of the kernel: this process was killed. `at_ns` is of the log's clock, about CLOCK_MONOTONIC."""

    tgid: int
    at_ns: int


def parse_kill(raw: bytes) -> OomKill | None:
    """The kill that one record of /dev/kmsg reports, or None for any other record."""
    record = _RECORD.match(raw)
    if record is None or int(record[1]) >> 3 != _KERNEL_FACILITY:
        return None
    victim = _VICTIM.match(record[3])
    return None if victim is None else OomKill(int(victim[1]), int(record[2]) * 1000)


class OomKills:
    """The kills whose victims have not been seen to end. Bounded."""

    def __init__(self) -> None:
        self._kills: dict[int, OomKill] = {}
        self._overran_ns: int | None = None

    def add(self, kill: OomKill) -> None:
        """Take one line. The oldest makes room."""
        self._kills.pop(kill.tgid, None)
        while len(self._kills) >= _MOST_KILLS:
            del self._kills[next(iter(self._kills))]
        self._kills[kill.tgid] = kill

    def overran(self, now_ns: int) -> None:
        """Lines were overwritten before they were read."""
        self._overran_ns = now_ns

    def was_victim(self, tgid: int, status: int | None, start_ns: int | None, end_ns: int | None) -> bool | None:
        """Whether the kernel killed this process for want of memory; None if the log does not show it.

        Ask after the log was read, and that after the exit event. A kill counts once.
        """
        if status is not None and term_signal(status) != _SIGKILL:
            return False
        kill = self._kills.get(tgid)
        if kill is not None and (start_ns is None or start_ns <= kill.at_ns + _CLOCK_TOLERANCE_NS):
            del self._kills[tgid]
            return True
        if status is None or (self._overran_ns is not None and (end_ns is None or end_ns <= self._overran_ns)):
            return None
        return False

    def prune(self, now_ns: int, is_alive: Callable[[int], bool]) -> None:
        """Forget kills whose victims ended unseen, so that a later owner of the PID is not taken for one."""
        old = [kill.tgid for kill in self._kills.values() if now_ns - kill.at_ns > _LINE_AGE_NS]
        for tgid in old:
            if not is_alive(tgid):
                del self._kills[tgid]
