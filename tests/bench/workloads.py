"""The workloads, and the measurements of a listener during each.

A listener is started once in a round and gets each storm in turn. Its CPU clock, drops and wake-ups are read before and
after a storm. What the events of other programs cost it is measured just before, and subtracted. A storm is over when a
last process of a known name has failed, and the listener has read everything and is idle. The kernel's cost of sending
events is in the CPU time of the storm: the process that forks or exits pays for it.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import competitors
import machine
from competitors import Competitor, Running

NAMES = ("cnpb-a", "cnpb-b", "cnpb-c", "cnpb-d")
MARK_NAME = "cnpb-mark"
LOGGED_S = 0.5  # for 8,000 matches
STORM_PY = Path(__file__).parents[1] / "kernel/storm.py"
DEMO_PY = Path(__file__).parents[1] / "demo/demo.py"


@dataclass(frozen=True)
class Storm:
    """`each` processes under each of `names`, one generator for each name, all at once."""

    name: str
    title: str
    mode: str
    each: int
    names: tuple[str, ...]
    failing_every: int
    events_each: int  # of one process, as the kernel sends them
    per_second: int = 0  # processes, of the mode "rate"

    @property
    def processes(self) -> int:
        return self.each * len(self.names)

    @property
    def events(self) -> int:
        return self.processes * self.events_each


class Generator:
    """The C program if it could be compiled, else the slow Python one (no exec, no bursts)."""

    def __init__(self) -> None:
        self.programs = competitors.load_programs((*NAMES, MARK_NAME))

    def can(self, mode: str) -> bool:
        return self.programs is not None or mode == "fork"

    def start(self, mode: str, count: int, every: int, name: str) -> subprocess.Popen[str]:
        if self.programs is not None:
            argv = [self.programs[name], mode, str(count), str(every), name]
        else:
            argv = [sys.executable, "-IS", str(STORM_PY), str(count), str(every or 10**9), name]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, storm: Storm) -> dict[str, float]:
        """Run all generators. Return the wall time of the slowest, CPU time and failures of all."""
        began = time.monotonic()
        number = storm.per_second or storm.failing_every
        running = [self.start(storm.mode, storm.each, number, name) for name in storm.names]
        told = [process.communicate()[0] for process in running]
        if self.programs is None:
            failed = sum(len(line.split()) - 1 for text in told for line in text.splitlines())
            return {"wall_s": time.monotonic() - began, "failed": failed}
        found = [json.loads(text) for text in told]
        return {
            "wall_s": max(one["wall_s"] for one in found),
            "load_cpu_s": sum(one["cpu_s"] for one in found),
            "failed": sum(one["failed"] for one in found),
        }

    def mark(self) -> None:
        """Start one process of a known name that fails with 3."""
        if self.programs is not None:
            self.start("pace", 1, 0, MARK_NAME).communicate()
        else:
            subprocess.run([sys.executable, "-ISc", "open('/proc/self/comm','w').write('cnpb-mark'); exit(3)"])


def measure(load: Generator, listener: Running | None, storm: Storm, matches: bool) -> dict[str, Any]:
    """Run one storm with one listener or none. `matches`: the listener is a cnprocd, and its matches are counted."""
    result: dict[str, Any] = {"processes": storm.processes, "events": storm.events, "listeners": machine.listeners()}
    if listener is None:
        return result | load.run(storm)
    listener.must_live()
    before = Reading(listener)
    matched_before = _matched(listener) if matches else (0, 0)
    result |= load.run(storm)
    if matches:
        _evaluated_all(load, listener, before.marks)
    else:
        load.mark()
    if not machine.wait_until_idle(listener.pid, background_share=before.background_share):
        drops = machine.dropped(listener.pid) - before.dropped
        raise RuntimeError(f"leaves its queue unread after losing {drops} events")
    result |= before.since(listener)
    if matches:
        seen, recovered = _matched(listener)
        result |= {"matched": seen - matched_before[0], "recovered": recovered - matched_before[1]}
        result["to_match"] = storm.each // storm.failing_every if "cnpb-b" in storm.names and storm.failing_every else 0
    return result


class Reading:
    """A listener's counters at one moment."""

    def __init__(self, listener: Running, is_idle: bool = False) -> None:
        """`is_idle`: nothing but the events of other programs is to be measured."""
        self.background_share = 0.0 if is_idle else machine.background(listener.pid)
        self.began_s = time.monotonic()
        self.marks = _marks(listener)
        self.dropped = machine.dropped(listener.pid)
        self.wakeups = machine.wakeups(listener.pid)
        self.cpu_ns = machine.cpu_ns(listener.pid)

    def since(self, listener: Running) -> dict[str, Any]:
        listener.must_live()
        cpu_s = (machine.cpu_ns(listener.pid) - self.cpu_ns) / 1e9
        background_cpu_s = self.background_share * (time.monotonic() - self.began_s)
        resident, peak = machine.memory_kib(listener.pid)
        return {
            "cpu_s": max(0.0, cpu_s - background_cpu_s),
            "background_cpu_s": background_cpu_s,
            "lost": machine.dropped(listener.pid) - self.dropped,
            "wakeups": machine.wakeups(listener.pid) - self.wakeups,
            "rss_kib": resident,
            "peak_kib": peak,
        }


def _marks(listener: Running) -> int:
    return listener.output.read_bytes().count(b'"rule":"mark"')


def _matched(listener: Running) -> tuple[int, int]:
    """Return (matches with a seen exit, recovered matches) of the failing processes."""
    lines = [line for line in listener.output.read_bytes().splitlines() if b'"rule":"failed"' in line]
    recovered = sum(b'"recovered":true' in line for line in lines)
    return len(lines) - recovered, recovered


def _evaluated_all(load: Generator, listener: Running, marks: int) -> None:
    """Return when a cnprocd has evaluated all events before this call. Try again if a mark is lost."""
    for patience_s in (5.0, 10.0, 20.0, 40.0):
        load.mark()
        with contextlib.suppress(TimeoutError):
            return listener.wait_for(lambda: _marks(listener) > marks, patience_s)
    raise RuntimeError("does not match the mark")


def burst(load: Generator, competitor: Competitor | None, count: int) -> dict[str, Any]:
    """Run `count` processes that end at once. `done_s`: from the release until the listener has seen all."""
    result: dict[str, Any] = {"events": count, "processes": count, "listeners": machine.listeners()}
    with Crowd(load, count) as crowd:
        if competitor is None:
            return result | crowd.release()
        listener = competitor.start()
        text = ""
        try:
            machine.wait_until_idle(listener.pid, 2.0)
            before = Reading(listener)
            told = crowd.release()
            if competitor.rules is None:
                load.mark()
            else:
                _evaluated_all(load, listener, before.marks)
                (*_, mark) = (one for one in competitors.records(listener) if one.get("rule") == "mark")
                told["done_s"] = (decided_ns(mark, machine.wall_minus_monotonic_ns()) - told["began_ns"]) / 1e9
            machine.wait_until_idle(listener.pid)
            result |= before.since(listener)
        finally:
            text = listener.stop()
        if competitor is competitors.C_LISTENER:
            told["done_s"] = (json.loads(text.splitlines()[-1])["last_ns"] - told["began_ns"]) / 1e9
        return result | told


def logged(load: Generator, mode: str, count: int) -> dict[str, Any]:
    """Run `count` processes whose exits all match and are logged. `behind_s`: from the last exit to its record.

    A match of a flood may be counted instead of logged. So the last exit is that of the last match with a record.
    """
    with Crowd(load, count) if mode == "burst" else _Line(load, mode, count) as crowd:
        listener = competitors.EVERY_EXIT.start()
        try:
            machine.wait_until_idle(listener.pid, 2.0)
            before = Reading(listener)
            told = crowd.release()
            time.sleep(LOGGED_S)  # to read its output now would take CPU time from it
            _evaluated_all(load, listener, before.marks)
            for _ in range(20):
                if sum(one.get("rule") == "failed" for one in competitors.records(listener)) >= count:
                    break
                time.sleep(LOGGED_S)
            machine.wait_until_idle(listener.pid)
            result = before.since(listener)
        finally:
            text = listener.stop()
    found = [one for one in competitors.records_of(text) if one.get("rule") == "failed"]
    matches = [one for one in found if one["event"] == "rule_matched" and one["ppid"] == crowd.pid]
    offset = machine.wall_minus_monotonic_ns()
    last_ns = max(decided_ns(one, offset) for one in matches)
    return (
        {
            "events": count,
            "processes": count,
            "listeners": machine.listeners(),
            "matched": len(matches),
            "counted": sum(int(str(one["count"])) for one in found if one["event"] == "matches_counted"),
            "to_match": crowd.count,
            "behind_s": (last_ns - max(int(str(one["kernel_time_ns"])) for one in matches)) / 1e9,
        }
        | told
        | result
    )


class _Line:
    """Processes that start and end one after the other, once they are released."""

    def __init__(self, load: Generator, mode: str, count: int) -> None:
        self._load, self._mode, self.count = load, mode, count
        self.pid = 0

    def release(self) -> dict[str, Any]:
        process = self._load.start(self._mode, self.count, 0, "cnpb-a")
        self.pid = process.pid
        told = json.loads(process.communicate()[0])
        return {"began_ns": told["began_ns"], "wall_s": told["wall_s"], "load_cpu_s": told["cpu_s"]}

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def burst_with_pidfds(load: Generator, count: int) -> dict[str, Any]:
    """Run the burst with a pidfd for each process. `cpu_s` is of waiting, `open_cpu_s` of opening."""
    with Crowd(load, count) as crowd:
        argv = [str(competitors.BUILD / "pidfds")]
        holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write(crowd.pids)
        holder.stdin.flush()
        holder.stdout.readline()
        resident, peak = machine.memory_kib(holder.pid)
        told = crowd.release()
        seen = json.loads(holder.communicate()[0])
    return {
        "events": count,
        "processes": count,
        "listeners": machine.listeners(),
        "cpu_s": seen["cpu_s"],
        "open_cpu_s": seen["open_cpu_s"],
        "done_s": (seen["last_ns"] - told["began_ns"]) / 1e9,
        "behind_s": max(0.0, (seen["last_ns"] - told["began_ns"]) / 1e9 - told["wall_s"]),
        "lost": count - seen["exits"],
        "rss_kib": resident,
        "peak_kib": peak,
    } | told


class Crowd:
    """Processes that live and wait."""

    def __init__(self, load: Generator, count: int) -> None:
        self._process = load.start("burst", count, 0, "cnpb-a")
        assert self._process.stdout is not None
        self.pids = self._process.stdout.readline()
        self.count = len(self.pids.split()) - 1
        self.pid = self._process.pid

    def release(self) -> dict[str, Any]:
        """Let all processes end, and reap them."""
        told = json.loads(self._process.communicate("go\n")[0])
        return {"began_ns": told["began_ns"], "wall_s": told["wall_s"], "load_cpu_s": told["cpu_s"]}

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # its children die with it (PR_SET_PDEATHSIG)
        self._process.wait()
        time.sleep(0.05)


def decided_ns(record: dict[str, Any], wall_minus_monotonic_ns: int) -> int:
    """Return when a record was written, by the clock of kernel events. Records have microseconds."""
    at = datetime.fromisoformat(str(record["timestamp"]))
    return int(at.timestamp() * 1e6) * 1000 - wall_minus_monotonic_ns


def decisions_ms(listener: Running, rule: str) -> list[float]:
    """Return the time from the kernel's timestamp to the record, for every match of a rule."""
    offset = machine.wall_minus_monotonic_ns()
    return [
        (decided_ns(one, offset) - int(str(one["kernel_time_ns"]))) / 1e6
        for one in competitors.records(listener)
        if one.get("event") == "rule_matched" and one.get("rule") == rule
    ]


def isolated(load: Generator, competitor: Competitor, count: int, pause_us: int) -> dict[str, Any]:
    """Let processes fail one by one with a pause. Measure the time to each record and to its hook."""
    listener = competitor.start()
    try:
        load.start("pace", count, pause_us, "cnpb-b").communicate()
        _evaluated_all(load, listener, 0)
        machine.wait_until_idle(listener.pid, 5.0)
        hooks = [one for one in competitors.records(listener) if one.get("event") == "hook_finished"]
        return {
            "processes": count,
            "decision_ms": machine.quantiles(decisions_ms(listener, "failed")),
            "hook_ms": machine.quantiles(float(str(one["latency_ms"])) for one in hooks),
        }
    finally:
        listener.stop()


def bare_wakeups(load: Generator, count: int, pause_us: int) -> dict[str, Any]:
    """Let processes fail as `isolated` does. Measure the time until the C listener has each event."""
    listener = competitors.C_FAILURES.start()
    load.start("pace", count, pause_us, "cnpb-b").communicate()
    machine.wait_until_idle(listener.pid, 5.0)
    times = json.loads(listener.stop().splitlines()[-1])["times"]
    in_ms = {name: value / 1000 for name, value in times.items() if name != "count"}
    return {"processes": count, "decision_ms": in_ms | {"count": times["count"]}, "hook_ms": {"count": 0}}


def ready(rounds: int) -> dict[str, Any]:
    """Measure from exec to READY, in turn with `import pydantic` by the same Python."""
    seconds: dict[str, list[float]] = {"cnprocd": [], "import pydantic": []}
    competitors.FAILURES.start().stop()  # once before, to make the bytecode that a package contains
    for _ in range(rounds):
        listener = competitors.FAILURES.start()
        seconds["cnprocd"].append(time.monotonic() - listener.began)
        listener.stop()
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import pydantic"], check=True)
        seconds["import pydantic"].append(time.monotonic() - began)
    return {name: machine.spread(values) for name, values in seconds.items()}


def demo(rounds: int) -> dict[str, Any]:
    """Run `make demo`. Measure from the kill until the hook has freed the resources, by the demo's own clock."""
    found = list[float]()
    for _ in range(rounds):
        done = subprocess.run([sys.executable, str(DEMO_PY)], capture_output=True, text=True)
        told = re.search(r"([\d.]+) ms from kill to cleanup", done.stdout)
        if done.returncode or told is None:
            raise RuntimeError(f"the demo failed: {done.stderr[-200:]}")
        found.append(float(told[1]))
    return machine.spread(found)
