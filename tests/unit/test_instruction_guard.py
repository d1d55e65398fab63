"""The cost of decoding and matching one event, counted and not timed: bytecode instructions and C calls, within 5%.

A fixed generated stream (tests/bench/stream.py) goes through the decoders, the tracker and the matcher while the
interpreter counts. The counts are the same on every machine and under any load. They differ between minor versions of
Python, so a figure is stored for each. A version without a figure is skipped with the reason. A lower count fails as
well: the stored figure is then too high to guard anything. To print the figure of a Python:

    .venv/bin/python tests/unit/test_instruction_guard.py
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import stream

PROCESSES = 400
WITHIN = 0.05

# (bytecode instructions, calls into C) per 1,000 events.
STORED: dict[tuple[int, int], dict[str, tuple[int, int]]] = {
    (3, 11): {
        "all": (199291, 3029),
        "all, no exit records": (297054, 5230),
        "failures": (185447, 3007),
    },
    (3, 12): {
        "all": (194807, 3029),
        "all, no exit records": (282241, 5230),
        "failures": (182891, 3007),
    },
    (3, 13): {
        "all": (192335, 3029),
        "all, no exit records": (275651, 5230),
        "failures": (186976, 3007),
    },
}

CASES = {
    "all": (stream.EVERYTHING, True),
    "all, no exit records": (stream.EVERYTHING, False),
    "failures": (stream.FAILURES, True),
}


def count(case: str) -> tuple[int, int]:
    """Return instructions and C calls per 1,000 events."""
    rules, records = CASES[case]
    batches, events = stream.stream(PROCESSES, records)
    found = stream.matcher(*rules)
    tracker = stream.tracker_for(found, records)
    reader = stream.reader_for(tracker)
    stream.match_all(batches, tracker, found, reader)  # what is remembered is remembered by now
    counts: Counter[str] = Counter()

    def instruction(frame, event, arg):
        if event == "opcode":
            counts["instructions"] += 1
        return instruction

    def enter(frame, event, arg):
        if frame.f_code.co_filename in (stream.__file__, __file__):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return instruction

    def called(frame, event, arg):
        if event == "c_call" and frame.f_code.co_filename not in (stream.__file__, __file__):
            counts["calls"] += 1

    # The first trace is for nothing: Python 3.12 tells of opcodes only once a trace before has asked for them.
    for install, hook in ((sys.settrace, enter), (sys.settrace, enter), (sys.setprofile, called)):
        tracker = stream.tracker_for(found, records)
        former = sys.gettrace() if install is sys.settrace else sys.getprofile()
        gc.disable()  # finalizers and callbacks of others are none of ours
        counts["instructions" if install is sys.settrace else "calls"] = 0
        install(hook)
        try:
            stream.match_all(batches, tracker, found, reader)
        finally:
            install(former)
            gc.enable()
    return counts["instructions"] * 1000 // events, counts["calls"] * 1000 // events


@pytest.mark.parametrize("case", CASES)
def test_an_event_costs_what_it_cost(case):
    stored = STORED.get(sys.version_info[:2])
    if stored is None:
        pytest.skip(f"no figure is stored for Python {sys.version_info[0]}.{sys.version_info[1]}; see {__file__}")
    for what, now, then in zip(("bytecode instructions", "calls into C"), count(case), stored[case], strict=True):
        print(f"{case}: {now} {what} per 1,000 events, stored are {then}")
        assert now <= then * (1 + WITHIN), f"an event costs {now / then - 1:.1%} more {what}: find out why, or store it"
        assert now >= then * (1 - WITHIN), f"an event costs {1 - now / then:.1%} fewer {what}: good, now store {now}"


def test_counting_is_repeatable():
    assert count("failures") == count("failures")


if __name__ == "__main__":
    print(f"    {sys.version_info[:2]}: {{")
    for name in CASES:
        print(f"        {name!r}: {count(name)},")
    print("    },")
