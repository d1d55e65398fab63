"""When the sockets are not read, as a table of wake-ups: (events in it, seconds of quiet before it) -> window."""

import pytest

from cnprocd.connector.gathering import (
    LOAD_EVENTS,
    LOAD_GATHERED,
    LOAD_WAKEUPS,
    PATIENCE,
    PATIENCE_OF_LOGS,
    Gathering,
    patience,
)

W = 0.002
FAR, NEAR = 1.0, W / 2


def windows(*wakeups, gather_s=W, times=1):
    one = Gathering()
    return [one.window_s(most, quiet_s, gather_s, times) for most, quiet_s in wakeups]


def test_an_isolated_event_is_never_waited_for():
    assert windows(*[(2, FAR)] * 100) == [0.0] * 100


def test_a_large_batch_opens_a_window_at_once():
    assert windows((LOAD_EVENTS - 1, FAR), (LOAD_EVENTS, FAR)) == [0.0, W]


def test_wake_ups_without_a_pause_open_one():
    assert windows(*[(2, NEAR)] * LOAD_WAKEUPS) == [0.0] * (LOAD_WAKEUPS - 1) + [W]
    paused = [(2, NEAR)] * (LOAD_WAKEUPS - 1) + [(2, FAR)] + [(2, NEAR)] * (LOAD_WAKEUPS - 1)
    assert not any(windows(*paused))


def test_a_window_stays_open_under_load_and_reopens_at_once():
    storm = [(LOAD_EVENTS, FAR), (LOAD_GATHERED, W), (LOAD_GATHERED - 1, W), (2, FAR)]
    assert windows(*storm) == [W, W, 0.0, 0.0]


@pytest.mark.parametrize(
    ("looked_up", "looks_up", "is_awaited", "times"),
    [
        (True, True, False, 1),
        (False, True, False, PATIENCE),
        (False, True, True, PATIENCE),
        (False, False, True, PATIENCE),
        (False, False, False, PATIENCE_OF_LOGS),
    ],
)
def test_it_is_longer_where_nothing_is_looked_up(looked_up, looks_up, is_awaited, times):
    assert patience(looked_up, looks_up, is_awaited) == times
    assert windows((LOAD_EVENTS, FAR), times=times) == [W * times]
    # Events without a pause use the same window.
    assert windows(*[(2, W * times * 0.9)] * LOAD_WAKEUPS, times=times)[-1] == W * times


@pytest.mark.parametrize("times", [1, PATIENCE, PATIENCE_OF_LOGS])
def test_zero_never_waits(times):
    assert not any(windows(*[(10_000, 0.0)] * 50, gather_s=0.0, times=times))
