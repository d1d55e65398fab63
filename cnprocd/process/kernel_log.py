"""The kernel's log as a source of facts about deaths: /dev/kmsg, read to its end when a death is to be explained.

Opening it needs CAP_SYSLOG while kernel.dmesg_restrict is set; reading an opened one needs nothing. So under systemd
the daemon is given the descriptor (cnprocd-kmsg.socket) and no capability. Reads do not block. A line takes 2.5
microseconds, and the log of a machine has some thousand. A flood of lines is given up after READ_S; the lines that were
skipped make deaths unknown until then.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence

from cnprocd.patience import Patience
from cnprocd.process.model import Occurrence
from cnprocd.process.oom import OomKill, OomKills, is_killed, parse_victim

DEVICE = "/dev/kmsg"
READ_S, SHORTEST_S = 0.1, 0.001  # for one reading; while readings take long, they take a tenth of the time
START_S = 2.0  # for the lines since the boot, or since the last daemon
_RECORD_BYTES = 8192  # PRINTKRB_RECORD_MAX: a shorter buffer fails with EINVAL
_LINES_AT_ONCE = 64


class KernelLog:
    """What the kernel logged about processes."""

    def __init__(self, fd: int | None, why_unreadable: str = "") -> None:
        """`fd`: /dev/kmsg, to be read from where it stands; None: it cannot be read, for this reason."""
        self.why_unreadable = why_unreadable
        self._fd = fd
        self._kills = OomKills()
        self._patience = Patience(READ_S, SHORTEST_S)
        self._read_ns = 0

    @classmethod
    def open(cls, adopted: Sequence[int] = ()) -> KernelLog:
        """Return the log: the descriptor that the service manager passed, which it kept during a restart, or a new one.

        An adopted descriptor of a new boot stands at the oldest line. A new one stands at the end: kills from before
        are not known.
        """
        if adopted:
            os.set_blocking(adopted[0], False)  # the manager clears the flag (systemd.exec(5) NonBlocking=)
            log = cls(adopted[0])
            log.read(START_S)
            return log
        try:
            fd = os.open(DEVICE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(fd, 0, os.SEEK_END)
        except OSError as error:
            return cls(None, f"cannot open {DEVICE}: {error.strerror}")
        log = cls(fd)
        log._kills.overran(time.monotonic_ns())
        return log

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def explain(self, exited: Occurrence, drained_ns: int) -> None:
        """Set `oom` of an exit whose event was read at `drained_ns` (CLOCK_MONOTONIC), or why it is unknown."""
        if self._fd is None:
            exited.oom = False if is_killed(exited) is False else "unreadable"
            return
        if is_killed(exited) is not False and (self._read_ns <= drained_ns or exited.kernel_time_ns is None):
            self.read()
        self._kills.explain(exited)

    def tick(self, is_alive: Callable[[int], bool]) -> None:
        """Read what has come, and forget victims that ended unseen. About once a second."""
        if self._fd is not None:
            self.read()
            self._kills.prune(self._read_ns, is_alive)

    def read(self, limit_s: float | None = None) -> list[int]:
        """Read the log to its end, and return the new victims. Lines that take too long are skipped.

        `limit_s`: may take so long, however long readings took before.
        """
        if self._fd is None:
            return []
        began_s = time.monotonic()
        deadline_s = began_s + (self._patience.wait_s(began_s) if limit_s is None else limit_s)
        victims: list[int] = []
        lines = 0
        while (raw := self._line()) is not None:
            victim = parse_victim(raw)
            if victim is not None:
                victims.append(victim)
            lines += 1
            if lines % _LINES_AT_ONCE == 0 and time.monotonic() >= deadline_s:
                self._skip()
                break
        if limit_s is None:
            self._patience.spend(time.monotonic() - began_s)
        self._read_ns = time.monotonic_ns()
        for tgid in victims:
            self._kills.add(OomKill(tgid, self._read_ns))
        return victims

    def _line(self) -> bytes | None:
        """Return the next line, empty if some were lost; None at the end."""
        assert self._fd is not None
        try:
            return os.read(self._fd, _RECORD_BYTES)
        except BlockingIOError:
            return None
        except BrokenPipeError:  # EPIPE: lines were overwritten; the next read goes on with the oldest
            self._kills.overran(time.monotonic_ns())
            return b""
        except OSError:
            self._skip()
            return None

    def _skip(self) -> None:
        """Go on with what is logged from now on."""
        assert self._fd is not None
        with contextlib.suppress(OSError):
            os.lseek(self._fd, 0, os.SEEK_END)
        self._kills.overran(time.monotonic_ns())
