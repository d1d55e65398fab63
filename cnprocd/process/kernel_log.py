"""The kernel's log as a source of facts about deaths: /dev/kmsg, read to its end when a death is to be explained.

Opening it needs CAP_SYSLOG while kernel.dmesg_restrict is set; reading an opened one needs nothing. So the daemon is
given the descriptor (systemd.socket(5) ListenSpecial=) and no capability. Reads do not block.
"""

from __future__ import annotations

import contextlib
import os
import time

from cnprocd.process.oom import OomKills, parse_kill

DEVICE = "/dev/kmsg"
_RECORD_BYTES = 8192  # PRINTKRB_RECORD_MAX: a shorter buffer fails with EINVAL
_MOST_RECORDS = 20_000  # of one reading: more than the ring buffer holds


class KernelLog:
    """What the kernel logged about processes."""

    def __init__(self, adopted_fd: int | None = None) -> None:
        """Read what comes from now on, or with `adopted_fd` from where that stands. Raises OSError."""
        self._fd = adopted_fd if adopted_fd is not None else os.open(DEVICE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if adopted_fd is None:
            os.lseek(self._fd, 0, os.SEEK_END)
        self._kills = OomKills()

    def close(self) -> None:
        os.close(self._fd)

    def was_oom_victim(self, tgid: int, status: int | None, start_ns: int | None, end_ns: int | None) -> bool | None:
        """As OomKills.was_victim, of what the log shows now."""
        self._read()
        return self._kills.was_victim(tgid, status, start_ns, end_ns)

    def _read(self) -> None:
        for _ in range(_MOST_RECORDS):
            try:
                raw = os.read(self._fd, _RECORD_BYTES)
            except BlockingIOError:
                return
            except BrokenPipeError:  # EPIPE: records were overwritten; the next read goes on with the oldest
                self._kills.overran(time.monotonic_ns())
                continue
            except OSError:
                self._kills.overran(time.monotonic_ns())
                return
            kill = parse_kill(raw)
            if kill is not None:
                self._kills.add(kill)
        with contextlib.suppress(OSError):  # a flood: what it hides is unknown
            os.lseek(self._fd, 0, os.SEEK_END)
        self._kills.overran(time.monotonic_ns())
