"""The log: records in the order of the contract, a threshold that can be changed, and lost records counted."""

import json
import os

import pytest

from cnprocd.log import LEVELS
from cnprocd.output.log import LogOutput, make_log, make_output


@pytest.fixture
def pipe():
    """Both ends of a pipe."""
    reader, writer = os.pipe()
    yield reader, writer
    os.close(writer)


class Kept:
    """A queue that keeps what is added."""

    def __init__(self):
        self.records = []

    def add(self, record, rule):
        self.records.append((record, rule))


def unencoded(record):
    return record


def kept_log(threshold="info"):
    output, kept = LogOutput(), Kept()
    output.outputs.append((unencoded, kept))
    return make_log(output, threshold), output, kept.records


def test_a_record_has_time_level_and_event_first(pipe):
    make_log(make_output("json", pipe[1], False))("notice", "started", pid=7, message="up")
    record = json.loads(os.read(pipe[0], 1 << 16))
    assert list(record) == ["timestamp", "level", "event", "pid", "message"]
    assert record["timestamp"].endswith("Z")
    assert len(record["timestamp"]) == len("2026-11-25T12:00:00.000000Z")
    assert (record["level"], record["event"], record["pid"]) == ("notice", "started", 7)


@pytest.mark.parametrize("threshold", LEVELS)
def test_less_severe_records_are_not_written(threshold):
    log, _, records = kept_log(threshold)
    for level in LEVELS:
        log(level, "seen")
    assert [record["level"] for record, _ in records] == list(LEVELS[LEVELS.index(threshold) :])


def test_the_threshold_can_be_changed():
    log, output, records = kept_log("error")
    log("info", "before")
    output.set_level("info")
    log("info", "after")
    assert [record["event"] for record, _ in records] == ["after"]


def test_a_match_counts_for_its_rule():
    log, _, records = kept_log()
    log("info", "rule_matched", rule="a")
    log("info", "throttled", rule="a")
    assert [rule for _, rule in records] == ["a", None]


def test_a_record_that_cannot_be_written_is_counted():
    reader, writer = os.pipe()
    os.close(reader)
    output = make_output("json", writer, False)
    log = make_log(output)
    log("info", "seen")
    log("info", "rule_matched", rule="a")
    assert (output.lost.records, output.lost.matches) == (2, 1)


def test_a_broken_output_is_replaced_by_the_next(pipe):
    """Without journald, records are JSON lines on standard output."""
    reader, writer = os.pipe()
    os.close(reader)
    output = make_output("json", writer, False)
    output.outputs += make_output("json", pipe[1], False).outputs
    make_log(output)("info", "seen")
    assert json.loads(os.read(pipe[0], 1 << 16))["event"] == "seen"
    assert output.lost.records == 0


def test_what_was_lost_is_logged_when_there_is_room_again():
    reader, writer = os.pipe()
    output = make_output("json", writer, False)
    log = make_log(output)
    output.outputs[0][1].drop("a")
    output.outputs[0][1].drop(None)
    log("info", "seen")
    records = [json.loads(line) for line in os.read(reader, 1 << 16).splitlines()]
    assert [record["event"] for record in records] == ["seen", "log_lost"]
    assert (records[1]["records"], records[1]["matches"], records[1]["rules"]) == (2, 1, {"a": 1})
