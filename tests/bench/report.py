"""Turn measurements into documents: medians, ratios against targets, plots, tables.

The targets and plots go into docs/performance.md, between two markers. The tables of all workloads go into
results/README.md. So each figure stands in one document.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import plots
import svg
from figures import Results, competitors, each, median, most, values
from machine import QUIET_CPUS
from targets import targets_table

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[2] / "docs/performance.md"
BEGIN = "<!-- bench: begin (written by tests/bench/report.py) -->\n"
END = "<!-- bench: end -->\n"
_LOGGED = {
    "exits": "exits at once",
    "forks": "forks and exits, one after the other",
    "execs": "the same with execs",
}


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
    for old in directory.glob("*.svg"):
        old.unlink()
    for name, text in plots.drawn(results).items():
        (directory / f"{name}.svg").write_text(text)
    (directory / "README.md").write_text(page(results, path.name))
    if directory.resolve() == RESULTS:
        DOCUMENT.write_text(with_summary(DOCUMENT.read_text(), summary(results, path.name)))


def with_summary(document: str, text: str) -> str:
    """Return the document with the text between its two markers. Raise ValueError if a marker is missing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT.name} has no markers for the summary")
    return before + begin + text + end + after


def summary(results: Results, json_name: str) -> str:
    """Return the part of docs/performance.md that comes from one run: host, targets, headline figures, plots."""
    host, busy = results["host"], results["others_busy_cpus"]
    others = [run["listeners"] for run in results["runs"] if run["competitor"] == "nobody" and "listeners" in run]
    place = "../tests/bench/results"
    quiet = max(busy) <= QUIET_CPUS
    verdict = "So the machine was quiet." if quiet else "**So the machine was not quiet all the time.**"
    lines = [
        f"Made by `{results['command']}` on {results['date']} in {results['took_s']} s, at commit {host['commit']}. "
        f"All figures: [{json_name}]({place}/{json_name}).",
        "",
        f"{host['cpu']}, {host['cpus']} CPUs, Linux {host['kernel']}, Python {host['python']} "
        f"({host.get('python_program', 'a build of its own')}).",
        "",
        f"Between the parts of the bench, other programs kept {min(busy):g} to {max(busy):g} CPUs busy. {verdict} "
        "A shared machine distorts wall times and latencies. It also makes listeners that wake up for every event "
        "look cheap: they find many events when they get a CPU.",
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
    lines += _logged(results) + _latency(results) + _million(results)
    for plot in plots.drawn(results):
        lines += [f"![{plots.title(plot)}]({place}/{plot}.svg)", ""]
    return "\n".join(lines)


def page(results: Results, json_name: str) -> str:
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
        if not workload.startswith("logged-"):  # in the document
            lines += _workload(results, workload)
    lines += _idle_table(results)
    return "\n".join(lines)


def _workload(results: Results, workload: str) -> list[str]:
    lines = [
        f"## {workload}",
        "",
        "| | CPU s | least-most | us/event | lost | load: wall s | load: CPU s | done in s | wake-ups | MB | matched |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in competitors(results, workload):
        cpu = values(results, workload, name, "cpu_s")
        cells = [
            name,
            f"{statistics.median(cpu):.4f}" if cpu else "",
            f"{min(cpu):.4f}-{max(cpu):.4f}" if cpu else "",
            _shown(each(results, workload, name)),
            _shown(most(results, (workload,), name, "lost")),
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


def _logged(results: Results) -> list[str]:
    """Return the table of the storms in which every exit matches and is logged."""
    lines = [
        "Every exit matches a rule that logs. Behind: from the kernel's time of the last exit to its record, or until "
        "epoll returned the last pidfd. Matches beyond the budgets of a flood are counted instead of logged.",
        "",
        "| | load: wall time | behind | CPU a process | logged | counted |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    shown = len(lines)
    for name, what in _LOGGED.items():
        for one in competitors(results, f"logged-{name}"):
            workload = f"logged-{name}"
            found = {key: median(results, workload, one, key) for key in ("wall_s", "behind_s", "matched", "counted")}
            cells = [
                f"{_shown(found['wall_s'])} s",
                f"{_shown(found['behind_s'])} s",
                f"{_shown(each(results, workload, one))} us",
                f"{found['matched']:,.0f} of {median(results, workload, one, 'processes'):,.0f}"
                if found["matched"] is not None
                else "",
                f"{found['counted']:,.0f} counted" if found["counted"] is not None else "",
            ]
            lines.append(f"| {what}, {one} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > shown else []


def _latency(results: Results) -> list[str]:
    found = results.get("isolated")
    if not found:
        return []
    lines = [
        "Isolated failures: from the kernel's timestamp to the record (written after the decision), and to the hook's "
        "first instruction. The C listener's is a bare wake-up.",
        "",
        "| | p50 | p99 | p99.9 | most | of |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in found.items():
        for what in ("decision_ms", "hook_ms"):
            if one[what].get("count"):
                cells = [f"{_shown(one[what][key])} ms" for key in ("p50", "p99", "p99.9", "max")]
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
