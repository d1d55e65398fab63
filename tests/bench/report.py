"""Turn measurements into documents: medians, ratios against targets, plots, tables.

The targets and plots go into docs/performance.md, between two markers. The tables of all workloads go into
results/README.md. So each figure stands in one document. A target is a ratio within one run. A missed target is marked
MISSED; a target without figures is marked as not measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import svg

Results = dict[str, Any]  # JSON, read back by the names that this file writes
RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[2] / "docs/performance.md"
BEGIN = "<!-- bench: begin (written by tests/bench/report.py) -->\n"
END = "<!-- bench: end -->\n"
_TITLES = {
    "fork": "Fork and exit, one after the other: CPU per event",
    "exec": "Fork, exec and exit: CPU per event",
    "failing": "Four programs, 1% of exits failing: CPU per event that happened",
    "rules": "How cost grows with rules",
    "table": "How cost grows with live processes",
    "memory": "How memory grows with live processes",
}


def values(results: Results, workload: str, competitor: str, key: str) -> list[float]:
    """Return one figure of every round that has it."""
    runs = [run for run in results["runs"] if run["workload"] == workload and run["competitor"] == competitor]
    return [run[key] for run in runs if run.get(key) is not None]


def median(results: Results, workload: str, competitor: str, key: str) -> float | None:
    found = values(results, workload, competitor, key)
    return statistics.median(found) if found else None


def ratio(results: Results, workload: str, one: str, other: str, key: str = "cpu_s") -> float | None:
    """Return the ratio of two medians per event. Listeners do not all survive storms of the same size."""
    above, below = (_each(results, workload, name, key) for name in (one, other))
    return above / below if above is not None and below else None


def _most(results: Results, workloads: tuple[str, ...], competitor: str, key: str) -> float | None:
    found = [value for workload in workloads for value in values(results, workload, competitor, key)]
    return max(found) if found else None


def _sizes(results: Results, prefix: str) -> list[int]:
    names = {run["workload"] for run in results["runs"] if run["workload"].startswith(prefix)}
    return sorted(int(size) for name in names if (size := name.removeprefix(prefix)).isdigit())


def _table_memory(results: Results, at_least: int) -> float | None:
    sizes = [size for size in _sizes(results, "table-") if size >= at_least]
    kib = median(results, f"table-{sizes[0]}", "cnprocd all", "peak_kib") if sizes else None
    return kib / 1024 if kib is not None else None


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
    return median(results, "burst-logged", "cnprocd, every exit logged", "behind_s")


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
    return lambda results: _most(results, workloads, competitor, "lost")


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
    ("8,000 processes end at once, all match: the last record after the last exit", 0.25, " s", _burst_behind),
    ("decision of an isolated failure, p50", 0.3, " ms", lambda r: _isolated(r, "failures", "decision_ms", "p50")),
    ("the same, p99, against a bare wake-up's of the C listener", 1.5, "x", _isolated_ratio),
    ("hook's first instruction, p50", 2.5, " ms", lambda r: _isolated(r, "hook", "hook_ms", "p50")),
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


def write(results: Results, path: Path, join: Results | None) -> None:
    """Write JSON, plots and documents. `join`: an earlier run, whose other workloads are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if join is not None:
        again = {run["workload"] for run in results["runs"]}
        both = {
            "runs": [run for run in join["runs"] if run["workload"] not in again] + results["runs"],
            "command": f"{join['command']}; {results['command']}",
            "others_busy_cpus": join["others_busy_cpus"] + results["others_busy_cpus"],
            "took_s": join["took_s"] + results["took_s"],
        }
        results = join | results | both
    path.write_text(json.dumps(results, indent=1) + "\n")
    publish(results, path)


def path_of(results: Results, directory: Path) -> Path:
    return directory / f"{results['date']}-{results['host']['kernel']}.json"


def publish(results: Results, path: Path) -> None:
    """Write plots and tables beside the JSON file and, for the project's own results, the summary in the document."""
    directory = path.parent
    plots = _plots(results)
    for name, text in plots.items():
        (directory / f"{name}.svg").write_text(text)
    (directory / "README.md").write_text(_page(results, path.name))
    if directory.resolve() == RESULTS:
        DOCUMENT.write_text(with_summary(DOCUMENT.read_text(), summary(results, path.name, list(plots))))


def with_summary(document: str, text: str) -> str:
    """Return the document with the text between its two markers. Raise ValueError if a marker is missing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT.name} has no markers for the summary")
    return before + begin + text + end + after


def _competitors(results: Results, workload: str) -> list[str]:
    return list(dict.fromkeys(run["competitor"] for run in results["runs"] if run["workload"] == workload))


def _plots(results: Results) -> dict[str, str]:
    plots = {}
    bursts = [f"burst-{n}" for n in _sizes(results, "burst-")]
    for workload in ("fork", "exec", "failing", *bursts):
        rows = []
        for name in _competitors(results, workload):
            each = [cpu / events * 1e6 for cpu, events in _pairs(results, workload, name)]
            if each:
                rows.append((name, statistics.median(each), min(each), max(each)))
        if rows:
            unit = "microseconds of the listener's CPU per event; whiskers: least and most of the rounds"
            plots[workload] = svg.bars(_title(workload), unit, rows)
    counts = _sizes(results, "rules-")
    if counts:
        line = [(n, _each(results, f"rules-{n}", f"cnprocd {n} rules")) for n in counts]
        plots["rules"] = svg.lines(
            _title("rules"), "rules, every exit evaluated", "microseconds of CPU per event",
            {"cnprocd": [(a, b) for a, b in line if b]},
        )  # fmt: skip
    sizes = _sizes(results, "table-")
    if sizes:
        names = _competitors(results, f"table-{sizes[0]}")
        cost = {name: [(n, _each(results, f"table-{n}", name)) for n in sizes] for name in names}
        plots["table"] = svg.lines(
            _title("table"), "processes alive", "microseconds of CPU per event",
            {name: [(a, b) for a, b in line if b] for name, line in cost.items()},
        )  # fmt: skip
        memory = {name: [(n, median(results, f"table-{n}", name, "peak_kib")) for n in sizes] for name in names}
        plots["memory"] = svg.lines(
            _title("memory"), "processes alive", "MB resident, at the peak",
            {name: [(a, b / 1024) for a, b in line if b] for name, line in memory.items()},
        )  # fmt: skip
    return plots


def _pairs(results: Results, workload: str, competitor: str, key: str = "cpu_s") -> list[tuple[float, float]]:
    runs = [run for run in results["runs"] if run["workload"] == workload and run["competitor"] == competitor]
    return [(run[key], run["events"]) for run in runs if run.get(key) is not None]


def _each(results: Results, workload: str, competitor: str, key: str = "cpu_s") -> float | None:
    """Return microseconds per event, the median of the rounds."""
    found = [seconds / events * 1e6 for seconds, events in _pairs(results, workload, competitor, key)]
    return statistics.median(found) if found else None


def summary(results: Results, json_name: str, plots: list[str]) -> str:
    """Return the part of docs/performance.md that comes from one run: host, targets, headline figures, plots."""
    host, busy = results["host"], results["others_busy_cpus"]
    others = [run["listeners"] for run in results["runs"] if run["competitor"] == "nobody" and "listeners" in run]
    place = "../tests/bench/results"
    lines = [
        f"Made by `{results['command']}` on {results['date']} in {results['took_s']} s, at commit {host['commit']}. "
        f"All figures: [{json_name}]({place}/{json_name}).",
        "",
        f"{host['cpu']}, {host['cpus']} CPUs, Linux {host['kernel']}, Python {host['python']}. Between the parts of "
        f"the bench, other programs kept {min(busy):g} to {max(busy):g} CPUs busy. More than a few hundredths mean "
        "that the machine was shared. A shared machine distorts wall times and latencies. It also makes listeners "
        "that wake up for every event look cheap: they find many events when they get a CPU.",
        "",
        targets_table(results),
        "",
    ]
    if any(others):
        lines += [
            f"In the runs without a listener (`nobody`), up to {max(others)} listeners of other programs were active. "
            "The slow-down against these runs is understated for all listeners alike.",
            "",
        ]
    lines += _million(results)
    for plot in plots:
        lines += [f"![{_title(plot)}]({place}/{plot}.svg)", ""]
    return "\n".join(lines)


def _title(plot: str) -> str:
    prefix, _, number = plot.partition("-")
    return f"{int(number):,} processes end at once: CPU per exit" if prefix == "burst" else _TITLES[plot]


def _page(results: Results, json_name: str) -> str:
    lines = [
        "# Results of the bench",
        "",
        f"Medians of all rounds, from `{json_name}`. Targets, plots and their meaning: "
        "[docs/performance.md](../../../docs/performance.md).",
        "",
    ]
    if results["skipped"]:
        lines += ["Skipped:", "", *(f"- {name}: {reason}" for name, reason in results["skipped"].items()), ""]
    for workload in dict.fromkeys(run["workload"] for run in results["runs"]):
        lines += _workload(results, workload)
    lines += _latency(results) + _idle_table(results)
    return "\n".join(lines)


def _workload(results: Results, workload: str) -> list[str]:
    lines = [
        f"## {workload}",
        "",
        "| | CPU s | least-most | us/event | lost | load: wall s | load: CPU s | done in s | wake-ups | MB | matched |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in _competitors(results, workload):
        cpu = values(results, workload, name, "cpu_s")
        cells = [
            name,
            f"{statistics.median(cpu):.4f}" if cpu else "",
            f"{min(cpu):.4f}-{max(cpu):.4f}" if cpu else "",
            _shown(_each(results, workload, name)),
            _shown(_most(results, (workload,), name, "lost")),
            *(_shown(median(results, workload, name, key)) for key in ("wall_s", "load_cpu_s", "done_s", "wakeups")),
            _shown((median(results, workload, name, "peak_kib") or 0) / 1024 or None),
            "/".join(_shown(median(results, workload, name, key)) for key in ("matched", "to_match")).strip("/"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        broken = [
            r["broken"]
            for r in results["runs"]
            if r["workload"] == workload and r["competitor"] == name and "broken" in r
        ]
        lines += [f"| {name} broke | {broken[0][:120]} |||||||||"] if broken else []
    return [*lines, ""]


def _shown(value: float | None) -> str:
    return "" if value is None else svg.number(value)


def _million(results: Results) -> list[str]:
    """Return the figures of a million processes with one rule on one of four names."""
    found = next((run for run in results["runs"] if run["workload"] == "million" and "delivered" in run), None)
    if found is None:
        return []
    late = found["decision_ms"]
    return [
        f"{found['processes']:,} processes of four names, one in a hundred failing, one rule on one of the names: "
        f"{found['events']:,} events happened, {found['failed']:,} of them failures; {found['delivered']:,} were "
        f"delivered (with those of other programs), {found['lost']:,} dropped, {found['matched']:,} of "
        f"{found['to_match']:,} matched; {found['cpu_s']:.2f} s of CPU, {found['peak_kib'] / 1024:.1f} MB at the peak.",
        f"From the kernel's timestamp to the record: p50 {_shown(late.get('p50'))} ms, "
        f"p99 {_shown(late.get('p99'))} ms, p99.9 {_shown(late.get('p99.9'))} ms.",
        "",
    ]


def _latency(results: Results) -> list[str]:
    found = results.get("isolated")
    if not found:
        return []
    lines = [
        "## Isolated failures",
        "",
        "Kernel timestamp to the record (written after the decision), and to the hook's first instruction, in ms.",
        "",
        "| | p50 | p99 | p99.9 | most | of |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in found.items():
        for what in ("decision_ms", "hook_ms"):
            if one[what].get("count"):
                cells = [_shown(one[what][key]) for key in ("p50", "p99", "p99.9", "max")]
                lines.append(f"| {name}, {what.removesuffix('_ms')} | {' | '.join(cells)} | {one[what]['count']} |")
    return [*lines, ""]


def _idle_table(results: Results) -> list[str]:
    found = results.get("idle")
    if not found:
        return []
    lines = [
        "## Idle",
        "",
        f"{found[0]['seconds']:g} seconds, all listeners side by side. Other programs caused "
        f"{found[0]['events']} events meanwhile, which wake every listener that subscribed to them.",
        "",
        "| | wake-ups | of them for the watchdog | CPU ms | MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        pings = "" if one.get("pings") is None else str(one["pings"])
        cells = [_shown(one["wakeups"]), pings, _shown(one["cpu_s"] * 1000), _shown(one["rss_kib"] / 1024)]
        lines.append(f"| {one['competitor']} | {' | '.join(cells)} |")
    return [*lines, ""]
