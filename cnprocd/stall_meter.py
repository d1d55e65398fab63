"""How long the event loop did not wait for events: worst and 99th percentile, since start and in the last minute. PURE.

A stall is the time from the moment at which the loop has events until it waits for the next ones. While it lasts, the
loop takes no event, answers no request and pings no watchdog. Every edge that makes the loop wait adds its share with
`blame`; a stall over REPORT_S is reported with the edge that had the largest share.

Durations are kept as counts in buckets that are at most 25% wide, so the memory is constant. The last minute is twelve
slices of five seconds. Pure: the caller passes the clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

REPORT_S = 0.1
LOOP = "event loop"  # the cause of a stall that no edge accounts for
_SLICE_S = 5.0
_SLICES = 12
_BOUNDS_S = tuple(1e-5 * 1.25**step for step in range(72))  # 10 us to 76 s


class Stall(NamedTuple):
    """One stall over REPORT_S."""

    seconds: float
    cause: str


@dataclass(frozen=True, slots=True)
class Figures:
    """What `status` and metrics show. Percentiles are the upper ends of their buckets."""

    worst_s: float
    p99_s: float
    worst_last_minute_s: float
    p99_last_minute_s: float
    worst_cause: str | None


class _Durations:
    """Counts by bucket. The last bucket has no upper end but the worst."""

    __slots__ = ("counts", "worst_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(_BOUNDS_S) + 1)
        self.worst_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_BOUNDS_S, seconds)] += 1
        self.worst_s = max(self.worst_s, seconds)


def _p99_s(durations: Iterable[_Durations]) -> float:
    """Return the upper end of the bucket of the 99th percentile, at most the worst; 0 if there are no values."""
    durations = [_Durations(), *durations]
    worst_s = max(one.worst_s for one in durations)
    counts = [sum(column) for column in zip(*(one.counts for one in durations), strict=True)]
    rank, seen = 0.99 * sum(counts), 0
    for bound_s, count in zip((*_BOUNDS_S, worst_s), counts, strict=True):
        seen += count
        if count and seen >= rank:
            return min(bound_s, worst_s)
    return 0.0


class StallMeter:
    """Counts stalls."""

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}
        self._all = _Durations()
        self._slices = {0: _Durations()}  # number of a slice, counted from the epoch of the clock -> its stalls
        self._worst_cause: str | None = None

    def blame(self, edge: str, seconds: float) -> None:
        """Add the time that the loop waited for an edge since it last had events."""
        self._shares[edge] = self._shares.get(edge, 0.0) + seconds

    def note(self, now_s: float, seconds: float) -> Stall | None:
        """Count a stall that ends now. Return it if it is to be reported."""
        is_worst = seconds > self._all.worst_s
        self._all.add(seconds)
        self._slice_of(now_s).add(seconds)
        cause = self._cause(seconds)
        self._shares.clear()
        if is_worst:
            self._worst_cause = cause
        return Stall(seconds, cause) if seconds >= REPORT_S else None

    def figures(self, now_s: float) -> Figures:
        """Return the figures for `status` and metrics."""
        oldest = int(now_s / _SLICE_S) - _SLICES
        recent = [durations for number, durations in self._slices.items() if number > oldest]
        return Figures(
            worst_s=self._all.worst_s,
            p99_s=_p99_s([self._all]),
            worst_last_minute_s=max((durations.worst_s for durations in recent), default=0.0),
            p99_last_minute_s=_p99_s(recent),
            worst_cause=self._worst_cause,
        )

    def _slice_of(self, now_s: float) -> _Durations:
        number = int(now_s / _SLICE_S)
        if number not in self._slices:
            self._slices = {old: kept for old, kept in self._slices.items() if old > number - _SLICES}
            self._slices[number] = _Durations()
        return self._slices[number]

    def _cause(self, seconds: float) -> str:
        """Return the edge with the largest share, if the edges together have at least half of the stall."""
        shares = self._shares
        if not shares or sum(shares.values()) < seconds / 2:
            return LOOP
        return max(shares, key=lambda edge: shares[edge])
