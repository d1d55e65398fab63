"""The stall meter with a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.stall_meter import LOOP, REPORT_S, StallMeter


def test_figures_of_a_new_meter_are_zero():
    figures = StallMeter().figures(5.0)
    assert (figures.worst_s, figures.p99_s, figures.worst_last_minute_s, figures.p99_last_minute_s) == (0, 0, 0, 0)
    assert figures.worst_cause is None


@given(st.lists(st.floats(1e-5, 70.0), min_size=1, max_size=300))
def test_p99_is_at_most_a_bucket_above_the_true_one(values):
    meter = StallMeter()
    for value in values:
        meter.note(1000.0, value)
    figures = meter.figures(1000.0)
    true = sorted(values)[max(0, -(-99 * len(values) // 100) - 1)]
    assert figures.worst_s == max(values) == figures.worst_last_minute_s
    assert true <= figures.p99_s <= true * 1.26
    assert figures.p99_last_minute_s == figures.p99_s


def test_the_last_minute_forgets_and_since_start_does_not():
    meter = StallMeter()
    meter.note(1000.0, 3.0)
    meter.note(1030.0, 0.5)
    assert meter.figures(1040.0).worst_last_minute_s == 3.0
    assert meter.figures(1070.0).worst_last_minute_s == 0.5
    assert meter.figures(1200.0).worst_last_minute_s == 0.0
    assert meter.figures(1200.0).worst_s == 3.0


def test_memory_is_bounded_however_long_it_runs():
    meter = StallMeter()
    for second in range(1000, 5000):
        meter.note(float(second), 0.001)
    assert len(meter._slices) <= 12


@pytest.mark.parametrize(
    ("shares", "seconds", "cause"),
    [
        ([], 0.2, LOOP),
        ([("proc", 0.15)], 0.2, "proc"),
        ([("proc", 0.01)], 0.2, LOOP),
        ([("proc", 0.04), ("names", 0.05), ("proc", 0.04)], 0.15, "proc"),
    ],
)
def test_a_long_stall_is_reported_with_its_cause(shares, seconds, cause):
    meter = StallMeter()
    for edge, share in shares:
        meter.blame(edge, share)
    assert meter.note(1000.0, seconds) == (seconds, cause)
    assert meter.figures(1000.0).worst_cause == cause
    assert meter.note(1000.0, seconds) == (seconds, LOOP)  # the shares are those of one stall


def test_a_short_stall_is_counted_and_not_reported():
    meter = StallMeter()
    assert meter.note(1000.0, REPORT_S * 0.99) is None
    assert meter.figures(1000.0).worst_s == REPORT_S * 0.99


def test_a_stall_beyond_all_buckets_is_exact():
    meter = StallMeter()
    meter.note(1000.0, 500.0)
    assert meter.figures(1000.0).p99_s == 500.0
