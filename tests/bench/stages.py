"""Measure each stage of the hot path by the CPU clock, on the fixed stream of stream.py.

    python tests/bench/stages.py [--processes N] [--profile]

Stages run one after the other over the whole stream, so that each is measured alone. The sum is the cost of one event
between the system call and the match. `--profile` prints the ranking of cProfile for all stages instead.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import stream

from cnprocd.connector.decode import Rejects, rows

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=20_000)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    for title, rules, records in (
        ("all events, exit records", stream.EVERYTHING, True),
        ("all events, no exit records", stream.EVERYTHING, False),
    ):
        print(f"\n{title}")
        stages(options.processes, rules, records, options.profile)


def stages(processes: int, rules: tuple[dict[str, Any], ...], records: bool, profile: bool) -> None:
    batches, events = stream.stream(processes, records)
    found = stream.matcher(*rules)
    if profile:
        tracker = stream.tracker_for(found, records)
        profiler = cProfile.Profile(time.thread_time)
        profiler.runcall(stream.match_all, batches, tracker, found, stream.reader_for(tracker))
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
        return
    gc.collect()
    rejects = Rejects()
    _measured("decode events", events, lambda: [rows(batch.slots, rejects) for batch in batches])
    tracker = stream.tracker_for(found, records)
    reader = stream.reader_for(tracker)
    if records:
        _measured("read exit records", events, lambda: [reader.read(b.messages, b.lengths) for b in batches])
    whole = list(stream.decoded(batches, reader))
    occurrences = _measured(
        "tracker (table, deaths)",
        events,
        lambda: [o for rows, read in whole for o in tracker.take(rows, read.records, None, read.passed)],
    )
    fired = _measured("matcher", events, lambda: [found.match(one) for one in occurrences])
    print(f"  {events} events, {len(occurrences)} occurrences, {sum(map(len, fired))} matches")
    for title, work in (("all in one", False), ("all in one, without the garbage collector", True)):
        tracker = stream.tracker_for(found, records)
        if work:
            gc.disable()
        _measured(title, events, partial(stream.match_all, batches, tracker, found, stream.reader_for(tracker)))
        gc.enable()


def _measured(title: str, events: int, work: Callable[[], T]) -> T:
    began = time.thread_time_ns()
    result = work()
    print(f"  {title:45} {(time.thread_time_ns() - began) / events / 1000:8.3f} microseconds per event")
    return result


main()
