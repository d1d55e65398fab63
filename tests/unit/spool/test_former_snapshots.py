"""Hooks of former rules are found beside the loop; until then their jobs wait, and no others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from unit.hookkit import Records, aio, request, running, shell

from cnprocd.rules.problems import Problem, RulesError
from cnprocd.spool import former_rules
from cnprocd.spool.promises import NO_RULE

OLD, NEW = "1" * 64, "2" * 64


class Snapshots:
    """Snapshots on a disk that answers when the test lets it. Each look fails as often as `failures` says."""

    def __init__(self, hooks, failures=0):
        self.hooks = hooks
        self.failures = failures
        self.answers = asyncio.Event()
        self.looked_for = []

    async def load(self, digests):
        self.looked_for.append(set(digests))
        await self.answers.wait()
        if self.failures:
            self.failures -= 1
            raise RulesError([Problem(Path("rules"), 0, 0, "the disk does not answer")])
        return {digest: hooks for digest, hooks in self.hooks.items() if digest in digests}


async def looked(scheduler, spool, snapshots):
    """As when the spool's file became usable, with jobs that the memory did not have."""
    scheduler.former.load = snapshots.load
    spool.enqueue([request("gone", snapshot=OLD), request("here", snapshot=NEW)])
    scheduler._recover()
    async with asyncio.timeout(10):
        while not snapshots.looked_for:
            await asyncio.sleep(0)


@aio
async def test_former_jobs_wait_for_their_rules_others_run(tmp_path):
    async with running(tmp_path, {"here": shell("true")}, snapshot=NEW) as (spool, scheduler, records):
        snapshots = Snapshots({OLD: {"gone": shell("echo promised")}})
        await looked(scheduler, spool, snapshots)
        await records.ended(2)
        assert spool.counts().waiting == 1
        snapshots.answers.set()
        await records.ended(1)
        assert records.of("hook_output", job_id=1)[0]["line"] == "promised"
        assert snapshots.looked_for == [{OLD}]


@aio
async def test_a_job_is_dead_if_its_snapshot_does_not_exist(tmp_path):
    async with running(tmp_path, {"here": shell("true")}, snapshot=NEW) as (spool, scheduler, records):
        snapshots = Snapshots({})
        snapshots.answers.set()
        await looked(scheduler, spool, snapshots)
        await records.ended(1, 2)
        assert records.of("job_dead", job_id=1)[0]["reason"] == NO_RULE


@aio
async def test_a_disk_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(former_rules, "RETRY_S", 0.01)
    async with running(tmp_path, {"here": shell("true")}, snapshot=NEW) as (spool, scheduler, records):
        snapshots = Snapshots({OLD: {"gone": shell("true")}}, failures=2)
        snapshots.answers.set()
        await looked(scheduler, spool, snapshots)
        await records.ended(1, 2)
        assert records.of("hook_finished", job_id=1)
        assert len(records.of("former_rules_unread")) == 2


@pytest.mark.parametrize("answers", [False, True], ids=["silent disk", "pause"])
def test_a_stop_does_not_wait_for_former_rules(tmp_path, answers):
    """The jobs wait in the spool."""

    async def scene():
        records = Records()
        async with running(tmp_path, {}, records=records, snapshot=NEW) as (spool, scheduler, _):
            snapshots = Snapshots({}, failures=1)
            if answers:
                snapshots.answers.set()
            await looked(scheduler, spool, snapshots)
            if answers:
                await records.until(lambda: records.of("former_rules_unread"))
            await asyncio.wait_for(scheduler.stop(0), 10)
            assert spool.counts().waiting == 2

    asyncio.run(scene())
