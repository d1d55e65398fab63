"""Per-CPU sequence numbers: the only sign of a loss that raises no ENOBUFS. PURE.

The kernel counts cn_msg.seq per CPU in send_msg(), before its own event filter and before the BPF filter, and sends
with GFP_NOWAIT. If that allocation fails the event is lost, `Drops` does not change, and only the gap shows the loss.
So gaps mean loss only while every event is asked for and no filter is attached. The plan decides whether that is so,
and the source resets this tracker whenever the request changes. Messages of one CPU are ordered (sent under a per-CPU
lock); across CPUs they are not. Source: drivers/connector/cn_proc.c.
"""

from __future__ import annotations

from collections.abc import Iterable

_WRAP = 1 << 32


class SequenceTracker:
    """Counts missing sequence numbers per CPU. The first number seen on a CPU is its starting point."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}
        self.missing = 0

    def reset(self) -> None:
        """Forget the starting points, after a change of mask or filter. The count stays."""
        self._next.clear()

    def note(self, numbers: Iterable[tuple[int, int]]) -> int:
        """Take (seq, cpu) pairs in order of arrival. Return how many events are missing before or among them."""
        missing = 0
        expected = self._next
        for seq, cpu in numbers:
            gap = (seq - expected.get(cpu, seq)) % _WRAP
            # A number from the past (half the range) can only be a repeat, not a loss of two billion events.
            if gap < _WRAP // 2:
                missing += gap
                expected[cpu] = (seq + 1) % _WRAP
        self.missing += missing
        return missing
