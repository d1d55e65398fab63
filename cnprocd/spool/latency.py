"""A histogram of the time from the kernel's event to the hook's first instruction, in fixed buckets. PURE."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS_MS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 5000.0)


@dataclass(slots=True)
class Histogram:
    """Counts per bucket: `counts[i]` values were at most `bounds_ms[i]`; the last count is of all longer ones."""

    bounds_ms: tuple[float, ...] = BOUNDS_MS
    counts: list[int] = field(default_factory=list)
    sum_ms: float = 0.0
    max_ms: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds_ms) + 1)

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.counts)

    def add(self, value_ms: float) -> None:
        self.counts[bisect_left(self.bounds_ms, value_ms)] += 1
        self.sum_ms += value_ms
        self.max_ms = max(self.max_ms, value_ms)

    def quantile_ms(self, share: float) -> float | None:
        """Return the upper bound of the bucket with the value at `share` (0..1), or None without any value."""
        rank = share * self.count
        seen = 0
        for bound, count in zip((*self.bounds_ms, self.max_ms), self.counts, strict=True):
            seen += count
            if count and seen >= rank:
                return min(bound, self.max_ms)
        return None
