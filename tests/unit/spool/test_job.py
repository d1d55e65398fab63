"""job.py: the life of a job as a table, and every pause and deadline as arithmetic."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.spool.job import (
    MOST_INTERRUPTIONS,
    NS,
    TRANSITIONS,
    Attempt,
    Backoff,
    Happening,
    HookSpec,
    Job,
    State,
    after,
    after_attempt,
    after_interruption,
    pause_s,
    serialize_key,
    time_left_s,
)

FAILED = Attempt("exit code 1", exit_code=1)
FINE = Attempt(None, exit_code=0)
CHANCE = st.floats(0, 1)


def job(**more):
    base = Job(1, "r", State.RUNNING, None, None, "boot", 0, 0, attempts=1, failures=0, event_count=1)
    return dataclasses.replace(base, **more)


def spec(**more):
    return dataclasses.replace(HookSpec("r", ()), **more)


def test_every_state_can_be_left_but_done_and_every_path_ends():
    assert set(TRANSITIONS) == set(State)
    assert not TRANSITIONS[State.DONE]
    assert after(State.WAITING, Happening.SUCCEEDED) is None
    reachable = {State.WAITING}
    for _ in State:
        reachable |= {to for state in reachable for to in TRANSITIONS[state].values()}
    assert reachable == set(State)


@given(st.lists(st.sampled_from(Happening), max_size=30))
def test_a_finished_job_never_runs_again_whatever_happens(happenings):
    state, was_done = State.WAITING, False
    for happening in happenings:
        state = after(state, happening) or state
        assert not (was_done and state is not State.DONE)
        was_done = was_done or state is State.DONE


@given(st.integers(0, 5), st.lists(CHANCE, min_size=10, max_size=10))
def test_a_job_that_always_fails_runs_once_more_than_its_retries(retries, chances):
    hook, one, now_ns, tries = spec(retries=retries), job(), 0, 0
    for chance in chances:
        tries += 1
        following = after_attempt(hook, one, FAILED, now_ns, chance)
        if following.happening is Happening.GAVE_UP:
            break
        assert following.due_ns >= now_ns
        now_ns = following.due_ns
        one = dataclasses.replace(one, failures=one.failures + 1, attempts=one.attempts + 1)
    assert tries == retries + 1
    assert following.happening is Happening.GAVE_UP
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
    assert after_attempt(spec(), job(), FINE, 5, 0.5).happening is Happening.SUCCEEDED


@given(st.integers(0, 1 << 62))
def test_lateness_alone_never_takes_away_the_first_try(now_ns):
    hook = spec(timeout_s=30, deadline_s=10)
    assert time_left_s(hook, job(first_started_ns=None), now_ns) == 10
    assert time_left_s(spec(timeout_s=30), job(first_started_ns=None), now_ns) == 30


@given(st.floats(0.1, 100), st.floats(0.1, 100), CHANCE)
def test_no_retry_starts_after_the_deadline_and_none_outlasts_it(deadline_s, elapsed_s, chance):
    hook = spec(retries=100, deadline_s=deadline_s)
    one, now_ns = job(first_started_ns=0), int(elapsed_s * NS)
    following = after_attempt(hook, one, FAILED, now_ns, chance)
    if following.happening is Happening.FAILED:
        assert following.due_ns < deadline_s * NS
        assert time_left_s(hook, one, following.due_ns) <= deadline_s - following.due_ns / NS + 1e-6
    else:
        assert "deadline" in following.reason


def test_an_interrupted_try_uses_up_no_retry_but_not_for_ever():
    assert after_interruption(job(attempts=1), 7).happening is Happening.INTERRUPTED
    assert after_interruption(job(attempts=9, failures=9 - MOST_INTERRUPTIONS), 7).due_ns == 7
    worn = after_interruption(job(attempts=MOST_INTERRUPTIONS + 1), 7)
    assert worn.happening is Happening.GAVE_UP
    assert after_attempt(spec(retries=1), job(attempts=10, failures=0), FAILED, 0, 0).happening is Happening.FAILED


@pytest.mark.parametrize("comm", ["", "x", "a/comm=b", "/", None])
def test_serialize_keys_of_different_rules_never_meet(comm):
    assert serialize_key("none", "a", comm) is None
    assert serialize_key("comm", "a", comm) != serialize_key("rule", "a", comm)
    assert serialize_key("comm", "a", comm) != serialize_key("comm", "a.b", comm)
    assert serialize_key("comm", "a", "x") != serialize_key("comm", "a", "y")
