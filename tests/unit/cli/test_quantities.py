"""Durations, sizes and moments of the command line, in the forms of systemd.time(7)."""

import argparse
import contextlib
import os
import time
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.cli.quantities import Moment, limit, moment_at, octets, seconds, window_ns


@pytest.fixture(autouse=True)
def berlin(monkeypatch):
    """A zone with daylight saving time, whatever this machine has."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


NOW = datetime(2026, 11, 26, 8, 30, 15)


def at(text: str, now: datetime = NOW) -> datetime:
    return datetime.fromtimestamp(moment_at(text, now).at_s)


MOMENTS = {
    "now": NOW,
    "today": datetime(2026, 11, 26),
    "yesterday": datetime(2026, 11, 25),
    "tomorrow": datetime(2026, 11, 27),
    "yesterday 22:00": datetime(2026, 11, 25, 22),
    "Today 07:15:30": datetime(2026, 11, 26, 7, 15, 30),
    "22:00": datetime(2026, 11, 26, 22),
    "7:05": datetime(2026, 11, 26, 7, 5),
    "2026-11-01": datetime(2026, 11, 1),
    "2026-11-01 22:00": datetime(2026, 11, 1, 22),
    "2026-11-01 22:00:15": datetime(2026, 11, 1, 22, 0, 15),
    "2026-11-01T22:00:15.25": datetime(2026, 11, 1, 22, 0, 15, 250_000),
    "Sun 2026-11-01 22:00": datetime(2026, 11, 1, 22),
    "2026-11-01T21:00:15Z": datetime(2026, 11, 1, 22, 0, 15),
    "2026-11-01 21:00 UTC": datetime(2026, 11, 1, 22),
    "2026-11-01 22:00:15+01:00": datetime(2026, 11, 1, 22, 0, 15),
    "2026-11-01 16:00 -0500": datetime(2026, 11, 1, 22),
    "2h ago": NOW - timedelta(hours=2),
    "-2h": NOW - timedelta(hours=2),
    "2h": NOW - timedelta(hours=2),
    "+5min": NOW + timedelta(minutes=5),
    "1h 30min ago": NOW - timedelta(minutes=90),
    "-1week2days": NOW - timedelta(days=9),
    "90": NOW - timedelta(seconds=90),
    "@1790000000": datetime(2026, 9, 21, 16, 13, 20),
}


@pytest.mark.parametrize(("text", "expected"), MOMENTS.items(), ids=MOMENTS)
def test_moments_of_systemd_time_are_read(text, expected):
    assert at(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "9999-12-31",
        "99999999999d",
        "-99999999999d",
        "",
        "soon",
        "25:00",
        "22:60",
        "2026-13-01",
        "2026-02-30",
        "ago",
        "-",
        "2x",
        "2h today",
        "@",
        "9" * 40,
    ],
)
def test_other_moments_are_refused_with_the_forms(text):
    with pytest.raises(argparse.ArgumentTypeError, match="invalid time"):
        moment_at(text, NOW)


@given(st.text(max_size=30))
def test_any_text_is_a_moment_or_a_usage_error(text):
    with contextlib.suppress(argparse.ArgumentTypeError):
        found = moment_at(text, NOW)
        assert isinstance(found, Moment)
        assert abs(found.at_s) * 1e9 < 2**63, "the control protocol has 64 bits for it"


def test_midnight_after_a_change_of_the_clock_is_local():
    """On 2026-10-25 the day in Berlin has 25 hours."""
    monday = datetime(2026, 10, 26, 12)
    assert moment_at("today", monday).at_s - moment_at("yesterday", monday).at_s == 25 * 3600


def window(since, until, now=NOW):
    found = window_ns(since and moment_at(since, now), until and moment_at(until, now), now.timestamp())
    return [end and datetime.fromtimestamp(end / 1e9) for end in found]


def test_a_time_of_day_is_the_last_one_for_since():
    assert window("22:00", None) == [datetime(2026, 11, 25, 22), None]
    assert window("08:00", None) == [datetime(2026, 11, 26, 8), None]
    assert window("22:00", "06:00") == [datetime(2026, 11, 25, 22), datetime(2026, 11, 26, 6)]
    assert window("20:00", "22:00") == [datetime(2026, 11, 25, 20), datetime(2026, 11, 25, 22)]
    assert window("00:00", "23:59") == [datetime(2026, 11, 26), datetime(2026, 11, 26, 23, 59)]
    assert window("yesterday", "22:00") == [datetime(2026, 11, 25), datetime(2026, 11, 26, 22)]


def test_an_open_window_has_no_end():
    assert window_ns(None, None, 0.0) == (0, None)


DURATIONS = {"30s": 30, "250ms": 0.25, "5m": 300, "2h": 7200, "1d": 86400, "1h30m": 5400, "1h 30min": 5400, "2": 2}


@pytest.mark.parametrize(("text", "expected"), DURATIONS.items(), ids=DURATIONS)
def test_durations_are_read(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("parse", "text"), [(seconds, "5 parsecs"), (seconds, ""), (octets, "5X"), (limit, "0"), (limit, "1001")]
)
def test_a_wrong_quantity_is_refused(parse, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f'"{text}"'):
        parse(text)


def test_sizes_are_read():
    assert [octets("512K"), octets("16m"), octets("1G"), octets("7")] == [512 << 10, 16 << 20, 1 << 30, 7]


def test_the_zone_of_this_test_is_not_utc():
    assert os.environ["TZ"] == "Europe/Berlin"
    assert time.timezone == -3600
