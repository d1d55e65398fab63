"""spool.py on real files: no committed job is lost or doubled, and disk failures are logged and survived."""

import contextlib
import dataclasses
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.hookkit import HOOK, Clock, Records, request, searched

from cnprocd.launch.request import AttemptResult
from cnprocd.rules.ruleset import Backoff
from cnprocd.spool import database
from cnprocd.spool.job import MOST_INTERRUPTIONS, NS, Gather, State, after_attempt, time_left_s
from cnprocd.spool.rows import LONGEST_PAUSE_NS, ClockReading, Keep, MatchFilter, PastMatch, due_again_ns
from cnprocd.spool.spool import FILE_NAME, Spool

DAY_NS = 86400 * NS
FINE, FAILED = AttemptResult(None, 0), AttemptResult("exit code 1", 1)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def open_spool(tmp_path, clock, records):
    opened = []

    def make(boot_id="boot", **keep):
        for spool in opened:
            spool.close()
        opened.append(Spool.open(tmp_path, log=records, keep=Keep(**keep), clock=clock, boot_id=boot_id))
        return opened[-1]

    yield make
    for spool in opened:
        spool.close()


def in_file(spool):
    """The database in the file."""
    return spool._copy._disk.file._store._db


def ids(jobs):
    return [job.job_id for job in jobs]


# -- in, once ----------------------------------------------------------------------------------------------------


def test_a_batch_is_there_after_it_was_opened_again(open_spool):
    spool = open_spool()
    result = spool.enqueue([request("a", {"pid": 1, "comm": "\udcff"}), request("b")])
    assert result.job_ids == (1, 2)
    again = open_spool()
    assert [(job.job_id, job.rule, job.state) for job in again.due(9)] == [(1, "a", "waiting"), (2, "b", "waiting")]
    assert again.job(1).events == ({"pid": 1, "comm": "\udcff"},)
    assert again.job(3) is None


def test_a_known_key_is_skipped_in_every_state_of_its_job(open_spool):
    spool = open_spool()
    assert spool.enqueue([request("a", key="k"), request("a", key="k")]).job_ids == (1, None)
    spool.start(1, "t")
    spool.finish(1, FINE)
    again = open_spool()
    assert again.enqueue([request("a", key="k")]).job_ids == (None,)
    assert again.counts().duplicates == 1
    assert again.due(9) == []


def test_a_full_queue_drops_the_newest_and_logs_it(open_spool, records):
    spool = open_spool(queue_limit=3)
    result = spool.enqueue([request("a") for _ in range(5)])
    assert (result.job_ids, result.shed) == ((1, 2, 3, None, None), 2)
    assert records.of("queue_full", shed=2, limit=3)
    assert spool.counts().shed == 2
    spool.start(1, "t")
    assert spool.enqueue([request("a"), request("a")]).shed == 1


def test_a_flood_of_dropped_jobs_is_logged_in_few_records(open_spool, records, clock):
    spool = open_spool(queue_limit=0)
    for _ in range(100):
        clock.now_ns += NS // 10
        assert spool.enqueue([request("a")]).shed == 1
    clock.now_ns += 10 * NS
    spool.sync()
    logged = records.of("queue_full")
    assert len(logged) <= 4
    assert logged[0]["shed"] == 1
    assert sum(fields["shed"] for fields in logged) == 100


def test_a_batch_is_one_commit_or_nothing(open_spool):
    spool = open_spool()
    with pytest.raises(TypeError):
        spool.enqueue([request("a"), request("a", {"pid": object()})])
    assert spool.counts().waiting == spool._store.waiting == 0
    assert open_spool().counts().waiting == 0


# -- gathering ---------------------------------------------------------------------------------------------------


def test_matches_of_a_window_share_one_job_due_at_its_close(open_spool, clock):
    spool = open_spool()
    gather = Gather("a", window_s=10)
    first = spool.enqueue([request("a", {"pid": n}, gather=gather) for n in (1, 2)])
    clock.now_ns += 5 * NS
    second = spool.enqueue([request("a", {"pid": 3}, gather=gather)])
    assert first.job_ids + second.job_ids == (1, 1, 1)
    assert spool.due(9) == []
    assert spool.next_due_in_s(spool.clock()) == 5
    clock.now_ns += 5 * NS
    assert ids(spool.due(9)) == [1]
    assert [event["pid"] for event in open_spool().job(1).events] == [1, 2, 3]


def test_a_full_gathering_is_due_at_once_and_a_new_one_begins(open_spool):
    spool = open_spool()
    gather = Gather("a", window_s=1000, max=3)
    result = spool.enqueue([request("a", gather=gather) for _ in range(4)])
    assert result.job_ids == (1, 1, 1, 2)
    assert ids(spool.due(9)) == [1]
    one = Gather("b", window_s=1000, max=1)
    assert spool.enqueue([request("a", gather=one)]).job_ids == (3,)
    assert ids(spool.due(9)) == [1, 3]


def test_a_gathering_that_has_started_takes_nothing_more(open_spool, clock):
    spool = open_spool()
    gather = Gather("a", window_s=0.0)
    spool.enqueue([request("a", gather=gather)])
    spool.start(1, "t")
    assert spool.enqueue([request("a", gather=gather)]).job_ids == (2,)
    spool.retry(1, FAILED, clock())
    spool.start(2, "t")
    assert spool.enqueue([request("a", gather=gather)]).job_ids == (3,)


def test_a_known_key_does_not_join_a_gathering_twice(open_spool):
    spool = open_spool()
    gather = Gather("a", window_s=10)
    spool.enqueue([request("a", key="k", gather=gather)])
    assert spool.enqueue([request("a", key="k", gather=gather)]).duplicates == 1
    assert spool.job(1).event_count == 1


def test_gathering_goes_on_when_the_queue_is_full(open_spool):
    spool = open_spool(queue_limit=1)
    gather = Gather("a", window_s=10)
    assert spool.enqueue([request("a", gather=gather), request("a", gather=gather)]).shed == 0


# -- out ---------------------------------------------------------------------------------------------------------


def test_the_oldest_comes_first_and_what_is_busy_is_passed_over(open_spool):
    spool = open_spool()
    spool.enqueue([request("a", serialize_key="x"), request("a", serialize_key="y"), request("b"), request("c")])
    assert ids(spool.due(2)) == [1, 2]
    assert ids(spool.due(9, rule="b")) == [3]
    assert ids(spool.due(9, rule="a", skip_keys=["x"])) == [2]
    assert ids(spool.due(9, skip_keys=["x"])) == [2, 3, 4]
    assert ids(spool.due(9, skip_jobs=[1, 3])) == [2, 4]
    assert ids(spool.due(9, after_id=2)) == [3, 4]


def test_jobs_are_counted_without_reading_them_all(open_spool):
    """It is called every second, with up to ten thousand finished jobs."""
    spool, statements = open_spool(), []
    db = spool._store._db
    db.set_trace_callback(statements.append)
    spool.counts()
    db.set_trace_callback(None)
    assert statements
    for statement in statements:
        for *_, step in db.execute(f"EXPLAIN QUERY PLAN {statement}"):
            assert "TEMP B-TREE" not in step
            assert "jobs" not in step or "INDEX" in step, step


def test_a_file_without_the_index_of_running_jobs_gets_it(open_spool, tmp_path):
    spool = open_spool()
    (job_id,) = spool.enqueue([request("a")]).job_ids
    in_file(spool).execute("DROP INDEX running")
    again = open_spool()
    assert (again.counts().waiting, again.counts().running) == (1, 0)
    assert again.job(job_id) is not None


def test_a_retry_waits_for_its_time_and_keeps_its_place(open_spool, clock):
    spool = open_spool()
    spool.enqueue([request("a"), request("a")])
    spool.start(1, "t")
    spool.retry(1, FAILED, clock() + NS)
    assert ids(spool.due(9)) == [2]
    clock.now_ns += NS
    assert ids(spool.due(9)) == [1, 2]
    job = spool.job(1)
    assert (job.attempts, job.failures, job.exit_code, job.reason) == (1, 1, 1, "exit code 1")


def test_the_dead_are_kept_shown_and_revived_by_hand(open_spool):
    spool = open_spool()
    spool.enqueue([request("a"), request("b")])
    spool.start(1, "t")
    spool.bury(1, FAILED, "exit code 1 (1 attempt)")
    assert [(job.job_id, job.reason) for job in searched(spool.find_jobs(state=State.DEAD)).value] == [
        (1, "exit code 1 (1 attempt)")
    ]
    assert searched(spool.revive(job_id=2)) == []
    assert searched(spool.revive(job_id=1)) == [1]
    assert searched(spool.revive(job_id=1)) == []
    assert (spool.job(1).attempts, spool.job(1).failures) == (1, 0), "attempts are counted on"
    assert ids(spool.due(9)) == [1, 2]
    assert spool.drop(job_id=2) == [2]
    assert spool.drop(job_id=2) == []
    assert ids(spool.due(9)) == [1]
    assert ids(searched(spool.find_jobs(rule="b")).value) == [2]


def test_rules_of_jobs_that_wait_go_before_those_of_dead_ones(open_spool):
    """At most so many former rules are kept: the latest must not be of dead jobs, while an older one's wait."""
    spool = open_spool()
    spool.enqueue([request("r", snapshot=digest) for digest in ("waits", "dead", "done", "dead later")])
    for job_id in (2, 4):
        spool.bury(job_id, FAILED, "gave up")
    spool.finish(3, FINE)
    assert spool.snapshots(3) == ["waits", "dead later", "dead"]
    assert spool.snapshots(1) == ["waits"]


def test_a_finished_job_cannot_be_retried_dropped_or_recovered(open_spool):
    spool = open_spool()
    spool.enqueue([request("a")])
    spool.start(1, "t")
    spool.finish(1, FINE)
    assert searched(spool.revive(job_id=1)) == []
    assert spool.drop(job_id=1) == []
    assert open_spool().recover() == []


def test_jobs_that_ran_at_a_crash_wait_again(open_spool):
    spool = open_spool()
    spool.enqueue([request("a"), request("a")])
    spool.start(1, "token")
    spool.launched(1, 4711, 99, 1.5)
    again = open_spool()
    (left,) = again.recover()
    assert left.boot_id == again.boot_id
    assert (left.job.job_id, left.attempt_id, left.hook_pid, left.hook_start_ticks) == (1, "token", 4711, 99)
    assert ids(again.due(9)) == [1, 2]
    assert (again.job(1).attempts, again.job(1).failures, again.job(1).latency_ms) == (1, 0, 1.5)


def test_a_hook_that_always_kills_the_daemon_becomes_dead(open_spool, records):
    spool = open_spool()
    spool.enqueue([request("a")])
    for _ in range(MOST_INTERRUPTIONS + 1):
        assert spool.due(9)
        spool.start(1, "t")
        spool = open_spool()
        spool.recover()
    assert spool.counts().dead == 1
    assert records.of("job_dead", job_id=1)


def test_a_retried_job_may_be_interrupted_as_often_as_a_new_one(open_spool):
    """It had many attempts before: those do not count as interruptions after `cnprocctl jobs retry`."""
    spool = open_spool()
    spool.enqueue([request("a")])
    for _ in range(MOST_INTERRUPTIONS):
        spool.start(1, "t")
        spool.interrupt(1)
    spool.start(1, "t")
    spool.bury(1, FAILED, "x")
    assert searched(spool.revive(job_id=1)) == [1]
    spool.start(1, "t")
    again = open_spool()
    again.recover()
    assert ids(again.due(9)) == [1]
    assert (again.job(1).attempts, again.job(1).interruptions) == (MOST_INTERRUPTIONS + 2, 1)


def test_a_postponed_attempt_is_not_counted(open_spool, clock):
    spool = open_spool()
    spool.enqueue([request("a")])
    spool.start(1, "t")
    spool.postpone(1, clock() + NS)
    assert spool.job(1).attempts == 0
    assert spool.next_due_in_s(spool.clock()) == 1


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["enqueue", "start", "finish", "retry", "bury", "interrupt", "revive", "drop", "reopen"]),
        st.integers(1, 6),
    ),
    max_size=40,
)


# As listed in job.py: what each operation makes of a job, by its state before. Any other state stays.
TRANSITIONS = {
    "start": {"waiting": "running"},
    "finish": {"running": "done", "waiting": "done"},
    "bury": {"waiting": "dead", "running": "dead"},
    "retry": {"running": "waiting"},
    "interrupt": {"running": "waiting"},
    "postpone": {"running": "waiting"},
    "revive": {"dead": "waiting"},
    "drop": {"waiting": "dead"},
}
WAY_TO = {"waiting": (), "running": ("start",), "done": ("start", "finish"), "dead": ("start", "bury")}


def operate(spool, operation, job_id):
    match operation:
        case "start":
            spool.start(job_id, "t")
        case "finish":
            spool.finish(job_id, FINE)
        case "bury":
            spool.bury(job_id, FAILED, "x")
        case "revive":
            searched(spool.revive(job_id=job_id))
        case "drop":
            spool.drop(job_id=job_id)
        case "retry" | "postpone":
            arguments = (FAILED, spool.clock()) if operation == "retry" else (spool.clock(),)
            getattr(spool, operation)(job_id, *arguments)
        case _:
            getattr(spool, operation)(job_id)


@pytest.mark.parametrize("operation", TRANSITIONS)
@pytest.mark.parametrize("state", WAY_TO)
def test_each_operation_changes_exactly_the_listed_states(open_spool, state, operation):
    """No operation changes a job that is done: a finished job never runs again."""
    spool = open_spool()
    spool.enqueue([request("a")])
    for step in WAY_TO[state]:
        operate(spool, step, 1)
    assert spool.job(1).state == state
    operate(spool, operation, 1)
    assert spool.job(1).state == TRANSITIONS[operation].get(state, state)
    assert spool._store.waiting == spool.counts().waiting


@given(OPERATIONS)
def test_the_counters_agree_with_the_tables_whatever_is_called(tmp_path_factory, operations):
    directory, clock, log = tmp_path_factory.mktemp("spool"), Clock(), Records()
    spool = Spool.open(directory, log=log, clock=clock)
    done: set[int] = set()
    for name, job_id in operations:
        match name:
            case "enqueue":
                spool.enqueue([request("a", key=str(job_id))])
            case "reopen":
                spool.close()
                spool = Spool.open(directory, log=log, clock=clock)
                spool.recover()
            case _:
                operate(spool, name, job_id)
        counts = spool.counts()
        assert spool._store.waiting == counts.waiting == len(spool.due(99))
        now_done = {job.job_id for job in searched(spool.find_jobs(state=State.DONE)).value}
        assert done <= now_done
        done = now_done
    spool.close()


# -- history -----------------------------------------------------------------------------------------------------


def test_history_is_bounded_by_count_and_age(open_spool, clock):
    spool = open_spool(history_count=3, history_age_s=100)
    spool.enqueue([request("a", key=str(n)) for n in range(8)])
    for job_id in range(1, 6):
        clock.now_ns += NS
        spool.start(job_id, "t")
        spool.finish(job_id, FINE)
    spool.prune()
    assert spool.counts().done == 3
    assert ids(searched(spool.find_jobs(state=State.DONE)).value) == [5, 4, 3]
    clock.now_ns += 100 * NS
    spool.prune()
    assert ids(searched(spool.find_jobs(state=State.DONE)).value) == [5]
    assert spool.counts().waiting == 3
    db = in_file(spool)
    assert db.execute("SELECT count(*) FROM events").fetchone() == (4,)


def past(spool):
    """Return the PIDs of the matches, and the ids of the jobs, that are kept."""
    matches = searched(spool.find_matches(MatchFilter(limit=1000))).value
    return [match.pid for match in matches], ids(searched(spool.find_jobs()).value)


DAY = 86400 * NS


def lived(spool, clock, number, state):
    """A match, and its job that ends."""
    job_id = spool.enqueue([request("a", key=str(number))]).job_ids[0]
    spool.start(job_id, "t")
    spool.finish(job_id, FINE) if state is State.DONE else spool.bury(job_id, FINE, "no")
    spool.record_matches([PastMatch(clock(), "a", None, number, {})])
    spool.prune()


@pytest.mark.parametrize("state", [State.DONE, State.DEAD])
@pytest.mark.parametrize("wrong_days", [30, 10_000, -30, -10_000])
def test_a_clock_that_was_wrong_deletes_no_history(open_spool, clock, state, wrong_days):
    """The clock is wrong at one start, and right at the next: nothing is lost, and nothing is kept for longer."""
    spool = open_spool(history_age_s=7.5 * 86400)
    for number in range(7):  # one a day
        lived(spool, clock, number, state)
        clock.now_ns += DAY
    spool.close()
    clock.offset_ns += wrong_days * DAY
    clock.now_ns += wrong_days * DAY
    spool = open_spool(history_age_s=7.5 * 86400)
    lived(spool, clock, 7, state)
    clock.now_ns += DAY // 24
    lived(spool, clock, 8, state)
    spool.close()
    clock.offset_ns -= wrong_days * DAY
    clock.now_ns -= wrong_days * DAY
    spool = open_spool(history_age_s=7.5 * 86400)
    spool.prune()
    assert past(spool) == ([8, 7, 6, 5, 4, 3, 2, 1, 0], [9, 8, 7, 6, 5, 4, 3, 2, 1])
    for number in range(9, 18):
        clock.now_ns += DAY
        lived(spool, clock, number, state)
    assert set(past(spool)[0]) == {*range(10, 18)}


def test_history_ages_while_the_machine_runs(open_spool, clock):
    """A machine that was off for a year: its history ages only while it runs, and is not kept for ever."""
    spool = open_spool(history_age_s=7 * 86400)
    for number in range(7):
        lived(spool, clock, number, State.DONE)
        clock.now_ns += DAY
    spool.close()
    clock.now_ns += 365 * DAY
    clock.offset_ns += 372 * DAY  # another boot
    spool = open_spool(history_age_s=7 * 86400, boot_id="another")
    spool.prune()
    assert set(past(spool)[0]) == {*range(7)}, "the clock may be wrong"
    for number in range(7, 16):
        clock.now_ns += DAY
        lived(spool, clock, number, State.DONE)
    assert set(past(spool)[0]) == {*range(9, 16)}


def test_history_is_pruned_by_itself(open_spool, clock):
    spool = open_spool(history_count=10)
    for _ in range(60):
        spool.record_matches([PastMatch(clock(), "a", None, n, {}) for n in range(10)])
    spool.sync()
    assert len(searched(spool.find_matches(MatchFilter(limit=1000))).value) == 10


def test_past_matches_are_found_and_forgotten(open_spool, clock):
    spool = open_spool(history_count=3, history_age_s=100)
    now_ns = clock()
    spool.record_matches([PastMatch(now_ns + n, "ab"[n % 2], f"c{n}", n, {"pid": n}) for n in range(6)])
    assert [match.pid for match in searched(spool.find_matches(MatchFilter())).value] == [5, 4, 3, 2, 1, 0]
    assert [match.pid for match in searched(spool.find_matches(MatchFilter(rule="a", limit=2))).value] == [4, 2]
    assert [match.record for match in searched(spool.find_matches(MatchFilter(comm="c3"))).value] == [{"pid": 3}]
    assert [match.pid for match in searched(spool.find_matches(MatchFilter(since_ns=now_ns + 4))).value] == [5, 4]
    spool.prune()
    assert [match.pid for match in searched(spool.find_matches(MatchFilter())).value] == [5, 4, 3]
    clock.now_ns += 101 * NS
    spool.prune()
    assert searched(spool.find_matches(MatchFilter())).value == []


# -- a bad disk --------------------------------------------------------------------------------------------------


def damaged_files(directory):
    return sorted(path.name for path in directory.glob(f"{FILE_NAME}.damaged-*"))


def test_a_file_that_is_not_a_database_is_renamed_and_replaced(tmp_path, open_spool, records):
    (tmp_path / FILE_NAME).write_bytes(b"garbage" * 1000)
    spool = open_spool()
    assert spool.durable
    assert records.of("spool_damaged")
    assert len(damaged_files(tmp_path)) == 1
    spool.enqueue([request("a", key="k")])
    assert open_spool().due(9)[0].job_id > 1_000_000_000_000, "ids of the lost file must not come again"


def test_not_all_damaged_files_are_kept_for_ever(tmp_path, open_spool):
    for number in range(9):
        open_spool().close()
        (tmp_path / FILE_NAME).write_bytes(b"garbage %d" % number * 1000)
    assert open_spool().durable
    assert len(damaged_files(tmp_path)) == 5


def test_a_database_of_another_program_is_renamed_unchanged(tmp_path, open_spool, records):
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("CREATE TABLE cats(name)")
    db.close()
    assert open_spool().durable
    (aside,) = damaged_files(tmp_path)
    assert sqlite3.connect(tmp_path / aside).execute("SELECT count(*) FROM sqlite_schema").fetchone() == (1,)


def test_live_jobs_are_carried_over_from_a_file_damaged_in_part(tmp_path, open_spool, records):
    spool = open_spool()
    spool.enqueue([request("a", {"pid": n, "filler": "x" * 400}) for n in range(200)])
    spool.start(1, "t")
    spool.finish(1, FINE)
    spool.close()
    path = tmp_path / FILE_NAME
    with sqlite3.connect(path) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'due'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(os.urandom(size))
    again = open_spool()
    assert again.durable
    assert records.of("spool_damaged")
    assert again.counts().waiting == 199
    assert again.job(200).events[0]["pid"] == 199


@given(position=st.floats(0, 1), length=st.integers(1, 3000), seed=st.randoms(use_true_random=False))
def test_no_damage_at_all_stops_the_spool(tmp_path_factory, position, length, seed):
    directory, log = tmp_path_factory.mktemp("spool"), Records()
    spool = Spool.open(directory, log=log)
    spool.enqueue([request("a", {"pid": n}) for n in range(30)])
    spool.close()
    path = directory / FILE_NAME
    with path.open("r+b") as file:
        file.seek(int(position * path.stat().st_size))
        file.write(seed.randbytes(length))
    spool = Spool.open(directory, log=log)
    spool.recover()
    spool.enqueue([request("a")])
    ran = []
    # More than one round: damage that is detected only in use makes the spool move to another store, and then jobs
    # appear that a bad index had hidden.
    for _ in range(4):
        for job in spool.due(99):
            spool.start(job.job_id, "t")
            found = spool.job(job.job_id)
            assert found is None or isinstance(found.events, tuple)
            spool.finish(job.job_id, FINE)
            ran.append(job.job_id)
    assert spool.due(99) == []
    assert len(ran) == len(set(ran))
    spool.close()


def in_index(path, name, old, new):
    """Change bytes in the only page of an index; the pages of tables stay."""
    with sqlite3.connect(path) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (name,)).fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    raw = bytearray(path.read_bytes())
    page = raw[(root - 1) * size : root * size]
    assert page.count(old) == 1
    raw[(root - 1) * size : root * size] = page.replace(old, new)
    path.write_bytes(raw)


def test_found_by_fuzzing_an_index_that_names_one_job_twice(tmp_path, open_spool, records):
    spool = open_spool()
    spool.enqueue([request(f"rule-{n}") for n in range(10)])
    spool.close()
    # The entry of job 7 gets the number 3.
    in_index(tmp_path / FILE_NAME, "waiting", b"\x07\x17", b"\x03\x17")
    spool = open_spool()
    assert records.of("spool_damaged")
    assert ids(spool.due(99)) == list(range(1, 11))


def test_found_by_fuzzing_a_done_job_that_is_indexed_as_waiting(tmp_path, open_spool, records, monkeypatch):
    spool = open_spool()
    spool.enqueue([request("a"), request("b")])
    spool.close()
    raw = (tmp_path / FILE_NAME).read_bytes()
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.executescript("DROP INDEX waiting; DROP INDEX due; DROP INDEX gathering; DROP INDEX ended")
        db.execute("UPDATE jobs SET state = 'done', finished_ns = 1 WHERE job_id = 1")
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'jobs'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    table = slice((root - 1) * size, root * size)
    changed = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(raw[: table.start] + changed[table] + raw[table.stop :])
    # As if it were damaged in use: the check at the start of the file does not look.
    real = database._make_or_check
    in_file = "SELECT file != '' FROM pragma_database_list"
    monkeypatch.setattr(database, "_make_or_check", lambda db: db.execute(in_file).fetchone()[0] or real(db))
    spool = open_spool()
    monkeypatch.undo()
    assert ids(spool.due(9)) == [2], "jobs are read from the table"


def test_found_by_fuzzing_a_constraint_that_is_not_utf8(tmp_path, open_spool, records):
    spool = open_spool()
    spool.enqueue([request("a")])
    spool.close()
    flipped(tmp_path / FILE_NAME, b"typeof(kernel_time_ns) IN ('integer'", b"typeof(kernel_time_ns) IN ('inte\xfder'")
    spool = open_spool()
    assert spool.enqueue([request("a")]).job_ids[0]
    spool.start(1, "t")
    assert spool.counts().running == 1
    assert records.of("spool_damaged") or records.of("spool_not_durable")


def flipped(path, old, new):
    raw = path.read_bytes()
    assert old in raw
    assert len(old) == len(new)
    path.write_bytes(raw.replace(old, new))


def test_found_by_fuzzing_a_flipped_state_is_damage(tmp_path, open_spool, records):
    open_spool().enqueue([request("a")])
    open_spool().close()
    flipped(tmp_path / FILE_NAME, b"awaiting", b"awayting")
    spool = open_spool()
    assert records.of("spool_damaged")
    assert spool.counts().waiting == 0


def test_found_by_fuzzing_a_schema_that_is_not_utf8_is_damage(tmp_path, open_spool, records):
    open_spool().close()
    flipped(tmp_path / FILE_NAME, b"CREATE TABLE matches", b"CREATE TABLE\xff\xfematch\xd2")
    assert open_spool().durable
    assert records.of("spool_damaged")


@pytest.mark.parametrize("new", [b'{"pid":12345]', b"[123451234512", b"{\xff\xff\xff\xff\xff:12345}"])
def test_found_by_fuzzing_an_unreadable_record_has_no_events(tmp_path, open_spool, new):
    spool = open_spool()
    spool.enqueue([request("a", {"pid": 12345}), request("a", {"pid": 1})])
    spool.record_matches([PastMatch(1, "a", None, 12345, {"pid": 12345})])
    spool.close()
    flipped(tmp_path / FILE_NAME, b'{"pid":12345}', new)
    spool = open_spool()
    assert spool.durable
    assert spool.job(1).events == ()
    assert spool.job(2).events == ({"pid": 1},)
    assert searched(spool.find_matches(MatchFilter())).value == []


def test_a_full_disk_moves_the_spool_to_memory_and_back(open_spool, records):
    spool = open_spool()
    spool.enqueue([request("a", {"pid": n}) for n in range(3)])
    spool.start(1, "t")
    db = in_file(spool)
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")  # real SQLITE_FULL, as ENOSPC gives
    big = spool.enqueue([request("a", {"pid": 3, "filler": "x" * 100_000})])
    assert not spool.durable
    assert "full" in spool.why
    assert records.of("spool_not_durable")
    assert big.job_ids == (4,)
    assert ids(spool.due(9)) == [2, 3, 4]
    spool.finish(1, FINE)
    spool.start(2, "t")
    spool.bury(2, FAILED, "x")
    assert spool.counts().durable is False
    assert spool.try_durable()
    assert records.of("spool_durable")
    again = open_spool()
    assert {job.job_id: job.state for job in searched(again.find_jobs()).value} == {
        1: "done",
        2: "dead",
        3: "waiting",
        4: "waiting",
    }
    assert again.job(4).events[0]["pid"] == 3


def test_a_file_that_another_process_holds_is_answered_by_memory(tmp_path, open_spool, records):
    open_spool().enqueue([request("a", key="in the file")])
    open_spool().close()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sqlite3,sys; db=sqlite3.connect(sys.argv[1],isolation_level=None);"
            "db.execute('begin exclusive'); print('held',flush=True); sys.stdin.read()",
            str(tmp_path / FILE_NAME),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    spool = open_spool()
    assert not spool.durable
    assert "locked" in spool.why
    spool.enqueue([request("a", key="in memory"), request("a", key="finished")])
    done, waiting = spool.due(9)
    spool.start(waiting.job_id, "t")
    spool.finish(waiting.job_id, FINE)
    assert not spool.try_durable()
    holder.communicate()
    assert spool.try_durable()
    assert [job.job_id for job in open_spool().due(9)] == [1, done.job_id]


def test_no_state_directory_at_all(tmp_path, records):
    spool = Spool.open(tmp_path / "missing", log=records)
    assert not spool.durable
    assert spool.enqueue([request("a")]).job_ids[0]
    (tmp_path / "missing").mkdir()
    assert spool.try_durable()
    spool.close()


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path, open_spool):
    target = tmp_path / "target"
    target.write_bytes(b"")
    (tmp_path / FILE_NAME).symlink_to(target)
    assert not open_spool().durable
    assert target.read_bytes() == b""


def test_the_file_is_ours_alone(tmp_path, open_spool):
    old = os.umask(0)
    try:
        spool = open_spool()
        spool.enqueue([request("a", {"cmdline": "--password=x"})])
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
            (path.name for path in tmp_path.iterdir()), 0o600
        )
    finally:
        os.umask(old)


def test_a_job_known_to_the_file_is_not_doubled_on_return(tmp_path, open_spool, records):
    spool = open_spool()
    spool.enqueue([request("a", key="k")])
    spool.close()
    (tmp_path / FILE_NAME).rename(tmp_path / "elsewhere")
    (tmp_path / FILE_NAME).mkdir()
    spool = open_spool()
    spool.enqueue([request("a", key="k"), request("a", key="new")])
    (tmp_path / FILE_NAME).rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / FILE_NAME)
    assert spool.try_durable()
    assert spool.counts().waiting == 2


def test_a_long_wal_is_moved_into_the_file(tmp_path, open_spool, monkeypatch):
    monkeypatch.setattr("cnprocd.spool.spool_file.MOST_WAL_BYTES", 0)
    spool = open_spool()
    spool.enqueue([request("a") for _ in range(100)])
    spool.sync()
    with sqlite3.connect(f"file:{tmp_path / FILE_NAME}?mode=ro&immutable=1", uri=True) as db:
        assert db.execute("SELECT count(*) FROM jobs").fetchone() == (100,)  # without the WAL: it is in the file
    db.close()


def test_a_record_is_stored_as_json(open_spool):
    spool = open_spool()
    spool.enqueue([request("a", {"pid": 1, "nested": {"a": [1, None, True]}})])
    (text,) = in_file(spool).execute("SELECT record FROM events").fetchone()
    assert json.loads(text) == {"pid": 1, "nested": {"a": [1, None, True]}}


# -- clocks ------------------------------------------------------------------------------------------------------


BOOTS = ["boot", "next boot"]


@pytest.mark.parametrize("boot_id", BOOTS)
@pytest.mark.parametrize("step_ns", [-30 * DAY_NS, 0, 30 * DAY_NS], ids=["back", "right", "forth"])
def test_a_pause_goes_on_exactly_whatever_the_clock_says(open_spool, clock, boot_id, step_ns):
    """A job is waiting, one failed, and one gathers. The wall clock of the next start is a month off, or was.

    Of the pauses of five and of ten seconds, two have passed before the stop. After the start the rest is waited for.
    """
    spool = open_spool()
    spool.enqueue([request("a"), request("a"), request("a", gather=Gather("a", window_s=10))])
    spool.start(2, "t")
    spool.retry(2, FAILED, clock() + 5 * NS)
    clock.now_ns += 2 * NS
    spool.close()
    clock.step(step_ns)
    again = open_spool(boot_id)
    assert ids(again.due(9)) == [1]
    assert again.next_due_in_s(again.clock()) == 3
    clock.now_ns += 3 * NS
    assert ids(again.due(9)) == [1, 2]
    assert again.next_due_in_s(again.clock()) == 5
    clock.now_ns += 5 * NS
    assert ids(again.due(9)) == [1, 2, 3]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_a_damaged_time_makes_no_job_wait_for_ever(due_ns, offset_ns, now_ns):
    """Any bits in the file: the job is due within ten years, in a number that SQLite takes."""
    ours = ClockReading("this boot", 5 * NS, 1_800_000_000 * NS)
    for boot in ("this boot", "another"):
        again_ns = due_again_ns(due_ns, ClockReading(boot, offset_ns, now_ns), ours)
        assert abs(again_ns - ours.now_ns) <= LONGEST_PAUSE_NS
        assert again_ns < 2**63


@pytest.mark.parametrize("glob", ["x" * 100_000, "*a" * 50_000, "\ud800"], ids=["long", "complex", "surrogate"])
def test_a_question_that_sqlite_refuses_harms_no_file(open_spool, records, glob):
    """Users that may only read ask questions. None of them makes the jobs of others less durable."""
    spool = open_spool()
    spool.enqueue([request("a")])
    for found in (
        searched(spool.find_jobs(rule=glob)),
        searched(spool.find_matches(MatchFilter(rule=glob))),
        searched(spool.find_matches(MatchFilter(comm=glob, unit=glob, user=glob))),
    ):
        assert found.value == []
        assert found.why or glob != "\ud800"
    assert (spool.durable, records.all) == (True, [])
    assert ids(spool.due(9)) == [1]


def test_a_pause_goes_on_while_the_daemon_is_down(open_spool, clock):
    spool = open_spool()
    spool.enqueue([request("a", gather=Gather("a", window_s=10))])
    spool.close()
    clock.now_ns += 8 * NS
    assert (again := open_spool()).next_due_in_s(again.clock()) == 2
    clock.now_ns += NS
    assert (again := open_spool("next boot")).next_due_in_s(again.clock()) == 1


def test_jobs_of_a_read_only_file_keep_their_pause(open_spool, clock, tmp_path, monkeypatch):
    """The disk is read-only after a boot. A clock that was a month ahead delays no job of the copy in memory."""
    clock.step(30 * DAY_NS)
    spool = open_spool()
    spool.enqueue([request("a"), request("a", gather=Gather("a", window_s=10))])
    spool.close()
    clock.step(-30 * DAY_NS)
    monkeypatch.setattr("cnprocd.spool.salvage.private_file", refuse)
    again = open_spool("next boot")
    assert not again.durable
    assert ids(again.due(9)) == [1]
    assert again.next_due_in_s(again.clock()) == 10


def refuse(path):
    error = sqlite3.OperationalError("attempt to write a readonly database")
    error.sqlite_errorcode = sqlite3.SQLITE_READONLY
    raise error


def test_a_deadline_counts_ended_attempts_and_their_pauses_only(open_spool, clock):
    """Not an interrupted attempt, not the time of a daemon that is down, and not that of a full queue."""
    limited = dataclasses.replace(HOOK, timeout_s=30.0, deadline_s=5.0, retries=9, backoff=Backoff(1.0, 1.0))
    spool = open_spool()
    spool.enqueue([request("a")])
    spool.start(1, "t")
    clock.now_ns += 6 * NS + NS // 2
    again = open_spool()
    again.recover()
    assert time_left_s(limited, again.job(1)) == 5.0
    again.start(1, "t")
    clock.now_ns += NS
    result = AttemptResult("exit code 1", 1, duration_ms=1000.0)
    following = after_attempt(limited, again.job(1), result, clock(), chance=1.0)
    again.retry(1, result, following.due_ns, following.spent_ns)
    clock.now_ns += 100 * NS
    assert time_left_s(limited, open_spool("next boot").job(1)) == 3.0


def test_a_spool_of_a_newer_cnprocd_is_left_as_it_is(open_spool, records, tmp_path):
    """As after a downgrade. Its jobs wait there for the newer one; new jobs are in memory, and that is reported."""
    spool = open_spool()
    spool.enqueue([request("a")])
    spool.close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        db.execute(f"PRAGMA user_version = {database.SCHEMA_VERSION + 1}")
    before = (tmp_path / FILE_NAME).read_bytes()
    again = open_spool()
    assert again.due(9) == []
    assert "a newer cnprocd made it" in again.why
    assert records.of("spool_not_durable")
    again.enqueue([request("a")])
    again.close()
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME]
