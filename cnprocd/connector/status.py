"""Wait statuses: what they mean, and sets of them that both Python and the kernel's filter can test. PURE.

A wait status is code << 8 for a process that called exit(code), or signal | 0x80 if it dumped core (wait(2),
include/uapi/linux/wait.h). Rules, plan and filter share StatusSet: exit codes and signals. The core bit is not part of
it, because a dying thread group shows it on one thread only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

CODE_MAX = 255
SIGNAL_MAX = 64
CORE_FLAG = 0x80

# The names of signal(7) for x86 and arm. The numbers differ on mips, parisc and alpha; there are no packages for those
# machines.
SIGNAL_NAMES: dict[int, str] = dict(
    enumerate(
        (
            "SIGHUP SIGINT SIGQUIT SIGILL SIGTRAP SIGABRT SIGBUS SIGFPE SIGKILL SIGUSR1 SIGSEGV SIGUSR2 SIGPIPE "
            "SIGALRM SIGTERM SIGSTKFLT SIGCHLD SIGCONT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGXCPU SIGXFSZ "
            "SIGVTALRM SIGPROF SIGWINCH SIGIO SIGPWR SIGSYS"
        ).split(),
        start=1,
    )
)
_SIGRTMIN = 34  # glibc reserves 32 and 33

CORE_SIGNALS = frozenset({3, 4, 5, 6, 7, 8, 11, 24, 25, 31})
"""Signals whose default action is to dump core (signal(7))."""


def exit_code(status: int) -> int | None:
    """Return the code given to exit(), 0 to 255; None if a signal ended the process."""
    return None if status & 0x7F else (status >> 8) & 0xFF


def term_signal(status: int) -> int | None:
    """Return the number of the signal that ended the process; None if it called exit()."""
    return status & 0x7F or None


def core_dumped(status: int) -> bool:
    """Return whether a core was dumped (WCOREDUMP)."""
    return bool(status & 0x7F) and bool(status & CORE_FLAG)


def signal_name(number: int) -> str:
    """Return `SIGKILL` for 9, `SIGRTMIN+3` for 37, `SIG32` for a number without a name."""
    if number in SIGNAL_NAMES:
        return SIGNAL_NAMES[number]
    if _SIGRTMIN <= number <= SIGNAL_MAX:
        return f"SIGRTMIN+{number - _SIGRTMIN}" if number > _SIGRTMIN else "SIGRTMIN"
    return f"SIG{number}"


def describe(status: int | None) -> str:
    """Return a wait status as text: `exit code 3`, `SIGSEGV (core dumped)`, `unknown exit status`."""
    if status is None:
        return "unknown exit status"
    number = term_signal(status)
    if number is None:
        return f"exit code {exit_code(status)}"
    return signal_name(number) + (" (core dumped)" if core_dumped(status) else "")


@dataclass(frozen=True, slots=True)
class StatusSet:
    """A set of ways to end: inclusive ranges of exit codes, sorted and disjoint, and signal numbers."""

    codes: tuple[tuple[int, int], ...] = ()
    signals: frozenset[int] = frozenset()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]], signals: Iterable[int]) -> StatusSet:
        """Return a normalised set: overlapping and adjacent ranges are merged."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted(ranges):
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return cls(tuple(merged), frozenset(signals))

    def __contains__(self, status: int) -> bool:
        number = status & 0x7F
        if number:
            return number in self.signals
        code = (status >> 8) & 0xFF
        return any(low <= code <= high for low, high in self.codes)

    def wait_statuses(self) -> frozenset[int]:
        """Return every wait status in the set, with and without core flag, for tests on the hot path."""
        codes = {code << 8 for low, high in self.codes for code in range(low, high + 1)}
        return frozenset(codes | self.signals | {number | CORE_FLAG for number in self.signals})

    def __or__(self, other: StatusSet) -> StatusSet:
        return StatusSet.of(self.codes + other.codes, self.signals | other.signals)

    def __and__(self, other: StatusSet) -> StatusSet:
        ranges = [(max(a, c), min(b, d)) for a, b in self.codes for c, d in other.codes if max(a, c) <= min(b, d)]
        return StatusSet.of(ranges, self.signals & other.signals)


ALL_SIGNALS = frozenset(range(1, SIGNAL_MAX + 1))
EVERY_STATUS = StatusSet(((0, CODE_MAX),), ALL_SIGNALS)
FAILURES = StatusSet(((1, CODE_MAX),), ALL_SIGNALS)
NO_STATUS = StatusSet()
