"""`make bench`: measure cnprocd and other listeners in turn in one run, so that ratios are comparable.

    python tests/bench/bench.py [--full] [--rounds N] [--only PART...] [--scale X] [--patience S]

Rounds go A B C A B C. A figure is the median of its rounds, with minimum and maximum: a disturbance of this machine for
a minute affects all listeners. Before each part the bench waits for a quiet machine; whether it became quiet is part of
the results. No result fails the run; the table of
targets shows which were met.

Results: tests/bench/results/<date>-<kernel>.json, one SVG for each plot, README.md beside them, and
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import competitors
import growth
import idle
import machine
import report
import targets
import workloads
from competitors import Competitor, Running
from workloads import NAMES, Crowd, Generator, Storm

PARTS = (
    *("storms", "burst", "logged", "rate", "rules", "table", "growth", "latency", "idle", "ready", "demo", "minute"),
    "million",
)
ISOLATED_US = 100_000  # longer than each window in which events gather: up to 50 ms if the rules only log
ROOM_FOR_PIDS = 2200  # of pid_max, for other programs on this machine


class Bench:
    """One run and its results."""

    def __init__(self, full: bool, rounds: int, scale: float) -> None:
        self.full, self.rounds, self.scale = full, rounds, scale
        self.runs: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.load = Generator()
        self.those: list[Competitor] = []
        for one in competitors.COMPETITORS:
            reason = one.why_not()
            if reason is None:
                self.those.append(one)
            else:
                self.skip(one.name, reason)
        pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
        self.most = pid_max - ROOM_FOR_PIDS

    def skip(self, what: str, reason: str) -> None:
        self.skipped[what] = reason
        print(f"skipped: {what}: {reason}", flush=True)

    def size(self, normal: int, full: int | None = None) -> int:
        """Return a multiple of 400, which four names and one failure in a hundred divide."""
        wanted = (full if self.full and full is not None else normal) * self.scale
        return max(400, int(wanted) // 400 * 400)

    def note(
        self, workload: str, competitor: str, round_: int, measured: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Run one measurement. An error is recorded as a result."""
        try:
            result = measured()
        except (OSError, RuntimeError, ValueError) as error:  # TimeoutError is an OSError
            result = {"broken": f"{type(error).__name__}: {error}"[:500]}
        result = {"workload": workload, "competitor": competitor, "round": round_} | result
        self.runs.append(result)
        shown = {
            key: result[key] for key in ("cpu_s", "lost", "wall_s", "matched", "done_s", "broken") if key in result
        }
        print(f"{workload:12} {competitor:26} {round_}  {shown}", flush=True)
        return result

    # The parts.

    def storms(self) -> None:
        """Measure every competitor, and the machine without a listener, in three storms."""
        those = [
            Storm("fork", "fork and exit, one after the other", "fork", self.size(10_000, 40_000), NAMES[:1], 0, 2),
            Storm("exec", "fork, exec and exit", "exec", self.size(2_000, 3_000), NAMES[:1], 0, 3),
            Storm("failing", "four programs, 1% of exits failing", "fork", self.size(4_000, 20_000), NAMES, 100, 2),
        ]
        those = [storm for storm in those if self.load.can(storm.mode)]
        for round_ in range(self.rounds):
            for one in (None, *self.those):
                of_failures = one in (competitors.C_FAILURES, competitors.BY_EXE, competitors.BY_UNIT)
                self._in_turn(one, round_, those[-1:] if of_failures else those)

    def _in_turn(self, one: Competitor | None, round_: int, those: list[Storm]) -> None:
        """Run every storm with the same listener. Restart a listener that breaks for the next storm."""
        listener: Running | None = None
        for storm in those:
            if one is not None and one.most is not None:
                storm = replace(storm, each=min(storm.each, one.most // len(storm.names)))
            if one is not None and listener is None:
                try:
                    listener = one.start()
                except (OSError, RuntimeError) as error:
                    self.skip(one.name, str(error))
                    return
            matches = one is not None and one.rules is not None
            result = self.note(
                storm.name,
                one.name if one is not None else "nobody",
                round_,
                partial(workloads.measure, self.load, listener, storm, matches),
            )
            if one is competitors.BY_UNIT and "to_match" in result:
                result["to_match"] = 0  # no process is of this unit
            if "broken" in result and listener is not None:
                listener.stop()
                listener = None
        if listener is not None:
            listener.stop()

    def burst(self) -> None:
        """Measure 8,000 processes that end at once, and 32,000 if there are enough PIDs."""
        if not self.load.can("burst"):
            self.skip("burst", "no C compiler")
            return
        sizes = {self.size(8_000): (min(self.rounds, 2), [None, *self.those])}
        if self.full:
            few = [one for one in self.those if one in (competitors.C_LISTENER, competitors.ALL, competitors.FAILURES)]
            sizes[self.size(min(32_000, self.most))] = (1, [None, *few])
        reason = competitors.pidfds()
        for count, (rounds, those) in sizes.items():
            for round_ in range(rounds):
                for one in those:
                    name = one.name if one is not None else "nobody"
                    self.note(
                        f"burst-{count}",
                        name,
                        round_,
                        partial(workloads.burst, self.load, one, count),
                    )
                if reason is None:
                    self.note(
                        f"burst-{count}",
                        "pidfd+epoll",
                        round_,
                        partial(workloads.burst_with_pidfds, self.load, count),
                    )

    def logged(self) -> None:
        """Measure processes whose exits all match and are logged: alive before, forked, and forked and executed."""
        count, name = self.size(8_000), competitors.EVERY_EXIT.name
        modes = {"exits": "burst", "forks": "fork", "execs": "exec"}
        for round_ in range(self.rounds):
            for what, mode in modes.items():
                if self.load.can(mode):
                    self.note(f"logged-{what}", name, round_, partial(workloads.logged, self.load, mode, count))
            if competitors.pidfds() is None and self.load.can("burst"):
                self.note("logged-exits", "pidfd+epoll", round_, partial(workloads.burst_with_pidfds, self.load, count))

    def rate(self) -> None:
        """Measure forks and exits at steady rates, and at last as fast as this machine forks."""
        if not self.load.can("rate"):
            self.skip("rate", "no C compiler")
            return
        seconds = 1.0 if self.full else 0.5
        rates = (1_000, 8_000, 64_000)  # events a second
        those = [
            Storm(f"rate-{n}", "", "rate", max(100, int(n / 2 * seconds * self.scale)), NAMES[:1], 0, 2, n // 2)
            for n in rates
        ]
        those.append(Storm("rate-fastest", "", "fork", self.size(10_000, 40_000), NAMES[:1], 0, 2))
        for round_ in range(min(self.rounds, 2)):
            for one in (competitors.C_LISTENER, competitors.ALL, competitors.FAILURES):
                if one in self.those:
                    self._in_turn(one, round_, those)

    def rules(self) -> None:
        """Measure exits with more and more rules, none of which matches."""
        storm = Storm("rules", "", "fork", self.size(10_000), NAMES[:1], 0, 2)
        for round_ in range(self.rounds):
            for count in (1, 100, 10_000):
                one = Competitor(f"cnprocd {count} rules", competitors.CNPROCD, rules=competitors.many_rules(count))
                self.note(f"rules-{count}", one.name, round_, partial(self._with, one, storm))

    def _with(self, one: Competitor, storm: Storm) -> dict[str, Any]:
        listener = one.start()
        try:
            began_s = time.monotonic() - listener.began
            return {"ready_s": began_s} | workloads.measure(self.load, listener, storm, one.rules is not None)
        finally:
            listener.stop()

    def table(self) -> None:
        """Measure the cost of a storm beside more and more live processes."""
        if not self.load.can("burst"):
            self.skip("table", "no C compiler")
            return
        storm = Storm("table", "", "fork", self.size(4_000), NAMES[:1], 0, 2)
        for count in (1_000, min(30_000, self.most)) if self.full else (1_000, 8_000):
            with Crowd(self.load, count) as crowd:
                for round_ in range(min(self.rounds, 2) if self.full else 1):
                    for one in (competitors.C_LISTENER, competitors.ALL, competitors.FAILURES):
                        self.note(f"table-{crowd.count}", one.name, round_, partial(self._with, one, storm))

    def growth(self) -> None:
        """Measure offline how the cost of an event grows with processes, rules and CPUs that this machine lacks."""
        found: dict[str, dict[str, Any]] = {}
        self.found["growth"] = found
        for what, sizes in growth.SIZES.items():
            for size in sizes:
                try:
                    found.setdefault(what, {})[str(size)] = growth.measured(what, size)
                except RuntimeError as error:
                    self.skip(f"growth, {what} {size}", str(error))
                print(f"growth {what} {size} {found.get(what, {}).get(str(size))}", flush=True)

    def latency(self) -> None:
        """Measure isolated failures: until the record, and until the hook's first instruction."""
        if not self.load.can("pace"):
            self.skip("latency", "no C compiler")
            return
        hook = competitors.FAILED.replace("}}", "}, run: {command: [/bin/true]}}")
        hooked = competitors.cnprocd("cnprocd with a hook", hook, competitors.MARK)
        count = max(20, int((400 if self.full else 200) * self.scale))
        self.found["isolated"] = {
            "failures": workloads.isolated(self.load, competitors.FAILURES, count, ISOLATED_US),
            "C listener": workloads.bare_wakeups(self.load, count, ISOLATED_US),
            "all": workloads.isolated(self.load, competitors.ALL, count // 4, ISOLATED_US),
            "hook": workloads.isolated(self.load, hooked, count // 2, ISOLATED_US),
        }
        print("isolated", self.found["isolated"], flush=True)

    def idle(self) -> None:
        """Measure all listeners while nothing happens."""
        seconds = 30.0 if self.full else 10.0
        self.found["idle"] = idle.idle([one for one in self.those if one.name != "bpftrace"], seconds)
        print("idle", *self.found["idle"], sep="\n  ", flush=True)

    def ready(self) -> None:
        self.found["ready"] = workloads.ready(5)
        print("ready", self.found["ready"], flush=True)

    def demo(self) -> None:
        """Measure the demo from the kill to the end of its hook."""
        self.found["demo"] = workloads.demo(10 if self.full else 3)
        print("demo", self.found["demo"], flush=True)

    def minute(self) -> None:
        """Run four generators at once, as fast as possible, for half a minute (a few seconds without --full)."""
        storm = Storm("minute", "", "fork", self.size(5_000, 100_000), NAMES, 100, 2)
        for one in (competitors.C_LISTENER, competitors.ALL, competitors.FAILURES):
            if one in self.those:
                self.note("minute", one.name, 0, partial(self._with, one, storm))

    def million(self) -> None:
        """Measure a million processes of four names, one failure in a hundred, one rule on one of the names."""
        storm = Storm("million", "", "fork", self.size(250_000), NAMES, 100, 2)
        self.note("million", "cnprocd failures", 0, lambda: self._million(storm))

    def _million(self, storm: Storm) -> dict[str, Any]:
        listener = competitors.FAILURES.start()
        try:
            result = workloads.measure(self.load, listener, storm, True)
            result["decision_ms"] = machine.quantiles(workloads.decisions_ms(listener, "failed"))
        finally:
            text = listener.stop()
        stopping = next(line for line in text.splitlines() if '"event":"stopping"' in line)
        result["delivered"] = int(json.loads(stopping)["message"].split(" events")[0].rsplit(" ", 1)[1])
        return result

    def host(self) -> dict[str, Any]:
        cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
        version = ["git", "-C", str(competitors.TOP), "describe", "--always", "--dirty"]
        return {
            "kernel": platform.release(),
            "machine": platform.machine(),
            "cpu": cpu.split(": ", 1)[1],
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "python_program": os.path.realpath(sys.executable),
            "commit": subprocess.run(version, capture_output=True, text=True).stdout.strip(),
            "c_compiler": shutil.which("cc"),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="use the full sizes, with a million processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all sizes, to try the bench itself")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None)
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds to wait for a quiet machine before each part"
    )
    parser.add_argument("--join", action="store_true", help="keep today's results of other workloads")
    parser.add_argument("--publish", type=Path, help="write documents and plots of a JSON file without measuring")
    parser.add_argument("--results", type=Path, default=competitors.HERE / "results")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("the bench needs root, like every listener")
        return 77
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # packages contain bytecode; here the first start makes it
    if options.publish is not None:
        print(targets.targets_table(json.loads(options.publish.read_text())))
        report.publish(json.loads(options.publish.read_text()), options.publish)
        return 0
    bench = Bench(options.full, options.rounds, options.scale)
    wanted = options.only or [part for part in PARTS if options.full or part != "million"]
    began, others = time.time(), list[float]()
    results: dict[str, Any] = {
        "command": " ".join(["python", "tests/bench/bench.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "host": bench.host(),
        "others_busy_cpus": others,
        "skipped": bench.skipped,
        "runs": bench.runs,
    }
    path = report.path_of(results, options.results)
    join = json.loads(path.read_text()) if options.join and path.exists() else None
    for part in wanted:
        others.append(machine.wait_until_quiet(options.patience))
        if others[-1] > machine.QUIET_CPUS:
            print(f"not quiet: other programs keep {others[-1]:g} CPUs busy", flush=True)
        try:
            getattr(bench, part)()
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            bench.skip(part, f"{type(error).__name__}: {error}"[:500])
        # Write after each part, so that an interrupted run keeps its results.
        report.write(results | bench.found | {"took_s": round(time.time() - began)}, path, join)
    print(f"\n{targets.targets_table(json.loads(path.read_text()))}\n\nresults: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
