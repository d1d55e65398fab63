"""Figures from the kernel about a running program and the machine: the only sources of the bench.

CPU time comes from the CPU clock of the process (clock_gettime of another process, clock_getcpuclockid(3)), exact to
the nanosecond, user and system together; /proc/PID/stat counts ticks of 10 ms. Losses are the `Drops` of the process's
own netlink sockets, found by inode.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

_LISTENING_PROTOCOLS = (11, 16)  # connector, generic netlink (taskstats)
_DEAF_AFTER = 20  # tenths of a second idle with a queue that is not empty
_OF_OTHERS_BYTES = 64 * 1024  # of a queue: the events of other programs since the listener last read it
QUIET_CPUS = 0.05
_CLOCK_SCHED = 2  # CPUCLOCK_SCHED of include/linux/posix-timers.h


def cpu_ns(pid: int) -> int:
    """Return user and system time of all threads of a process, including dead threads."""
    return time.clock_gettime_ns(~pid << 3 | _CLOCK_SCHED)


def memory_kib(pid: int) -> tuple[int, int]:
    """Return resident memory: now, and at the peak."""
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M))
    return int(found.get("VmRSS", 0)), int(found.get("VmHWM", 0))  # a zombie has none


def wakeups(pid: int) -> int:
    """Return how often a thread of the process slept and was woken: voluntary context switches."""
    texts = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status"))
    return sum(int(found) for text in texts for found in re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.M))


def sockets(pid: int) -> list[tuple[int, int]]:
    """Return (bytes queued, datagrams dropped) of each connector and generic netlink socket of a process."""
    inodes = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(path))
        except FileNotFoundError:
            continue
    rows = (line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:])
    return [
        (int(row[4]), int(row[8]))
        for row in rows
        if int(row[1]) in _LISTENING_PROTOCOLS and f"socket:[{row[9]}]" in inodes
    ]


def dropped(pid: int) -> int:
    return sum(drops for _, drops in sockets(pid))


def listeners() -> int:
    """Return the number of members of the proc connector's group on this machine."""
    rows = (line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:])
    return sum(int(row[1]) == 11 and int(row[3], 16) & 1 for row in rows)


def background(pid: int, seconds: float = 0.5) -> float:
    """Return the CPU seconds a second that other programs' events cost a listener now."""
    before = cpu_ns(pid)
    time.sleep(seconds)
    return (cpu_ns(pid) - before) / 1e9 / seconds


def wait_until_idle(pid: int, patience_s: float = 60.0, background_share: float = 0.0) -> bool:
    """Wait until a listener has read everything and is idle. Return False if it leaves its queue unread.

    `background_share`: what other programs' events cost it, as `background` found.
    """
    deadline = time.monotonic() + patience_s
    most_ns = 2_000_000 + 2 * background_share * 0.1 * 1e9
    before, idle = cpu_ns(pid), 0
    while time.monotonic() < deadline and idle < _DEAF_AFTER:
        time.sleep(0.1)
        now = cpu_ns(pid)
        idle = idle + 1 if now - before < most_ns else 0
        if idle and not any(queued > _OF_OTHERS_BYTES for queued, _ in sockets(pid)):
            return True
        before = now
    return False


def busy_cpus(seconds: float) -> float:
    """Return how many CPUs other programs keep busy while the bench sleeps."""
    before = _idle_ticks()
    time.sleep(seconds)
    return round((os.cpu_count() or 1) - (_idle_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds, 2)


def wait_until_quiet(patience_s: float) -> float:
    """Wait until other programs keep at most QUIET_CPUS busy. Return how many they keep busy, also if they go on."""
    deadline = time.monotonic() + patience_s
    while (busy := busy_cpus(2.0)) > QUIET_CPUS and time.monotonic() < deadline:
        pass
    return busy


def _idle_ticks() -> int:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[4]) + int(fields[5])  # idle, iowait


def wall_minus_monotonic_ns() -> int:
    """Return the offset from the clock of kernel events to the records' wall clock: the least of 50 readings."""
    return min(time.time_ns() - time.monotonic_ns() for _ in range(50))


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """Return p50, p99, p99.9 (nearest rank), the maximum and the count."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    at = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    found = {name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) for name, share in at.items()}
    return found | {"max": round(ordered[-1], 4), "count": len(ordered)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}
