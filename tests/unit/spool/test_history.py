"""The past in the spool: matches by filter with their job's outcome, kept output, hits, and the step from version 2."""

import sqlite3
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.hookkit import Records, request, searched

from cnprocd.launch.request import AttemptResult
from cnprocd.spool import database, history
from cnprocd.spool.job import State
from cnprocd.spool.rows import CountFilter, MatchFilter, NotInHistoryError, PastMatch, Rows, RuleHits
from cnprocd.spool.spool import FILE_NAME, Spool
from cnprocd.spool.store import Store

FAILED = AttemptResult("exit code 1", 1)
NS = 10**9
VERSION_2 = """
CREATE TABLE jobs(
    job_id INTEGER PRIMARY KEY AUTOINCREMENT,
    rule TEXT NOT NULL, state TEXT NOT NULL, serialize_key TEXT, gather_key TEXT,
    kernel_time_ns INTEGER, boot_id TEXT NOT NULL, created_ns INTEGER NOT NULL, due_ns INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, event_count INTEGER NOT NULL,
    first_started_ns INTEGER, finished_ns INTEGER, exit_code INTEGER, signal INTEGER, reason TEXT,
    duration_ms REAL, latency_ms REAL,
    attempt_id TEXT, attempt_boot_id TEXT, hook_pid INTEGER, hook_start_ticks INTEGER,
    CHECK(state IN ('waiting', 'running', 'done', 'dead')),
    CHECK(typeof(created_ns) = 'integer' AND typeof(due_ns) = 'integer' AND typeof(attempts) = 'integer'
        AND typeof(failures) = 'integer' AND typeof(event_count) = 'integer'),
    CHECK(typeof(kernel_time_ns) IN ('integer', 'null') AND typeof(first_started_ns) IN ('integer', 'null'))
);
CREATE TABLE events(
    event_id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE, job_id INTEGER NOT NULL, record TEXT NOT NULL
);
CREATE TABLE matches(
    match_id INTEGER PRIMARY KEY,
    time_ns INTEGER NOT NULL, rule TEXT NOT NULL, comm TEXT, pid INTEGER, record TEXT NOT NULL
);
CREATE INDEX waiting ON jobs(job_id, due_ns, rule, serialize_key) WHERE state = 'waiting';
CREATE INDEX due ON jobs(due_ns) WHERE state = 'waiting';
CREATE INDEX gathering ON jobs(gather_key, job_id) WHERE gather_key IS NOT NULL AND state = 'waiting';
CREATE INDEX ended ON jobs(state, finished_ns) WHERE state IN ('done', 'dead');
CREATE INDEX events_of ON events(job_id);
CREATE INDEX matches_by_time ON matches(time_ns);
PRAGMA application_id = 1668182130;
PRAGMA user_version = 2;
"""


@pytest.fixture
def store():
    return Store(database.in_memory())


@pytest.fixture
def spool(tmp_path):
    spool = Spool.open(tmp_path, log=Records())
    yield spool
    spool.close()


# -- version 2 ---------------------------------------------------------------------------------------------------


def test_a_database_of_version_2_keeps_every_job_and_match(tmp_path):
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.executescript(VERSION_2)
        for number, state in enumerate(State, start=1):
            db.execute(
                "INSERT INTO jobs(rule, state, boot_id, created_ns, due_ns, event_count) VALUES (?, ?, 'b', 1, 1, 1)",
                (f"r{number}", str(state)),
            )
            values = (str(number), number, f'{{"pid": {number}}}')
            db.execute("INSERT INTO events(key, job_id, record) VALUES (?, ?, ?)", values)
        record = '{"pid": 7, "job_id": 4, "uid": 54, "user": "oracle", "unit": "db.service"}'
        for text in (record, "damaged", '{"uid": "x"}'):
            db.execute("INSERT INTO matches(time_ns, rule, comm, pid, record) VALUES (5, 'r4', 'c', 7, ?)", (text,))
    db.close()
    records = Records()
    spool = Spool.open(tmp_path, log=records)
    assert (records.all, spool.durable) == ([], True)
    assert {job.job_id: str(job.state) for job in searched(spool.find_jobs()).value} == {
        1: "waiting",
        2: "running",
        3: "done",
        4: "dead",
    }
    assert [searched(spool.find_job(job_id)).value.events for job_id in range(1, 5)] == [
        ({"pid": number},) for number in range(1, 5)
    ]
    (found,) = searched(spool.find_matches(MatchFilter(user="oracle", uid=54, unit="db.*"))).value
    assert (found.record["job_id"], found.job_state) == (4, "dead")
    spool.put_output(4, "late\n")
    spool.close()
    again = Spool.open(tmp_path, log=records)
    assert (searched(again.find_output(4)).value, records.all) == ("late\n", [])
    again.close()


def test_waiting_times_of_version_3_survive_the_step(tmp_path):
    """A clock that was a month ahead then, a retry in five seconds, and a deadline of which three are spent."""
    now_ns, month_ns = time.time_ns(), 30 * 86400 * NS
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.executescript(VERSION_2.replace("duration_ms REAL", "snapshot TEXT NOT NULL DEFAULT 's', duration_ms REAL"))
        for column in ("job_id INTEGER", "uid INTEGER", "user TEXT", "unit TEXT"):
            db.execute(f"ALTER TABLE matches ADD COLUMN {column}")
        db.executescript(f"{database._OUTPUTS} {database._HITS} PRAGMA user_version = 3")
        for created_ns, due_ns, started_ns in (
            (now_ns + month_ns, now_ns + month_ns, None),
            (now_ns - NS, now_ns + 1000 * NS, now_ns + 997 * NS),
            (now_ns - NS, now_ns + 1000 * NS, None),
        ):
            db.execute(
                "INSERT INTO jobs(rule, state, boot_id, created_ns, due_ns, first_started_ns, event_count, failures)"
                " VALUES ('r', 'waiting', 'b', ?, ?, ?, 1, 1)",
                (created_ns, due_ns, started_ns),
            )
            db.execute("INSERT INTO events(key, job_id, record) SELECT max(job_id), max(job_id), '{}' FROM jobs")
    db.close()
    spool = Spool.open(tmp_path, log=Records())
    assert spool.durable
    assert [job.job_id for job in spool.due(9)] == [1]
    waits_s = [(spool.job(job_id).due_ns - spool.clock()) / NS for job_id in (2, 3)]
    assert 1 < waits_s[0] <= 3
    assert 900 < waits_s[1] <= 1001
    assert [spool.job(job_id).spent_ns for job_id in (1, 2, 3)] == [0, 3 * NS, 0]
    spool.close()


def test_a_step_from_version_2_that_fails_changes_nothing(tmp_path):
    """The disk fills up within the step: the old file is whole, and its jobs are carried over."""
    path = tmp_path / FILE_NAME
    with sqlite3.connect(path) as db:
        db.executescript(VERSION_2)
        db.execute("CREATE TABLE hits(x)")  # the step cannot create its own
    db.close()
    with pytest.raises(sqlite3.Error):
        database.in_file(path)
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        assert "unit" not in [row[1] for row in db.execute("PRAGMA table_info(matches)")]
    db.close()


def test_a_database_of_version_4_gets_match_ids(tmp_path):
    path = tmp_path / FILE_NAME
    database.in_file(path).close()
    with sqlite3.connect(path) as db:
        db.executescript(
            "DROP INDEX match_ids; ALTER TABLE matches DROP COLUMN match_id;"
            "ALTER TABLE matches RENAME COLUMN row_id TO match_id; PRAGMA user_version = 4;"
        )
        for pid in (1, 2):
            db.execute("INSERT INTO matches(time_ns, rule, comm, pid, record) VALUES (5, 'r', 'c', ?, '{}')", (pid,))
    db.close()
    records = Records()
    spool = Spool.open(tmp_path, log=records)
    assert (records.all, spool.durable) == ([], True)
    add(spool, 3, match_id="m3")
    assert [match.pid for match in searched(spool.find_matches(MatchFilter())).value] == [3, 2, 1]
    spool.close()


# -- after a match -----------------------------------------------------------------------------------------------


@pytest.fixture
def identified(spool):
    for number in range(1, 6):
        add(spool, number, match_id=f"m{number}", rule="core" if number == 4 else "oracle-died")
    return spool


@pytest.mark.parametrize(
    ("wanted", "pids"),
    [
        ({"after": "m2"}, [3, 4, 5]),
        ({"after": "m2", "limit": 2}, [3, 4]),
        ({"after": "m2", "rule": "core"}, [4]),
        ({"after": "m5"}, []),
        ({"after": ""}, [1, 2, 3, 4, 5]),
        ({"before": "m4"}, [3, 2, 1]),
        ({"before": "m4", "limit": 2}, [3, 2]),
        ({"before": "m5", "rule": "core"}, [4]),
        ({"before": "m1"}, []),
    ],
)
def test_history_goes_on_after_a_match_in_order(identified, wanted, pids):
    assert [match.pid for match in searched(identified.find_matches(MatchFilter(**wanted))).value] == pids


def test_pages_after_a_match_join_without_gap_or_double(spool):
    for number in range(1, 251):
        add(spool, number, match_id=f"m{number}")
    found = searched(spool.find_matches(MatchFilter(after="m3", limit=1000))).value
    assert [match.pid for match in found] == list(range(4, 251))
    found = searched(spool.find_matches(MatchFilter(before="m249", limit=1000))).value
    assert [match.pid for match in found] == list(range(248, 0, -1))


def test_history_before_a_match_ignores_a_clock_set_back(spool):
    for number in (7, 8, 9, 1, 2):
        add(spool, number, match_id=f"m{number}")
    found = searched(spool.find_matches(MatchFilter(before="m1"))).value
    assert [match.pid for match in found] == [9, 8, 7]


def test_a_match_that_is_reported_again_is_one_row(identified):
    add(identified, 2, match_id="m2")
    assert [match.pid for match in searched(identified.find_matches(MatchFilter(after="m1"))).value] == [2, 3, 4, 5]


def test_going_on_after_a_forgotten_match_is_refused(identified, store):
    with pytest.raises(NotInHistoryError, match="cannot go on from match m9"):
        searched(identified.find_matches(MatchFilter(after="m9")))
    with pytest.raises(NotInHistoryError):
        store.matches(MatchFilter(after="m9"))
    with pytest.raises(NotInHistoryError):
        searched(identified.find_matches(MatchFilter(before="m9")))


# -- matches -----------------------------------------------------------------------------------------------------


def add(spool, number, **fields):
    record = {"pid": number, "comm": "ora_pmon", "uid": 54, "user": "oracle", "unit": "db.service"} | fields
    rule = str(record.pop("rule", "oracle-died"))
    spool.record_matches([PastMatch(number * NS, rule, record["comm"], record["pid"], record)])


FILTERS = {
    "all": ({}, [4, 3, 2, 1]),
    "a rule": ({"rule": "core"}, [4]),
    "a glob of rules": ({"rule": "oracle-*"}, [3, 2, 1]),
    "a negated set": ({"rule": "[!c]*"}, [3, 2, 1]),
    "a comm": ({"comm": "tnslsnr"}, [2]),
    "a glob of comms": ({"comm": "ora_p???"}, [4, 3, 1]),
    "a pid": ({"pid": 3}, [3]),
    "a user": ({"user": "root"}, [3]),
    "a uid": ({"uid": 0}, [3]),
    "a glob of units": ({"unit": "db.*"}, [4, 3, 1]),
    "since": ({"since_ns": 3 * NS}, [4, 3]),
    "until": ({"until_ns": 2 * NS}, [2, 1]),
    "a window": ({"since_ns": 2 * NS, "until_ns": 3 * NS, "limit": 1}, [3]),
    "nothing": ({"rule": "oracle-*", "pid": 4}, []),
}


@pytest.mark.parametrize(("wanted", "pids"), FILTERS.values(), ids=FILTERS)
def test_matches_are_found_by_every_filter(spool, wanted, pids):
    add(spool, 1)
    add(spool, 2, comm="tnslsnr", unit=None)
    add(spool, 3, user="root", uid=0)
    add(spool, 4, rule="core")
    assert [match.pid for match in searched(spool.find_matches(MatchFilter(**wanted))).value] == pids


def test_a_filter_is_applied_before_the_limit(spool):
    add(spool, 1, rule="rare")
    for number in range(2, 200):
        add(spool, number)
    assert [match.pid for match in searched(spool.find_matches(MatchFilter(rule="rare", limit=1))).value] == [1]


@given(st.text(), st.integers(-(1 << 70), 1 << 70), st.integers(-(1 << 70), 1 << 70))
def test_any_filter_is_answered(pattern, since_ns, until_ns):
    store = Store(database.in_memory())
    wanted = MatchFilter(rule=pattern, comm=pattern, unit=pattern, user=pattern, since_ns=since_ns, until_ns=until_ns)
    assert store.matches(wanted) == []


def test_a_match_has_the_state_of_its_job(spool):
    spool.enqueue([request("r"), request("r")])
    spool.start(1, "t")
    spool.bury(1, FAILED, "exit code 1 (1 attempt)")
    for number, job_id in ((1, 1), (2, 2), (3, None), (4, 99)):
        add(spool, number, job_id=job_id)
    found = [(match.job_state, match.job_reason) for match in searched(spool.find_matches(MatchFilter())).value]
    assert found == [(None, None), (None, None), ("waiting", None), ("dead", "exit code 1 (1 attempt)")]


# -- output ------------------------------------------------------------------------------------------------------


def put_output(store, job_id, output):
    store.write(Rows(outputs=[(job_id, output)]), (), ())


def test_output_is_that_of_the_last_attempt(store):
    put_output(store, 1, "first\n")
    put_output(store, 1, "second\n")
    assert store.output(1) == "second\n"
    put_output(store, 1, "")
    assert store.output(1) is None


def test_output_is_bounded_for_all_jobs_together(spool):
    spool.enqueue([request("r") for _ in range(5)])
    for job_id in range(1, 6):
        spool.put_output(job_id, "x" * 100)
    spool.put_output(77, "of a job that is gone")
    spool.sync()
    history.prune_outputs(spool._copy._disk.file._store._db, 250)
    assert [searched(spool.find_output(job_id)).value is not None for job_id in (1, 2, 3, 4, 5, 77)] == [False] * 3 + [
        True
    ] * 2 + [False]
    spool.prune()
    assert searched(spool.find_output(5)).value is not None


# -- hits --------------------------------------------------------------------------------------------------------


def hits(store):
    return history.hits_of(store.merge(Rows(), ()).foreign.hits)


def test_hits_are_replaced_and_forgotten(store):
    store.write(Rows(hits=[("a", 1, None), ("b", 2, 7)]), (), ())
    store.write(Rows(hits=[("a", 5, 9)]), (), ["b"])
    assert hits(store) == {"a": RuleHits(5, 9)}


def test_a_damaged_row_of_hits_is_left_out(store):
    store._db.executescript("INSERT INTO hits VALUES ('a', 'x', 1), ('b', 2, 'x'), (x'ff', 3, 3), ('c', 4, NULL)")
    assert hits(store) == {"c": RuleHits(4, None)}


# -- retry -------------------------------------------------------------------------------------------------------


def test_dead_jobs_are_revived_by_rule_or_all(spool):
    spool.enqueue([request(rule) for rule in ("db-a", "db-b", "web", "web")])
    for job_id in (1, 2, 3):
        spool.start(job_id, "t")
        spool.bury(job_id, FAILED, "x")
    assert searched(spool.revive(rule="db-*")) == [1, 2]
    assert searched(spool.revive(rule="none")) == []
    assert searched(spool.revive()) == [3]
    assert searched(spool.revive()) == []
    assert spool._store.waiting == spool.counts().waiting == 4


# -- counts ------------------------------------------------------------------------------------------------------


def _count(store, by, **given):
    wanted = {"since_ns": 0, "until_ns": 100 * NS, "per_ns": 10 * NS} | given
    return [(one.at_ns // NS, one.key, one.count) for one in store.count_matches(CountFilter(by=by, **wanted))]


def test_matches_are_counted_by_period_and_key(store):
    units = ["db.service", None, "db.service", "web.service"]
    store.replace_matches(
        history.match_row(at_s * NS, rule, "c", 1, {"unit": unit, "kind": kind, "match_id": str(at_s)})
        for at_s, rule, unit, kind in zip((1, 9, 11, 12), "abaa", units, ("exit", "exec", "exit", "exit"), strict=True)
    )
    assert _count(store, "rule") == [(0, "a", 1), (0, "b", 1), (10, "a", 2)]
    assert _count(store, "unit") == [(0, None, 1), (0, "db.service", 1), (10, "db.service", 1), (10, "web.service", 1)]
    assert _count(store, "kind") == [(0, "exec", 1), (0, "exit", 1), (10, "exit", 2)]
    assert _count(store, "rule", since_ns=9 * NS, until_ns=11 * NS) == [(0, "b", 1), (10, "a", 1)]


def test_counts_of_many_keys_are_bounded(store):
    """Processes can choose the names of units, so the rare ones are counted as one."""
    rows = [history.match_row(1, "r", "c", 1, {"unit": f"u{i // 2}.service", "match_id": str(i)}) for i in range(1000)]
    store.replace_matches([*rows, history.match_row(1, "r", "c", 1, {"unit": "u0.service", "match_id": "x"})])
    found = store.count_matches(CountFilter("unit", 0, NS, NS))
    assert len(found) == history.MOST_KEYS + 1
    assert sum(one.count for one in found) == 1001
    assert {one.key for one in found} >= {"u0.service", history.OTHERS}


def test_a_damaged_record_has_no_kind(store):
    store.replace_matches([history.match_row(1, "r", "c", 1, {"kind": "exit", "match_id": "1"})])
    store._db.execute("UPDATE matches SET record = 'damaged'")
    assert _count(store, "kind") == [(0, None, 1)]


def test_a_match_is_found_by_its_id(spool):
    matches = [PastMatch(i, "r", "c", i, {"match_id": f"id{i}", "pid": i}) for i in range(5)]
    spool.record_matches(matches)
    (found,) = searched(spool.find_matches(MatchFilter(match_id="id3"))).value
    assert found.pid == 3
