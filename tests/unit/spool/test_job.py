"""job.py: what follows an attempt, and every pause and deadline as arithmetic."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.hookkit import HOOK

from cnprocd.launch.request import AttemptResult
from cnprocd.rules.ruleset import Backoff
from cnprocd.spool.job import (
    MOST_INTERRUPTIONS,
    NS,
    Job,
    State,
    after_attempt,
    after_interruption,
    pause_s,
    serialize_key,
    time_left_s,
)

FAILED = AttemptResult("exit code 1", exit_code=1)
FINE = AttemptResult(None, exit_code=0)
CHANCE = st.floats(0, 1)


def job(**more):
    base = Job(1, "r", State.RUNNING, None, None, "boot", 0, 0, attempts=1, failures=0, event_count=1)
    return dataclasses.replace(base, **more)


def hook(**more):
    return dataclasses.replace(HOOK, **more)


@given(st.integers(0, 5), st.lists(CHANCE, min_size=10, max_size=10))
def test_a_job_that_always_fails_runs_once_more_than_its_retries(retries, chances):
    wanted, one, now_ns, attempts = hook(retries=retries), job(), 0, 0
    for chance in chances:
        attempts += 1
        following = after_attempt(wanted, one, FAILED, now_ns, chance)
        if following.state is State.DEAD:
            break
        assert following.due_ns >= now_ns
        now_ns = following.due_ns
        one = dataclasses.replace(one, failures=one.failures + 1, attempts=one.attempts + 1)
    assert attempts == retries + 1
    assert following.state is State.DEAD
    assert "exit code 1" in following.reason


@given(st.floats(0.01, 100), st.floats(1, 1000), st.integers(1, 10_000), CHANCE)
def test_a_pause_is_within_its_doubling_and_never_nothing(initial_s, factor, failures, chance):
    backoff = Backoff(initial_s, initial_s * factor)
    pause = pause_s(backoff, failures, chance)
    cap = min(backoff.max_s, initial_s * 2 ** min(failures - 1, 60))
    assert 0.1 * cap * 0.999 <= pause <= cap * 1.001
    assert pause_s(backoff, failures, 0.0) < pause_s(backoff, failures, 1.0)


def test_jitter_is_what_spreads_jobs_that_failed_together():
    pauses = {pause_s(Backoff(1, 300), 5, chance / 100) for chance in range(100)}
    assert len(pauses) == 100
    assert max(pauses) - min(pauses) > 10


def test_a_job_with_success_is_done():
    assert after_attempt(hook(), job(), FINE, 5, 0.5).state is State.DONE


@given(st.integers(0, 1 << 62))
def test_lateness_never_takes_away_the_first_attempt(due_ns):
    assert time_left_s(hook(timeout_s=30, deadline_s=10), job(due_ns=due_ns)) == 10
    assert time_left_s(hook(timeout_s=30), job(due_ns=due_ns)) == 30


@given(st.floats(0.1, 100), st.floats(0.1, 100), CHANCE)
def test_no_retry_starts_after_the_deadline_and_none_outlasts_it(deadline_s, elapsed_s, chance):
    wanted = hook(retries=100, deadline_s=deadline_s)
    failed = dataclasses.replace(FAILED, duration_ms=elapsed_s * 1e3)
    following = after_attempt(wanted, job(), failed, 7, chance)
    if following.state is State.WAITING:
        pause_s = (following.due_ns - 7) / NS
        left_s = time_left_s(wanted, job(spent_ns=following.spent_ns))
        assert 0 < left_s <= deadline_s - elapsed_s - pause_s + 1e-6
    else:
        assert "deadline" in following.reason


def test_interruptions_use_up_no_retry_but_are_bounded():
    assert after_interruption(job(attempts=1), 7).state is State.WAITING
    assert after_interruption(job(attempts=9, interruptions=MOST_INTERRUPTIONS - 1), 7).due_ns == 7
    worn = after_interruption(job(interruptions=MOST_INTERRUPTIONS), 7)
    assert worn.state is State.DEAD
    assert after_attempt(hook(retries=1), job(attempts=10, failures=0), FAILED, 0, 0).state is State.WAITING


@pytest.mark.parametrize("comm", ["", "x", "a/comm=b", "/"])
def test_serialize_keys_of_different_rules_never_meet(comm):
    assert serialize_key("none", "a", comm) is None
    assert serialize_key("comm", "a", comm) != serialize_key("rule", "a", comm)
    assert serialize_key("comm", "a", comm) != serialize_key("comm", "a.b", comm)
    assert serialize_key("comm", "a", "x") != serialize_key("comm", "a", "y")


def test_an_unknown_comm_is_not_equal_to_another():
    assert serialize_key("comm", "a", None) is None
    assert serialize_key("comm", "a", "") is not None
