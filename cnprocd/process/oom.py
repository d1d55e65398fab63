"""Which processes the kernel's OOM killer ended, from the kernel's own log. PURE.

The kernel logs one line for each victim (mm/oom_kill.c __oom_kill_process). It holds the victim's task_lock from before
the SIGKILL until after that line, and the victim takes this lock before its exit event is sent. So the line is in the
log when the exit event is read (measured: 140 of 140), and a process that died of SIGKILL without one was killed by
something else. The counters in memory.events show how many of a cgroup were killed, not which.

A line from user space has another facility, and a kernel line that begins with a comm has at most 15 bytes of it, so no
process can forge a victim. A line feed within a line is escaped (kernel/printk/printk.c msg_add_ext_text). If lines
were lost, a death without a line is unknown. The log has a clock of its own, which drifts by minutes in a year, so a
kill is dated by the time at which its line was read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from cnprocd.connector.status import term_signal
from cnprocd.process.model import TICK_NS, Occurrence

SIGKILL = 9
_KERNEL_FACILITY = 0
_RECORD = re.compile(rb"([0-9]+),[0-9]+,[0-9]+,[^;]*;([^\n]*)")  # Documentation/ABI/testing/dev-kmsg
_VICTIM = re.compile(rb"(?:(?:Memory cgroup out|Out) of memory[^:]*: )Killed process ([0-9]{1,10}) \(")
_MOST_KILLS = 1024
_KEEP_NS = 60_000_000_000  # a victim that was not seen to end for so long is looked for in /proc
_START_TOLERANCE_NS = 3 * TICK_NS  # a start from /proc is rounded to a tick


class OomKill(NamedTuple):
    """The kernel killed this process. Its line was written before `read_ns` (CLOCK_MONOTONIC)."""

    tgid: int
    read_ns: int


def parse_victim(raw: bytes) -> int | None:
    """Return the PID that one record of /dev/kmsg names as a victim, or None for any other record."""
    record = _RECORD.match(raw)
    if record is None or int(record[1]) >> 3 != _KERNEL_FACILITY:
        return None
    victim = _VICTIM.match(record[2])
    return None if victim is None else int(victim[1])


def is_killed(occurrence: Occurrence) -> bool | None:
    """Whether an exit is one by SIGKILL, as every OOM kill is; None if its status is unknown."""
    return None if occurrence.status is None else term_signal(occurrence.status) == SIGKILL


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
        """Note that lines were lost until now."""
        self._overran_ns = now_ns

    def explain(self, occurrence: Occurrence) -> None:
        """Set `oom` of an exit, or why it is unknown. A kill explains one death of a process.

        Call it after the log was read, and read the log after the exit event.
        """
        killed, kill = is_killed(occurrence), self._kills.get(occurrence.process.tgid)
        if killed is False:
            occurrence.oom = False
        elif kill is not None and (occurrence.process.start_ns or 0) <= kill.read_ns + _START_TOLERANCE_NS:
            if not occurrence.of_thread:
                del self._kills[kill.tgid]
            occurrence.oom = True
        elif killed is None or self._may_be_lost(occurrence.kernel_time_ns):
            occurrence.oom = "lost"
        else:
            occurrence.oom = False

    def _may_be_lost(self, end_ns: int | None) -> bool:
        return self._overran_ns is not None and (end_ns is None or end_ns <= self._overran_ns)

    def prune(self, now_ns: int, is_alive: Callable[[int], bool]) -> None:
        """Forget kills whose victims ended unseen, so that a later owner of the PID is not taken for one."""
        old: Iterable[OomKill] = [kill for kill in self._kills.values() if now_ns - kill.read_ns > _KEEP_NS]
        for kill in old:
            if not is_alive(kill.tgid):
                del self._kills[kill.tgid]
