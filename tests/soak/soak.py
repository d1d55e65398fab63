"""`make soak`: hours of storms with a reload every second and watch clients; nothing is lost, doubled, or growing.

    python tests/soak/soak.py [--seconds 3600] [--block [--seed N]] [--nice N]

Strategy: two generators fork as fast as this machine can, in rounds that mix fork+exit, fork+exec+exit, crowds that end
at once, processes with threads, and deaths by signal. waitpid() in the generators counts the failures under the name
that a rule matches. The daemon's records are read as they come and identified by PID and kernel time, so that both
missing and extra matches are found. Rules change every second between a set that costs nothing for a success and a set
that needs every event and a table. A hook runs for about every tenth failure.

Printed every minute, and kept: memory, descriptors, table, losses, matches so far. The verdict uses the second half of
the run, because the first half fills what has a bound, such as the history of 10,000 jobs. Growth of memory is the
slope of a line through the samples. Growth of descriptors is a higher peak than in the third before. Exit status 0 if
nothing was lost or doubled and neither grew.

With --block, one edge after the other is blocked for ten seconds, at random (blocks.py); then each death must also be
reported within a second, and each status answered. --seed repeats an order, which is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/bench")]

import blocks  # noqa: E402
import competitors  # noqa: E402  (the bench's C generator and its figures of a process)
import machine  # noqa: E402

from cnprocd.control.client import Client  # noqa: E402
from cnprocd.errors import CnprocdError  # noqa: E402

FAILED = "  - {name: failed, events: [nonzero_exit], match: {comm: cnps-fail}}\n"
HOOKED = (
    "  - {name: hooked, events: [nonzero_exit], match: {comm: cnps-hook}, run: {command: [/bin/true], timeout: 30s}}\n"
)
# The second set needs every event and the table.
PARENT = "  - {name: child-of-nobody, events: [fork, exec], match: {parent: {comm: cnps-nobody}}}\n"
RULE_SETS = [f"rules:\n{FAILED}{HOOKED}{blocks.MARK}", f"rules:\n{FAILED}{HOOKED}{blocks.MARK}{PARENT}"]
SAMPLE_S = 5.0
MOST_WARNINGS = 200
GROWTH_KIB_PER_HOUR = 2048  # below this, the slope is noise of the sampling times
PYTHON_ROUND = """
import ctypes, os, signal, sys, threading
def name(): ctypes.CDLL(None).prctl(15, b"cnps-fail", 0, 0, 0)
failed = 0
for how in ("kill", "threads", "leader", "raise") * 5:
    pid = os.fork()
    if pid == 0:
        name()
        if how == "kill": os.kill(os.getpid(), 9)
        if how == "raise": os.kill(os.getpid(), 15)
        for _ in range(4): threading.Thread(target=threading.Event().wait, daemon=True).start()
        os._exit(3)
    failed += os.waitpid(pid, 0)[1] != 0
print(failed)
"""


@dataclass
class Truth:
    """The results of waitpid() in the generators."""

    processes: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, processes: int, failed: int) -> None:
        with self.lock:
            self.processes += processes
            self.failed[name] += failed


def generate(truth: Truth, program: list[str], stop: threading.Event, seed: int) -> None:
    """Run one generator: rounds of different kinds, one after the other."""
    rounds = [
        ("fork", "20000", "1000", "cnps-fail"), ("exec", "2000", "0", "cnps-good"),
        ("fork", "20000", "2000", "cnps-other"),
        ("fork", "1000", "100", "cnps-hook"), ("burst", "400", "40", "cnps-fail"), ("python",),
    ]  # fmt: skip
    turn = seed
    while not stop.is_set():
        mode, *arguments = rounds[turn % len(rounds)]
        turn += 1
        if mode == "python":
            done = subprocess.run([sys.executable, "-ISc", PYTHON_ROUND], capture_output=True, text=True, check=True)
            truth.add("cnps-fail", 20, int(done.stdout))
            continue
        done = subprocess.run([*program, mode, *arguments], input="go\n", capture_output=True, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        truth.add(arguments[2], told["processes"], told["failed"])


def watch(runtime: Path, stop: threading.Event, seen: Counter[str]) -> None:
    """Run a watch client that connects for a moment, disconnects and connects again."""
    while not stop.is_set():
        with contextlib.suppress(CnprocdError, OSError), Client(runtime) as client:
            until = time.monotonic() + 2.0
            for _ in client.stream("watch", "match"):
                seen["items"] += 1
                if time.monotonic() > until or stop.is_set():
                    break
        seen["clients"] += 1


def replace(rules: Path, text: str) -> None:
    """Write a rule file as an editor does: the daemon never reads a part of it."""
    new = rules.with_suffix(".new")
    new.write_text(text)
    new.replace(rules)


class Records:
    """The daemon's records, as they come."""

    def __init__(
        self, process: subprocess.Popen[str], reading: blocks.Reading | None, promises: blocks.Promises
    ) -> None:
        self.warnings: list[str] = []  # of the daemon
        self.lost = 0  # matches that the log dropped and counted
        self._reading = reading
        self._promises = promises
        self.classes: Counter[str] = Counter()
        self.matched: Counter[tuple[str, object, object]] = Counter()  # rule, PID, kernel's time
        self.recovered = 0
        self.ready = threading.Event()
        self._process = process
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if self._reading is not None:
                self._reading.wait()
            record = json.loads(line)
            self.classes[record["event"]] += 1
            if record["level"] in ("warning", "error", "critical") and len(self.warnings) < MOST_WARNINGS:
                self.warnings.append(f"{record['timestamp']} {record['event']}: {record.get('message', '')}"[:200])
                print(self.warnings[-1], flush=True)
            if record["event"] == "started":
                self.ready.set()
            elif record["event"] == "log_lost":
                self.lost += record["matches"]
            elif record["event"] == "rule_matched" and record["rule"] == "mark":
                self._promises.note(record)
            elif record["event"] == "rule_matched":
                self.matched[record["rule"], record["pid"], record["kernel_time_ns"]] += 1
                self.recovered += bool(record["recovered"])

    def of(self, rule: str) -> int:
        return sum(count for (name, _, _), count in list(self.matched.items()) if name == rule)

    def doubled(self) -> int:
        return sum(count - 1 for count in self.matched.values())

    def join(self) -> None:
        self._thread.join()


def sample(pid: int, began: float, status: dict[str, object]) -> dict[str, float]:
    resident, peak = machine.memory_kib(pid)
    return {
        "at_s": round(time.monotonic() - began, 1),
        "rss_kib": resident,
        "peak_kib": peak,
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "dropped": machine.dropped(pid),
        "cpu_s": machine.cpu_ns(pid) / 1e9,
        "table": float(str(status["table_size"])),
    }


def slope_per_hour(samples: list[dict[str, float]], what: str) -> float:
    """Return the slope of the line through the second half of the samples."""
    late = samples[len(samples) // 2 :]
    if len(late) < 3:
        return 0.0
    return statistics.linear_regression([one["at_s"] for one in late], [one[what] for one in late]).slope * 3600


def thirds(samples: list[dict[str, float]]) -> list[list[dict[str, float]]]:
    """Return the peaks of the thirds of the run: descriptors go up and down by dozens (pidfds, clients)."""
    third = max(1, len(samples) // 3)
    return [samples[:third], samples[third : 2 * third] or samples, samples[2 * third :] or samples]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument(
        "--block", action="store_true", help="block one edge after the other for ten seconds, at random"
    )
    parser.add_argument("--edges", help="block only the edges whose name contains this word")
    parser.add_argument("--seed", type=int, help="of the order of blocks (default: a random one, printed)")
    parser.add_argument("--nice", type=int, default=0, help="of the generators: on a machine that does other work too")
    parser.add_argument("--keep", type=Path, help="write the samples and the verdict here, as JSON")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("make soak needs root, like every listener")
        return 77
    program = competitors.load_program()
    if program is None:
        print("make soak needs a C compiler (cc) for its generators")
        return 69
    program = ["nice", "-n", str(options.nice), *program]
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="cnprocd-soak-") as directory, contextlib.ExitStack() as stack:
        os.chmod(directory, 0o755)
        Path(directory, "rules.yaml").write_text(RULE_SETS[0])
        edges = blocks.Edges(stack, Path(directory)) if options.block else None
        if edges is not None:
            edges.keep_only(options.edges or "")
            print(f"seed {seed}", *edges.missing, flush=True)
        verdict = soak(Path(directory), program, options.seconds, edges, seed)
    print(json.dumps(verdict, indent=1))
    if options.keep is not None:
        options.keep.write_text(json.dumps(verdict, indent=1) + "\n")
    return 0 if verdict["ok"] else 1


def soak(
    directory: Path, program: list[str], seconds: float, edges: blocks.Edges | None, seed: int
) -> dict[str, object]:
    """Run everything. Return the figures and whether they are as required."""
    rules, runtime = directory / "rules.yaml", directory / "run"
    command = [
        *(edges.under if edges is not None else ()),
        sys.executable, "-m", "cnprocd.cli.cnprocd", "--log-format", "json", "--rules", str(rules),
        "--state-dir", str(directory / "state"), "--runtime-dir", str(runtime),
        *(edges.options if edges is not None else ()),
    ]  # fmt: skip
    # A service is a scheduling group of its own. With autogroup, nice only counts within a session (sched(7)).
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=edges.env if edges is not None else None,
        start_new_session=True,
    )
    with contextlib.suppress(FileNotFoundError):
        Path(f"/proc/{process.pid}/autogroup").write_text("-10")
    promises = blocks.Promises(runtime)
    records = Records(process, edges.reading if edges is not None else None, promises)
    truth, watched, stop = Truth(), Counter[str](), threading.Event()
    if not records.ready.wait(30):
        raise SystemExit("cnprocd did not start")
    threads = [threading.Thread(target=generate, args=(truth, program, stop, n * 3)) for n in range(2)]
    # Daemon threads: the end does not wait for a thread that waits for the next match.
    watchers = [threading.Thread(target=watch, args=(runtime, stop, watched), daemon=True) for _ in range(2)]
    if edges is not None:
        blocking = threading.Thread(target=edges.block_at_random, args=(seed, stop, promises.block))
        sampling = threading.Thread(target=promises.sample, args=(process.pid, stop))
        threads += [
            blocking,
            sampling,
            *(threading.Thread(target=one, args=(stop,)) for one in (promises.fail, promises.ask)),
        ]
    for thread in (*threads, *watchers):
        thread.start()
    began, samples, reloads = time.monotonic(), list[dict[str, float]](), 0
    while time.monotonic() - began < seconds and process.poll() is None:
        time.sleep(1.0)  # the interval of the reloads
        reloads += 1
        replace(rules, RULE_SETS[reloads % 2])
        process.send_signal(signal.SIGHUP)
        if not samples or time.monotonic() - began - samples[-1]["at_s"] >= SAMPLE_S:
            samples.append(sample(process.pid, began, status_of(runtime)))
            if len(samples) % round(60 / SAMPLE_S) == 1:
                print(
                    json.dumps(samples[-1] | {"processes": truth.processes, "matches": len(records.matched)}),
                    flush=True,
                )
    stop.set()
    for thread in threads:
        thread.join()
    verdict = finish(process, runtime, records, truth, watched, samples, reloads, time.monotonic() - began)
    if edges is not None:
        figures = promises.figures()
        verdict |= {"seed": seed, "not_blocked": edges.missing, "promises": figures}
        verdict["ok"] = verdict["ok"] and figures["kept"]
    return verdict


def finish(
    process: subprocess.Popen[str],
    runtime: Path,
    records: Records,
    truth: Truth,
    watched: Counter[str],
    samples: list[dict[str, float]],
    reloads: int,
    took_s: float,
) -> dict[str, object]:
    """Wait until all events are evaluated and all hooks have ended; then count."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        status = status_of(runtime)
        told = records.of("failed") + records.of("hooked") + records.lost
        settled = told >= truth.failed.total() - truth.failed["cnps-other"] and not status["waiting"]
        if settled and not status["running"] and records.classes["hook_finished"] >= truth.failed["cnps-hook"]:
            break
        time.sleep(0.2)
    dropped = machine.dropped(process.pid)
    process.terminate()
    code = process.wait(60)
    records.join()
    found: dict[str, Any] = {
        "command": " ".join(["python tests/soak/soak.py", *sys.argv[1:]]),
        "seconds": round(took_s),
        "processes": truth.processes,
        "processes_per_s": round(truth.processes / took_s),
        "expected": {"failed": truth.failed["cnps-fail"], "hooked": truth.failed["cnps-hook"]},
        "matched": {"failed": records.of("failed"), "hooked": records.of("hooked")},
        "hooks_finished": records.classes["hook_finished"],
        "dropped_by_the_log": records.lost,
        "doubled": records.doubled(),
        "recovered": records.recovered,
        "dropped_by_the_kernel": dropped,
        "reloads": reloads,
        "reloads_told": records.classes["rules_loaded"],
        "watch_clients": watched["clients"],
        "watch_items": watched["items"],
        "rss_kib_first_last_peak": [samples[0]["rss_kib"], samples[-1]["rss_kib"], samples[-1]["peak_kib"]],
        "rss_kib_per_hour": round(slope_per_hour(samples, "rss_kib")),
        "fds_first_last": [samples[0]["fds"], samples[-1]["fds"]],
        "fds_most_by_thirds": [round(max(one["fds"] for one in third)) for third in thirds(samples)],
        "cpu_s": round(samples[-1]["cpu_s"], 1),
        "exit_status": code,
        "records": dict(records.classes),
        "warnings": records.warnings,
        "samples": samples[:: max(1, len(samples) // 60)],
    }
    found["ok"] = (
        found["expected"] == found["matched"]
        and found["hooks_finished"] == truth.failed["cnps-hook"]
        and not found["doubled"]
        and code == 0
        and slope_per_hour(samples, "rss_kib") < GROWTH_KIB_PER_HOUR * max(1.0, 3600 / took_s)
        and found["fds_most_by_thirds"][2] <= 1.25 * found["fds_most_by_thirds"][1]
    )
    return found


def status_of(runtime: Path) -> dict[str, object]:
    """Return the figures of `status` that the soak test uses."""
    with Client(runtime, 60) as client:
        told = client.ask("status")
    assert isinstance(told, dict)
    jobs, table = told["jobs"], told["table"]
    assert isinstance(jobs, dict)
    assert isinstance(table, dict)
    return {"waiting": jobs["waiting"], "running": jobs["running"], "table_size": table["processes"]}


if __name__ == "__main__":
    sys.exit(main())
