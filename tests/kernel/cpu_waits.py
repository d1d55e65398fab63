"""How long a process waited for a CPU although it could run: the part of a delay that a busy machine causes.

The second number of /proc/PID/schedstat is that time of the main thread, in nanoseconds (Documentation/scheduler/
sched-stats.rst). It is added when the thread gets its CPU.
"""

from __future__ import annotations

import bisect
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

EVERY_S = 0.02


def cpu_wait_s(directory: Path) -> float:
    """Return the wait of a process or thread so far; 0 if it is gone or the kernel does not count it."""
    try:
        return int((directory / "schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def own_cpu_wait_s() -> float:
    """Return the wait of the calling thread so far."""
    return cpu_wait_s(Path(f"/proc/self/task/{threading.get_native_id()}"))


def owner_of(socket_path: Path) -> int:
    """Return the PID that listens on a socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(socket_path))
        return int(struct.unpack("=iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


class CpuWaits:
    """The waits of processes, sampled while `sampled` is in force. Times are those of time.time()."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def sampled(self, pid: int) -> Iterator[None]:
        over = threading.Event()
        sampling = threading.Thread(target=self._sample, args=(Path(f"/proc/{pid}"), over))
        sampling.start()
        try:
            yield
        finally:
            over.set()
            sampling.join()

    def _sample(self, process: Path, over: threading.Event) -> None:
        while not over.wait(EVERY_S):
            self._samples.append((time.time(), cpu_wait_s(process)))
        self._samples.append((time.time(), cpu_wait_s(process)))

    @property
    def share(self) -> float:
        """The share of the sampled time in which it waited."""
        (began_s, first_s), (ended_s, last_s) = self._samples[0], self._samples[-1]
        return max(0.0, last_s - first_s) / max(EVERY_S, ended_s - began_s)

    def between_s(self, began_s: float, ended_s: float) -> float:
        """Return the wait between two moments, and up to EVERY_S around them."""
        samples = self._samples
        first = max(0, bisect.bisect_right(samples, (began_s, float("inf"))) - 1)
        last = min(len(samples) - 1, bisect.bisect_left(samples, (ended_s, 0.0)))
        if last <= first:
            return 0.0
        return max(0.0, samples[last][1] - samples[first][1])
