"""The targets, and what one run measured of each. PURE.

A target is a ratio within one run, or a figure of the daemon alone. A missed target is marked MISSED; a target without
figures is marked as not measured.
"""

from __future__ import annotations

from collections.abc import Callable

import svg
from figures import Results, median, most, ratio, sizes


def _table_memory(results: Results, at_least: int) -> float | None:
    found = [size for size in sizes(results, "table-") if size >= at_least]
    kib = median(results, f"table-{found[0]}", "cnprocd all", "peak_kib") if found else None
    return kib / 1024 if kib is not None else None


def _memory_with_births(results: Results) -> float | None:
    """Return the daemon's peak with 1,000 processes and what 100,000 births take offline: pid_max may allow fewer."""
    base = _table_memory(results, 1_000)
    births = results.get("growth", {}).get("births", {}).get("100000")
    return base + births["memory_kib"] / 1024 if base is not None and births else None


def _rules_ratio(results: Results) -> float | None:
    many = median(results, "rules-10000", "cnprocd 10000 rules", "cpu_s")
    one = median(results, "rules-1", "cnprocd 1 rules", "cpu_s")
    return many / one if many is not None and one else None


def _isolated(results: Results, which: str, what: str, quantile: str) -> float | None:
    found: float | None = results.get("isolated", {}).get(which, {}).get(what, {}).get(quantile)
    return found


def _isolated_ratio(results: Results) -> float | None:
    ours, bare = (_isolated(results, which, "decision_ms", "p99") for which in ("failures", "C listener"))
    return ours / bare if ours is not None and bare else None


def _burst_behind(results: Results) -> float | None:
    return median(results, "logged-exits", "cnprocd, every exit logged", "behind_s")


def _ready(results: Results) -> tuple[float | None, float | None]:
    found = results.get("ready")
    if not found:
        return None, None
    ours, bare = found["cnprocd"]["median"], found["import pydantic"]["median"]
    return ours, ours / bare


def _idle(results: Results, name: str) -> float | None:
    found = (one for one in results.get("idle", []) if one["competitor"] == name)
    return next((one["wakeups"] - (one.get("pings") or 0) for one in found), None)


def _wrong(results: Results) -> float | None:
    """Return how many matches were too many or too few, over every storm with failures to match."""
    runs = [run for run in results["runs"] if run.get("to_match") and "counted" not in run]
    return sum(abs(run["matched"] - run["to_match"]) for run in runs) if runs else None


def _cpu(workload: str, one: str, other: str, key: str = "cpu_s") -> Callable[[Results], float | None]:
    return lambda results: ratio(results, workload, one, other, key)


def _lost(competitor: str, *workloads: str) -> Callable[[Results], float | None]:
    return lambda results: most(results, workloads, competitor, "lost")


Target = tuple[str, float, str, Callable[[Results], float | None]]

TARGETS: list[Target] = [
    ("all events, fork storm: CPU against the C listener", 0.45, "x", _cpu("fork", "cnprocd all", "C listener")),
    ("the same against forkstat", 0.2, "x", _cpu("fork", "cnprocd all", "forkstat")),
    ("the same against pyroute2", 0.05, "x", _cpu("fork", "cnprocd all", "pyroute2")),
    (
        "`nonzero_exit` + comm, 1% failing: CPU against the C listener on all events",
        0.05,
        "x",
        _cpu("failing", "cnprocd failures", "C listener"),
    ),
    (
        "the same by literal exe, against by comm",
        1.1,
        "x",
        _cpu("failing", "cnprocd failures by exe", "cnprocd failures"),
    ),
    ("events lost, all events, as fast as this machine forks", 0, "", _lost("cnprocd all", "minute")),
    ("events lost, `nonzero_exit` + comm, the same", 0, "", _lost("cnprocd failures", "minute", "million")),
    ("missing or extra matches, all storms, without recovered ones", 0, "", _wrong),
    ("10,000 rules against one: CPU", 1.5, "x", _rules_ratio),
    (
        "slow-down of the workload beyond the C listener's, CPU time, all events",
        1.03,
        "x",
        _cpu("fork", "cnprocd all", "C listener", "load_cpu_s"),
    ),
    ("the same, wall time", 1.03, "x", _cpu("fork", "cnprocd all", "C listener", "wall_s")),
    (
        "the same, CPU time, `nonzero_exit` + comm",
        1.03,
        "x",
        _cpu("fork", "cnprocd failures", "C listener", "load_cpu_s"),
    ),
    ("the same, wall time, `nonzero_exit` + comm", 1.03, "x", _cpu("fork", "cnprocd failures", "C listener", "wall_s")),
    (
        "the same, CPU time, four generators at once, `nonzero_exit` + comm",
        1.03,
        "x",
        _cpu("failing", "cnprocd failures", "C listener", "load_cpu_s"),
    ),
    (
        "the same, wall time, four generators at once",
        1.03,
        "x",
        _cpu("failing", "cnprocd failures", "C listener", "wall_s"),
    ),
    ("idle: wake-ups except the watchdog's, `nonzero_exit` + comm", 0, "", lambda r: _idle(r, "cnprocd failures")),
    ("resident memory at its peak, all events, 1,000 processes", 32, " MB", lambda r: _table_memory(r, 1_000)),
    ("resident memory at its peak, all events, 30,000 processes", 60, " MB", lambda r: _table_memory(r, 28_000)),
    (
        "the same with 1,000 processes, and 100,000 forked ones in the table (offline)",
        60,
        " MB",
        _memory_with_births,
    ),
    ("8,000 processes end at once, all match: the last record after the last exit", 0.25, " s", _burst_behind),
    ("decision of an isolated failure, p50", 0.3, " ms", lambda r: _isolated(r, "failures", "decision_ms", "p50")),
    ("the same, p99, against a bare wake-up's of the C listener", 1.5, "x", _isolated_ratio),
    ("hook's first instruction, p50", 2.5, " ms", lambda r: _isolated(r, "hook", "hook_ms", "p50")),
    ("`make demo`: from the kill until the hook has ended", 50, " ms", lambda r: r.get("demo", {}).get("median")),
    ("ready after exec", 0.3, " s", lambda r: _ready(r)[0]),
    ("ready against `python3 -c 'import pydantic'`", 2, "x", lambda r: _ready(r)[1]),
]


def targets_table(results: Results) -> str:
    """Return the table of all targets and what was measured."""
    lines = ["| Target | At most | Measured | |", "| --- | ---: | ---: | --- |"]
    for text, limit, unit, measured_by in TARGETS:
        measured = measured_by(results)
        if measured is None:
            lines.append(f"| {text} | {limit:g}{unit} | - | not measured in this run |")
        else:
            verdict = "met" if measured <= limit else "**MISSED**"
            lines.append(f"| {text} | {limit:g}{unit} | {svg.number(measured)}{unit} | {verdict} |")
    return "\n".join(lines)
