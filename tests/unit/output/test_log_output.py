"""The log: records in the order of the contract, a threshold that can be changed, and lost records counted."""

import json
from io import StringIO

import pytest

from cnprocd.log import LEVELS
from cnprocd.output.log import LogOutput, make_log, make_output


class Broken(StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_record_has_time_level_and_event_first():
    stream = StringIO()
    make_log(make_output("json", stream, False))("notice", "started", pid=7, message="up")
    record = json.loads(stream.getvalue())
    assert list(record) == ["timestamp", "level", "event", "pid", "message"]
    assert record["timestamp"].endswith("Z")
    assert len(record["timestamp"]) == len("2026-11-25T12:00:00.000000Z")
    assert (record["level"], record["event"], record["pid"]) == ("notice", "started", 7)


@pytest.mark.parametrize("threshold", LEVELS)
def test_less_severe_records_are_not_written(threshold):
    records = []
    log = make_log(LogOutput(records.append), threshold)
    for level in LEVELS:
        log(level, "seen")
    assert [record["level"] for record in records] == list(LEVELS[LEVELS.index(threshold) :])


def test_the_threshold_can_be_changed():
    records = []
    output = LogOutput(records.append)
    log = make_log(output, "error")
    log("info", "before")
    output.set_level("info")
    log("info", "after")
    assert [record["event"] for record in records] == ["after"]


def test_a_record_that_cannot_be_written_is_counted():
    output = make_output("json", Broken(), False)
    make_log(output)("info", "seen")
    assert output.lost == 1
