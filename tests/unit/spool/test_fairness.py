"""One rule's flood harms that rule alone: what a full queue drops, and whose hook starts next."""

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.hookkit import Clock, Records, aio, hook, request, running, shell

from cnprocd.launch.request import AttemptResult
from cnprocd.spool.job import Gather, State
from cnprocd.spool.queues import FULL
from cnprocd.spool.rows import Keep, RuleQueue
from cnprocd.spool.spool import Spool


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def spool_of(tmp_path, records):
    """Return a function that opens a spool with a queue limit."""
    opened = []

    def make(limit):
        opened.append(Spool.open(tmp_path, log=records, keep=Keep(limit)))
        return opened[-1]

    yield make
    for spool in opened:
        spool.close()


def batch(rule, count, **more):
    return [request(rule, **more) for _ in range(count)]


# -- a full queue ------------------------------------------------------------------------------------------------


def test_a_flood_drops_its_own_jobs_only(spool_of, records):
    """queue_limit 30: 60 jobs of A, then one of B. A's newest job makes room for B's."""
    spool = spool_of(30)
    flood = spool.enqueue(batch("a", 60))
    assert flood.shed_by_rule == {"a": 30}
    result = spool.enqueue(batch("b", 1))
    assert (result.job_ids, result.shed_by_rule, result.made_room) == ((31,), {"a": 1}, (30,))
    assert {rule: queue.waiting for rule, queue in spool.queues().items()} == {"a": 29, "b": 1}
    assert spool.counts().shed == 31
    assert spool.shedding.by_rule == {"a": 31}
    assert "30 of a" in records.of("queue_full")[0]["message"]


def test_a_job_that_made_room_is_dead_with_its_reason(spool_of):
    spool = spool_of(3)
    spool.enqueue(batch("a", 3))
    spool.enqueue(batch("b", 1))
    dropped = spool.job(3)
    assert (dropped.state, dropped.reason) == (State.DEAD, FULL)
    assert (spool.counts().waiting, spool.counts().dead) == (3, 1)
    spool.close()
    again = spool_of(3)
    assert [job.job_id for job in again.due(9)] == [1, 2, 4], "it does not come back after a restart"


def test_two_floods_end_with_equal_shares(spool_of):
    spool = spool_of(30)
    spool.enqueue(batch("a", 60))
    spool.enqueue(batch("b", 60))
    spool.enqueue(batch("a", 60))
    assert {rule: queue.waiting for rule, queue in spool.queues().items()} == {"a": 15, "b": 15}


@given(st.lists(st.sampled_from("aaaabbc"), max_size=60), st.integers(1, 12), st.integers(1, 7))
def test_no_rule_below_its_share_loses_a_job(tmp_path_factory, arrivals, limit, size):
    """Of n rules, each keeps its jobs up to limit/n, whatever the others do; the limit holds; counts agree."""
    spool = Spool.open(tmp_path_factory.mktemp("spool"), log=Records(), keep=Keep(limit))
    try:
        for start in range(0, len(arrivals), size):
            spool.enqueue([request(rule) for rule in arrivals[start : start + size]])
            queues = {rule: queue.waiting for rule, queue in spool.queues().items()}
            so_far = arrivals[: start + size]
            assert sum(queues.values()) == spool.counts().waiting == min(limit, len(so_far))
            share = limit // max(1, len(set(so_far)))
            for rule in set(so_far):
                assert queues.get(rule, 0) >= min(share, so_far.count(rule))
                assert queues.get(rule, 0) + spool.shedding.by_rule[rule] == so_far.count(rule)
    finally:
        spool.close()


def test_queues_have_a_length_and_the_age_of_the_oldest(spool_of):
    spool = spool_of(30)
    spool.clock = Clock()
    spool.enqueue(batch("a", 2))
    spool.clock.now_ns += 5_000_000_000
    spool.enqueue(batch("b", 1))
    assert spool.queues() == {"a": RuleQueue(2, 5.0), "b": RuleQueue(1, 0.0)}
    assert spool.waiting_rules() == {"a": 1, "b": 3}


# -- turns -------------------------------------------------------------------------------------------------------


def started_rules(records):
    return [fields["rule"] for fields in records.of("hook_started")]


@aio
async def test_another_rule_starts_within_one_turn_of_10_000_jobs(tmp_path):
    """With four slots and 10,000 waiting jobs of A, B's hook starts when the next hook of A ends."""
    async with running(tmp_path, {"a": hook("/bin/sleep", "0.1"), "b": hook("/bin/true")}) as (
        spool,
        scheduler,
        records,
    ):
        spool.enqueue(batch("a", 10_000))
        scheduler.wake()
        await records.until(lambda: len(records.of("hook_finished")) >= 4)
        before, began = len(started_rules(records)), time.monotonic()
        (job_id,) = spool.enqueue(batch("b", 1)).job_ids
        scheduler.wake()
        await records.until(lambda: "b" in started_rules(records))
        turns = started_rules(records).index("b") - before
        waited_ms = (time.monotonic() - began) * 1000
        print(f"with {spool.queues()['a'].waiting} jobs of another rule waiting: started after {turns} hooks of it,")
        print(f"{waited_ms:.0f} ms; its hooks take 100 ms each in 4 slots")
        assert turns <= 4, "at most the hooks that were being started"
        await records.ended(job_id)


@aio
async def test_rules_share_the_slots_equally(tmp_path):
    """A's 20 jobs came before B's 20. With one slot their hooks take turns."""
    hooks = {"a": hook("/bin/true"), "b": hook("/bin/true")}
    async with running(tmp_path, hooks, slots=1) as (spool, scheduler, records):
        spool.enqueue(batch("a", 20) + batch("b", 20))
        scheduler.wake()
        await records.ended(*range(1, 41))
        assert started_rules(records) == ["a", "b"] * 20


@aio
async def test_guaranteed_slots_are_kept_free(tmp_path):
    """A's hooks never end, and there are many. A slot is free for B at once, whenever its job comes."""
    hooks = {"a": hook("/bin/sleep", "1000"), "b": hook("/bin/true", slots=1)}
    async with running(tmp_path, hooks, slots=3, guaranteed={"b": 1}) as (spool, scheduler, records):
        spool.enqueue(batch("a", 10))
        scheduler.wake()
        await records.until(lambda: len(records.of("hook_started")) == 2)
        for _ in range(3):
            (job_id,) = spool.enqueue(batch("b", 1)).job_ids
            scheduler.wake()
            await records.ended(job_id)
        assert started_rules(records).count("a") == 2


@aio
async def test_keys_of_one_rule_take_turns(tmp_path):
    """One slot: 50 jobs of the key x wait, then one of y comes. It is next but one, not last."""
    os.mkfifo(tmp_path / "gate")
    end = os.open(tmp_path / "gate", os.O_RDWR)
    try:
        async with running(tmp_path, {"r": shell(f"read line < {tmp_path}/gate")}, slots=1) as (
            spool,
            scheduler,
            records,
        ):
            spool.enqueue(batch("r", 50, serialize_key="r/comm=x"))
            scheduler.wake()
            await records.until(lambda: records.of("hook_started"))
            (late,) = spool.enqueue(batch("r", 1, serialize_key="r/comm=y")).job_ids
            os.write(end, b"\n" * 51)
            await records.ended(late)
            order = [fields["job_id"] for fields in records.of("hook_started")]
            assert order.index(late) == 2
            xs = [job_id for job_id in order if job_id != late]
            assert xs == sorted(xs), "jobs of one key keep their order"
    finally:
        os.close(end)


# -- order within a serialize key --------------------------------------------------------------------------------


def started_jobs(records):
    return [fields["job_id"] for fields in records.of("hook_started")]


@aio
async def test_a_postponed_job_is_not_passed_within_its_key(tmp_path, monkeypatch):
    """Its attempt could not be started. Younger jobs of its key wait for it, another key does not."""
    async with running(tmp_path, {"r": hook("/bin/true")}) as (spool, scheduler, records):
        launch, missing = scheduler.launcher.launch, [True]

        def lacking(one, announce):
            if one.job_id == 1 and missing:
                raise OSError(missing.pop(), "no process")
            return launch(one, announce)

        monkeypatch.setattr(scheduler.launcher, "launch", lacking)
        spool.enqueue(batch("r", 2, serialize_key="r/a") + batch("r", 1, serialize_key="r/b"))
        scheduler.wake()
        await records.ended(1, 2, 3)
        assert scheduler.totals.postponed == 1
        assert started_jobs(records) == [3, 1, 2]


@aio
async def test_a_new_job_does_not_pass_the_backlog_of_its_key(tmp_path):
    """With one slot new jobs go first, but not before an older one of their key."""
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue(batch("r", 2, serialize_key="r/a") + batch("r", 1))
    spool.close()
    async with running(tmp_path, {"r": hook("/bin/true")}, slots=1) as (spool, scheduler, records):
        spool.enqueue(batch("r", 1, serialize_key="r/a") + batch("r", 1))
        scheduler.wake()
        await records.ended(1, 2, 3, 4, 5)
        keyed = [job for job in started_jobs(records) if job in (1, 2, 4)]
        assert keyed == [1, 2, 4]


def test_a_postponed_job_is_due_after_a_restart(spool_of):
    """It has not failed, and gathers nothing. A job that waits for a retry or gathers events waits on."""
    spool = spool_of(30)
    spool.enqueue([*batch("r", 2), *batch("r", 1, gather=Gather("r", 60.0))])
    for job_id in (1, 2):
        spool.start(job_id, "a" * 32)
    far_ns = spool.clock() + 60 * 10**9
    spool.postpone(1, far_ns)
    spool.retry(2, AttemptResult("exit code 1"), far_ns)
    spool.close()
    again = spool_of(30)
    assert [job.job_id for job in again.due(9)] == [1]
