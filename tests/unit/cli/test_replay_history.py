"""`replay --history`: which rules would fire for the events of past matches, without a daemon."""

import time

import pytest
from unit.ctlkit import ctl, ctl_json
from unit.hookkit import Records

from cnprocd.errors import EX_OK
from cnprocd.spool.rows import PastMatch
from cnprocd.spool.spool import Spool

NS = 10**9
RULES = """
rules:
  - {name: killed, events: [nonzero_exit], match: {signal: SIGKILL}}
  - {name: of-db, events: [nonzero_exit], match: {unit: db.service}}
"""


def record(rule, pid, *, signal=None, code=None, at=1, **more):
    return {
        "rule": rule, "kind": "nonzero_exit", "pid": pid, "tid": pid, "comm": f"p{pid}", "uid": 0, "gid": 0,
        "exit_code": code, "signal": signal, "core_dumped": False, "kernel_time_ns": at, "recovered": False,
        "boot_id": "b", "match_id": f"{rule}-{pid}", "status": signal or f"exit code {code}", **more,
    }  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """Return the options for a spool with four matches of three events, and rules."""
    (tmp_path / "state").mkdir()
    spool = Spool.open(tmp_path / "state", log=Records())
    records = [
        record("killed", 1, signal="SIGKILL", unit="db.service"),
        record("old", 1, signal="SIGKILL", unit="db.service"),
        record("old", 2, code=3, unit="web.service"),
        record("old", 3, code=3, unit=None),
    ]
    now_ns = time.time_ns()
    spool.record_matches(
        [PastMatch(now_ns - (9 - i) * NS, one["rule"], one["comm"], one["pid"], one) for i, one in enumerate(records)]
    )
    spool.close()
    (tmp_path / "rules.yaml").write_text(RULES)
    return ["--state-dir", str(tmp_path / "state"), "--runtime-dir", str(tmp_path / "run")], tmp_path / "rules.yaml"


def test_each_event_shows_what_fired_and_what_would_fire(place):
    options, rules = place
    status, found = ctl_json(*options, "replay", "--history", rules=rules)
    shown = [(one["pid"], one["fired"], one["fires"], one["unknown"]) for one in found["events"]]
    assert status == EX_OK
    assert shown == [
        (1, ["killed", "old"], ["killed", "of-db"], []),
        (2, ["old"], [], []),
        (3, ["old"], [], ["of-db"]),
    ]
    assert found["differ"] == 3


def test_the_table_marks_rules_that_fire_anew_or_no_longer(place):
    options, rules = place
    _, out, _ = ctl(*options, "replay", "--history", rules=rules)
    lines = [line.split() for line in out.splitlines()]
    assert lines[1][-4:] == ["killed", "+of-db", "-old", "-"]
    assert out.endswith("3 events; other rules would fire for 3\n")


def test_the_newest_past_matches_are_replayed(place):
    options, rules = place
    _, found = ctl_json(*options, "replay", "--history", "-n", "1", rules=rules)
    assert [one["pid"] for one in found["events"]] == [3]
    _, found = ctl_json(*options, "replay", "--history", "--rule", "kill*", rules=rules)
    assert [one["pid"] for one in found["events"]] == [1]


def test_more_matches_than_a_page_are_read_page_by_page(tmp_path):
    (tmp_path / "state").mkdir()
    spool = Spool.open(tmp_path / "state", log=Records())
    count = 250
    records = [record("killed", 1000 + i, signal="SIGKILL", at=i) for i in range(count)]
    spool.record_matches([PastMatch(i // 7, "killed", one["comm"], one["pid"], one) for i, one in enumerate(records)])
    spool.close()
    (tmp_path / "rules.yaml").write_text(RULES)
    options = ["--state-dir", str(tmp_path / "state"), "--runtime-dir", str(tmp_path / "run")]
    _, found = ctl_json(*options, "replay", "--history", "-n", "1000", rules=tmp_path / "rules.yaml")
    assert sorted(one["pid"] for one in found["events"]) == [1000 + i for i in range(count)]


@pytest.mark.parametrize("words", [["replay"], ["replay", "x.rec", "--history"]])
def test_a_recording_or_the_history_but_not_both(words):
    assert ctl(*words)[0] == 2
