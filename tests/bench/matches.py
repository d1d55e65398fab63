"""Measure what a match costs from its decoded event to its record in a pipe, by the CPU clock.

    python tests/bench/matches.py [--matches N] [--batch N] [--flood] [--profile] [--cgroup PATH] [--message TEXT]

Processes fail, and a rule without a hook matches each of them. Tracker, matcher, spool and log are real. Events are
generated and /proc is in memory, so neither reception nor reads of files are measured. `--flood`: the events have
waited for a second, so most matches are reported when no events wait.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import stream

from cnprocd.connector.ahead import nothing_ahead
from cnprocd.connector.decode import Rejects, rows
from cnprocd.connector.event import Row
from cnprocd.connector.source import Batch, Losses
from cnprocd.connector.taskrecord import ReadRecords
from cnprocd.dispatch import Dispatcher
from cnprocd.output.log import LogOutput, make_log, make_output
from cnprocd.output.match_id import Machine
from cnprocd.pipeline import Pipeline
from cnprocd.process.model import Process, Wanted
from cnprocd.recovery import Recovery
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.load import load

_RULE = "rules: [{{name: failed, events: [nonzero_exit], match: {{comm: worker-b}}{}}}]"
_MACHINE = Machine("db1.example.com", "5" * 32, "b" * 32)
_PARENT = Process(501, 1, 0, "worker-b", "procfs")


class Zombies(stream.NoProc):
    """A /proc in which every process has ended and none is reaped."""

    def __init__(self, cgroup: str | None) -> None:
        self._cgroup = cgroup

    def read_parent(self, tgid: int) -> Process | None:
        return replace(_PARENT, tgid=tgid)

    def zombie(self, tgid: int, ended_ns: int, wanted: Wanted) -> Process | None:
        return Process(tgid, cgroup=self._cgroup)

    def user_name(self, uid: int) -> str | None:
        return "root"

    def scan_in_groups(self, wanted: Wanted) -> Iterator[list[Process]]:
        return iter(())


class NoHooks:
    """A HookRegistry for rules that run nothing."""

    def follow(self) -> None: ...

    def register_hook(self, hook_pid: int) -> None: ...

    def register_runner(self, runner_pid: int) -> None: ...


class Failures:
    """A source of processes that fail."""

    def __init__(self, count: int, batch: int, late_ns: int) -> None:
        self.left, self._batch, self._late_ns = count, batch, late_ns
        self.tracker: Any = None
        self._number = 0
        self.batches: list[Batch] = []

    def make(self, reader: Any) -> None:
        """Make the events of the next batch, if there is one."""
        count = min(self.left, self._batch)
        self.left -= count
        told, messages = list[bytes](), list[bytes]()
        for _ in range(count):
            event, record = self._failure()
            told.append(stream.slot(event, 0))
            messages.append(record)
        slots = stream.batch(told, messages)
        events = list[Row](rows(slots.slots, Rejects()))
        records = reader.read(slots.messages, slots.lengths) if messages else ReadRecords()
        self.batches.append(Batch(events, records, more=bool(self.left), overrun=False))

    def _failure(self) -> tuple[bytes, bytes]:
        self._number += 1
        at_ns, pid = time.monotonic_ns() - self._late_ns, 10_000 + self._number % 20_000
        return stream.failure(pid, at_ns)

    def drain(self, most: int, all_records: bool) -> Batch:
        return self.batches.pop() if self.batches else Batch([], ReadRecords(), more=False, overrun=False)


def pipeline_of(
    failures: Failures, directory: Path, text: str, cgroup: str | None, stdout: int
) -> tuple[Pipeline, LogOutput]:
    (directory / "rules.yaml").write_text(text)
    loaded = load(directory / "rules.yaml")
    output = make_output("json", stdout, False)
    log = make_log(output)
    matcher = Matcher(loaded.rules)
    tracker = stream.tracker_for(matcher)
    procfs: Any = Zombies(cgroup)
    dispatcher = Dispatcher(directory, loaded, log, NoHooks(), together=output.together, log_match=output.write_match)
    source: Any = SimpleNamespace(
        drain=failures.drain, look_ahead=nothing_ahead, looked_ahead=False, shed=lambda sheds: None,
        losses=Losses(), count_losses=lambda: None,
        rejects=SimpleNamespace(total=lambda: 0), blank_slots=lambda tids: None,
    )  # fmt: skip
    recovery = Recovery(source, tracker, procfs, None, log)
    pipeline = Pipeline(
        source, tracker, matcher, dispatcher, recovery, procfs, log, _MACHINE, log_queued=lambda: output.queued
    )
    return pipeline, output


def measure(options: argparse.Namespace, profiler: cProfile.Profile | None) -> None:
    source, sink = os.pipe()
    reader = os.fork()
    if reader == 0:
        os.close(sink)
        while os.read(source, 1 << 16):
            pass
        os._exit(0)
    os.close(source)
    failures = Failures(options.matches, options.batch, 10**9 if options.flood else 0)
    with tempfile.TemporaryDirectory() as directory:
        rule = _RULE.format(f", log: {{message: '{options.message}'}}" if options.message else "")
        pipeline, output = pipeline_of(failures, Path(directory), rule, options.cgroup, sink)
        records = stream.reader_for(pipeline.tracker)
        spent_ns: list[float] = []  # a match, of each batch
        while failures.left or pipeline.deferred:
            if failures.left:
                failures.make(records)
            began_ns = time.thread_time_ns()
            if profiler is not None:
                profiler.enable()
            pipeline.turn()
            if profiler is not None:
                profiler.disable()
            spent_ns.append((time.thread_time_ns() - began_ns) / options.batch)
            while output.queued:  # there is no event loop
                output.outputs[0][1].flush()
        began_ns = time.thread_time_ns()
        pipeline._delivery.tick()  # type: ignore[attr-defined]
        tick_ns = time.thread_time_ns() - began_ns
        pipeline.flush_log()
        os.close(sink)
        quarters = [one / 1000 for one in statistics.quantiles(spent_ns)]
        each = ", ".join(f"{one:.1f}" for one in quarters)
        print(f"  {each} us a match (quartiles); the tick {tick_ns / 1e6:.1f} ms")
    os.kill(reader, signal.SIGTERM)
    os.waitpid(reader, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matches", type=int, default=8_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--flood", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cgroup", default="/system.slice/postgresql.service")
    parser.add_argument("--message")
    options = parser.parse_args()
    profiler = cProfile.Profile(time.thread_time) if options.profile else None
    measure(options, profiler)
    if profiler is not None:
        pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(50)


main()
