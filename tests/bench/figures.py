"""Figures of one run of the bench: what the documents and plots are made of. PURE."""

from __future__ import annotations

import statistics
from typing import Any

Results = dict[str, Any]  # JSON, read back by the names that bench.py writes


def values(results: Results, workload: str, competitor: str, key: str) -> list[float]:
    """Return one figure of every round that has it."""
    runs = [run for run in results["runs"] if run["workload"] == workload and run["competitor"] == competitor]
    return [run[key] for run in runs if run.get(key) is not None]


def median(results: Results, workload: str, competitor: str, key: str) -> float | None:
    found = values(results, workload, competitor, key)
    return statistics.median(found) if found else None


def ratio(results: Results, workload: str, one: str, other: str, key: str = "cpu_s") -> float | None:
    """Return the ratio of two medians per event. Listeners do not all survive storms of the same size."""
    above, below = (each(results, workload, name, key) for name in (one, other))
    return above / below if above and below else None  # 0: less than other programs caused just before


def most(results: Results, workloads: tuple[str, ...], competitor: str, key: str) -> float | None:
    found = [value for workload in workloads for value in values(results, workload, competitor, key)]
    return max(found) if found else None


def sizes(results: Results, prefix: str) -> list[int]:
    names = {run["workload"] for run in results["runs"] if run["workload"].startswith(prefix)}
    return sorted(int(size) for name in names if (size := name.removeprefix(prefix)).isdigit())


def competitors(results: Results, workload: str) -> list[str]:
    return list(dict.fromkeys(run["competitor"] for run in results["runs"] if run["workload"] == workload))


def pairs(results: Results, workload: str, competitor: str, key: str = "cpu_s") -> list[tuple[float, float]]:
    runs = [run for run in results["runs"] if run["workload"] == workload and run["competitor"] == competitor]
    return [(run[key], run["events"]) for run in runs if run.get(key) is not None]


def each(results: Results, workload: str, competitor: str, key: str = "cpu_s") -> float | None:
    """Return microseconds per event, the median of the rounds."""
    found = [seconds / events * 1e6 for seconds, events in pairs(results, workload, competitor, key)]
    return statistics.median(found) if found else None
