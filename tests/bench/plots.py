"""The plots of one run. PURE."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import figures
import svg
from figures import Results

_EACH = "microseconds of CPU per event"
_TITLES = {
    "fork": "Fork and exit, one after the other: CPU per event",
    "exec": "Fork, exec and exit: CPU per event",
    "failing": "Four programs, 1% of exits failing: CPU per event that happened",
    "rate": "How cost changes with the rate of events",
    "rules": "How cost grows with rules",
    "table": "How cost grows with live processes",
    "memory": "How memory grows with live processes",
    "births-offline": "Offline: cost with processes that were forked and live",
    "births-memory": "Offline: memory of processes that were forked and live",
    "rules-offline": "Offline: cost with rules, every exit matched",
    "cpus-offline": "Offline: cost with CPUs that run processes at once",
}
_ACROSS = {"births": "processes in the table", "rules": "rules", "cpus": "CPUs"}

Lines = dict[str, list[tuple[float, float]]]


def drawn(results: Results) -> dict[str, str]:
    """Return the SVG text of each plot that the run has figures for."""
    return dict(_all(results))


def title(plot: str) -> str:
    prefix, _, number = plot.partition("-")
    return f"{int(number):,} processes end at once: CPU per exit" if prefix == "burst" else _TITLES[plot]


def _all(results: Results) -> Iterator[tuple[str, str]]:
    for workload in ("fork", "exec", "failing", *(f"burst-{n}" for n in figures.sizes(results, "burst-"))):
        rows = list(_bars(results, workload))
        if rows:
            unit = "microseconds of the listener's CPU per event; whiskers: least and most of the rounds"
            yield workload, svg.bars(title(workload), unit, rows)
    for name, across, unit, lines in _growing(results):
        if any(lines.values()):
            yield name, svg.lines(title(name), across, unit, lines)


def _bars(results: Results, workload: str) -> Iterator[tuple[str, float, float, float]]:
    for name in figures.competitors(results, workload):
        found = [cpu / events * 1e6 for cpu, events in figures.pairs(results, workload, name)]
        if found:
            yield name, statistics.median(found), min(found), max(found)


def _growing(results: Results) -> Iterator[tuple[str, str, str, Lines]]:
    counts = figures.sizes(results, "rules-")
    rules = [(n, figures.each(results, f"rules-{n}", f"cnprocd {n} rules")) for n in counts]
    yield "rules", "rules, every exit evaluated", _EACH, {"cnprocd": _points(rules)}
    yield "rate", "events a second", _EACH, _rates(results)
    alive = figures.sizes(results, "table-")
    names = figures.competitors(results, f"table-{alive[0]}") if alive else []
    cost = {name: _points([(n, figures.each(results, f"table-{n}", name)) for n in alive]) for name in names}
    yield "table", "processes alive", _EACH, cost
    kib = {name: [(n, figures.median(results, f"table-{n}", name, "peak_kib")) for n in alive] for name in names}
    peak = {name: _points([(n, one and one / 1024) for n, one in line]) for name, line in kib.items()}
    yield "memory", "processes alive", "MB resident, at the peak", peak
    for what, across in _ACROSS.items():
        found = {int(size): one for size, one in results.get("growth", {}).get(what, {}).items()}
        each = [(size, one["us_each"]) for size, one in found.items()]
        yield f"{what}-offline", across, _EACH, {"cnprocd": _points(each)}
        memory = [(size, one["memory_kib"] / 1024) for size, one in found.items() if "memory_kib" in one]
        yield f"{what}-memory", across, "MB resident", {"cnprocd": _points(memory)}


def _rates(results: Results) -> Lines:
    """Return the cost by the rate that was reached, which at the top is lower than the one that was asked for."""
    lines: Lines = {}
    for workload in dict.fromkeys(run["workload"] for run in results["runs"]):
        if not workload.startswith("rate-"):
            continue
        for name in figures.competitors(results, workload):
            each = figures.each(results, workload, name)
            wall_s = figures.median(results, workload, name, "wall_s")
            events = figures.median(results, workload, name, "events")
            if each and wall_s and events:
                lines.setdefault(name, []).append((round(events / wall_s), each))
    return {name: sorted(line) for name, line in lines.items()}


def _points(line: list[tuple[int, float | None]]) -> list[tuple[float, float]]:
    return [(size, value) for size, value in line if value]
