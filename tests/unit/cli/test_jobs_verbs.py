"""jobs and history without a daemon: what they read from a copy of the spool, and what they refuse in one line."""

import json

import pytest
from unit.ctlkit import ctl, ctl_json
from unit.hookkit import Records, request

from cnprocd.errors import EX_NO, EX_OK, EX_UNAVAILABLE
from cnprocd.launch.request import AttemptResult
from cnprocd.spool.rows import PastMatch
from cnprocd.spool.spool import Spool

NS = 10**9
NOON_NS = 1_790_000_000 * NS


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The options that lead to a spool with three jobs and three matches, and to no daemon."""
    monkeypatch.setenv("TZ", "UTC")
    (tmp_path / "rules.yaml").write_text("rules:\n  - {name: oracle-died, events: [nonzero_exit]}\n")
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue([request("oracle-died") for _ in range(3)])
    spool.start(1, "t")
    spool.put_output(1, "".join(f"line {number}\n" for number in range(30)))
    spool.bury(1, AttemptResult("exit code 1", 1), "exit code 1 (1 attempt)")
    spool.start(2, "t")
    spool.finish(2, AttemptResult(None, 0, duration_ms=5.0))
    for number, user in ((1, "oracle"), (2, "oracle"), (3, "root")):
        record = {"rule": "oracle-died", "kind": "nonzero_exit", "comm": f"ora_p00{number}", "pid": number, "uid": 54}
        record |= {"user": user, "job_id": number, "status": "exit code 3", "kernel_time_ns": number}
        match = PastMatch(NOON_NS + number * NS, "oracle-died", f"ora_p00{number}", number, record)
        spool.record_matches([match])
    spool.close()
    return ["--state-dir", str(tmp_path), "--runtime-dir", str(tmp_path), "--rules", str(tmp_path / "rules.yaml")]


def test_history_shows_zone_and_outcome(places):
    status, out, err = ctl("history", *places)
    assert (status, err) == (EX_OK, "")
    head, *rows = out.splitlines()
    assert head.split() == ["TIME", "RULE", "PROCESS", "USER", "STATUS", "JOB", "OUTCOME"]
    assert rows[0].startswith("2026-09-21 14:13:21+00:00  oracle-died  ora_p001[1]  oracle")
    assert [row.split("  ")[-1] for row in rows] == ["dead: exit code 1 (1 attempt)", "done", "waiting"]


FILTERS = {
    "pid": (["--pid", "2"], [2]),
    "user": (["--user", "oracle"], [1, 2]),
    "uid": (["--user", "54"], [1, 2, 3]),
    "a glob": (["--comm", "ora_p00[!1]"], [2, 3]),
    "since": (["--since", "2026-09-21 14:13:22"], [2, 3]),
    "a window": (["--since", "@1790000001", "--until", "2026-09-21T14:13:22Z"], [1, 2]),
    "limit": (["-n", "1"], [3]),
    "no glob matches": (["--rule", "x*"], []),
    "another pid": (["--rule", "oracle-died", "--pid", "9"], []),
}


@pytest.mark.parametrize(("words", "pids"), FILTERS.values(), ids=FILTERS)
def test_history_filters(places, words, pids):
    status, found = ctl_json("history", *words, *places)
    assert (status, [match["pid"] for match in found]) == (EX_OK, pids)


@pytest.mark.parametrize("verb", [["history"], ["jobs", "list"]])
def test_a_literal_rule_that_never_was_is_not_found(places, verb):
    status, out, err = ctl(*verb, "--rule", "oracle-dide", *places)
    assert (status, out) == (EX_NO, "")
    assert err == 'cnprocctl: no rule named "oracle-dide": did you mean "oracle-died"?\n'


def test_a_window_that_ends_before_it_begins_is_wrong_usage(places):
    status, _, err = ctl("history", "--since", "1h", "--until", "2h", *places)
    assert (status, "is before --since" in err) == (2, True)


@pytest.mark.parametrize("verb", ["show", "log"])
def test_an_unknown_job_is_one_line_and_status_1(places, verb):
    hint = "`cnprocctl jobs list` shows the jobs that are kept"
    assert ctl("jobs", verb, "99", *places) == (EX_NO, "", f"cnprocctl: no such job: 99: {hint}\n")


def test_log_prints_the_kept_output(places):
    assert ctl("jobs", "log", "1", *places) == (EX_OK, "".join(f"line {number}\n" for number in range(30)), "")
    assert ctl("jobs", "log", "2", *places) == (EX_OK, "", "cnprocctl: job 2 has no output\n")
    assert ctl_json("jobs", "log", "1", *places)[1]["state"] == "dead"
    assert ctl("jobs", "log", "-f", "1", *places)[1].count("line") == 30  # the job is over


def test_show_ends_with_the_last_lines_of_output(places):
    out = ctl("jobs", "show", "1", *places)[1]
    assert "the last 20 of 30 lines" in out
    assert ("line 9\n" in out, "line 10\n" in out, "line 29\n" in out) == (False, True, True)
    assert ctl_json("jobs", "show", "1", *places)[1]["output"].count("\n") == 30


def test_jobs_list_takes_a_glob(places):
    assert [job["job_id"] for job in ctl_json("jobs", "list", "--rule", "ora*", "-n2", *places)[1]] == [3, 2]


@pytest.mark.parametrize("words", [[], ["1", "--all"], ["--all", "--rule", "x"]])
@pytest.mark.parametrize("verb", ["retry", "drop"])
def test_many_jobs_need_exactly_one_choice(places, verb, words):
    status, out, err = ctl("jobs", verb, *words, *places)
    assert (status, out, "--rule NAME, or --all" in err) == (2, "", True)


@pytest.mark.parametrize(
    "words", [["retry", "1"], ["retry", "--all"], ["drop", "1"], ["drop", "--all"], ["kill", "1"], ["history", "-f"]]
)
def test_what_changes_jobs_needs_the_daemon(places, words):
    verb = words if words[0] == "history" else ["jobs", *words]
    assert ctl(*verb, *places)[0] == EX_UNAVAILABLE


def test_an_error_as_json_is_still_one_object(places):
    status, out, _ = ctl("--json", "jobs", "show", "99", *places)
    assert (status, json.loads(out)["error"]["status"]) == (EX_NO, EX_NO)
