"""Lines for terminals: sampling with counts, texts for times and sizes, and descriptions that match like records."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.cli.event_from_options import FIELDS, Accounts, occurrence_of
from cnprocd.cli.lines import Budget, match_line
from cnprocd.cli.terminal import Style, duration, size
from cnprocd.output import fields
from cnprocd.output.record import match_record
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.load import load

NOBODY = Accounts(lambda name: None, lambda name: None)


def test_what_is_beyond_the_budget_is_counted_and_said():
    now = [100.0]
    budget = Budget(3, lambda: now[0])
    assert [budget.take("exit") for _ in range(5)] == [True, True, True, False, False]
    assert budget.take("fork") is False
    assert budget.report() is None
    now[0] = 101.2
    assert budget.report() == "... sampled: 3 of 6 shown; left out 2 exit, 1 fork"
    assert budget.take("exit") is True
    now[0] = 102.0
    assert budget.report() is None  # nothing was left out


def test_without_a_limit_all_are_shown():
    budget = Budget(None, lambda: 0.0)
    assert all(budget.take("exit") for _ in range(1000))
    assert budget.rest() is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "-"),
        (0.00321, "3.21ms"),
        (1.5, "1.5s"),
        (59, "59s"),
        (252, "4m12s"),
        (11_040, "3h04m"),
        (183_600, "2d03h"),
    ],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_sizes():
    assert [size(832), size(8 << 20), size(1 << 40)] == ["832 B", "8.0 MiB", "1024.0 GiB"]


comms = st.text(min_size=1, max_size=8).map(lambda t: t.encode("utf-8", "replace").decode("utf-8", "surrogateescape"))
raw_comms = st.binary(min_size=1, max_size=15).filter(lambda b: b"\0" not in b)


@given(raw_comms, st.integers(0, 255), st.integers(0, 2**32 - 2))
def test_a_record_described_again_is_the_same_event(tmp_path_factory, comm, code, uid):
    matcher = matcher_of(tmp_path_factory)
    text = comm.decode("utf-8", "surrogateescape")
    first = occurrence_of({"comm": text, "exit_code": code, "uid": uid, "pid": 7, "kernel_time_ns": 5}, NOBODY)
    (match,) = matcher.match(first)
    record = match_record(match)
    again = occurrence_of({name: value for name, value in record.items() if name != "status"}, NOBODY)
    (second,) = matcher.match(again)
    assert match_record(second) == record
    assert set(record) <= {*FIELDS, "comm_hex"}


_MATCHER = []


def matcher_of(factory):
    if not _MATCHER:
        file = factory.mktemp("rules") / "rules.yaml"
        file.write_text("rules: [{name: all, events: [exit]}]")
        _MATCHER.append(Matcher(load(file).rules))
    return _MATCHER[0]


@given(raw_comms)
def test_a_hostile_name_stays_on_its_line(tmp_path_factory, comm):
    occurrence = occurrence_of({"comm": comm.decode("utf-8", "surrogateescape"), "exit_code": 1}, NOBODY)
    (match,) = matcher_of(tmp_path_factory).match(occurrence)
    line = match_line(match_record(match), Style(), "12:00:00")
    assert line.isprintable()


def test_a_match_that_a_throttle_held_back_says_so():
    record = {"kind": "exit", "comm": "x", "pid": 7, "rule": "r"}
    assert "held" not in match_line(record, Style(), "12:00:00")
    assert match_line(record | {"held_by": "cooldown"}, Style(), "12:00:00").endswith("held back by cooldown")


def test_every_field_of_a_match_is_accepted_as_an_event():
    """A line of the log, of `watch --json` or of `history --json` can be given to `test --event`."""
    assert {*fields.MATCH, *fields.ALWAYS, "time_ns", "job_state", "job_reason"} <= set(FIELDS)
