"""Ending a running hook by hand, and the output that is kept with its job."""

import asyncio

import pytest
from unit.hookkit import aio, alive, request, running, shell

from cnprocd.launch.request import AttemptResult, Ending
from cnprocd.rules.ruleset import Backoff
from cnprocd.spool.running import MOST_KEPT_BYTES, KeptOutput

QUICK = Backoff(0.01, 0.01)


@aio
async def test_a_killed_job_is_dead_whatever_retries_are_left(tmp_path):
    hooks = {"r": shell("echo started; exec sleep 1000", retries=5, backoff=QUICK)}
    async with running(tmp_path, hooks) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.until(lambda: records.of("hook_output", line="started"))
        assert scheduler.output(1) == "started\n"
        (hook,) = scheduler.running()
        assert scheduler.kill(1, retry=False)
        await records.ended(1)
        assert not alive(hook.hook_pid)
        job = spool.job(1)
        assert (str(job.state), job.reason, job.failures) == ("dead", "killed by an operator", 1)
        (failed,) = records.of("hook_failed")
        assert (failed["will_retry"], failed["reason"]) == (False, "killed by an operator")
        assert ((await spool.find_output(1)).value, scheduler.output(1)) == ("started\n", None)
        assert not scheduler.kill(1, retry=False)


@aio
async def test_a_killed_job_is_retried_if_asked(tmp_path):
    flag = tmp_path / "second"
    script = f"if [ -e {flag} ]; then echo again; else touch {flag}; echo started; exec sleep 1000; fi"
    async with running(tmp_path, {"r": shell(script, retries=1, backoff=QUICK)}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.until(lambda: records.of("hook_output", line="started"))
        assert scheduler.kill(1, retry=True)
        await records.ended(1)
        job = spool.job(1)
        assert (str(job.state), job.failures, job.attempts) == ("done", 1, 2)
        assert (await spool.find_output(1)).value == "again\n"


class Attempt:
    """An attempt that ends in a given way when it is to be ended."""

    pid, start_ticks, latency_ms, silent, running_s = 0, None, None, False, 0.0

    def __init__(self, asked, ending):
        self.request = asked
        self._ending = asyncio.get_running_loop().create_future()
        self.terminate = lambda grace_s: self._ending.set_result(ending)

    async def wait(self, emit, launched):
        return await self._ending


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize(
    ("ending", "else_"),
    [
        (Ending(AttemptResult("interrupted"), interrupted=True), "waiting"),
        (Ending(AttemptResult("the runner closed the connection"), not_started=True), "waiting"),
        (Ending(AttemptResult("cnprocd stops"), left_running=True), "running"),
        (Ending(AttemptResult("exit code 1", 1)), "waiting"),
        (Ending(AttemptResult(None, 0)), "done"),
    ],
    ids=["interrupted", "not started", "left running", "failed", "succeeded"],
)
@aio
async def test_a_kill_holds_however_the_attempt_ends(tmp_path, ending, else_, retry):
    """The runner can fail, or the daemon stop, between the command and the signal."""
    async with running(tmp_path, {"r": shell("true", retries=5, backoff=Backoff(100, 100))}) as (spool, scheduler, _):
        scheduler.launcher.launch = lambda asked, announce: Attempt(asked, ending)
        spool.enqueue([request("r")])
        scheduler.wake()
        assert scheduler.kill(1, retry=retry)
        async with asyncio.timeout(10):
            while scheduler.running():
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        job = spool.job(1)
        expected = else_ if retry or else_ == "done" else "dead"
        assert (str(job.state), job.reason) == (expected, "killed by an operator" if expected == "dead" else job.reason)


@aio
async def test_a_job_that_does_not_run_cannot_be_killed(tmp_path):
    async with running(tmp_path, {"r": shell("true")}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        assert not scheduler.kill(1, retry=False)
        scheduler.wake()
        await records.ended(1)
        assert not scheduler.kill(1, retry=False)
        assert str(spool.job(1).state) == "done"


@aio
async def test_the_last_attempts_output_replaces_the_former(tmp_path):
    flag = tmp_path / "second"
    script = f"if [ -e {flag} ]; then exit 0; fi; touch {flag}; echo noise; exit 3"
    async with running(tmp_path, {"r": shell(script, retries=1, backoff=QUICK)}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.until(lambda: records.of("hook_failed"))
        assert (await spool.find_output(1)).value == "noise\n"
        await records.ended(1)
        assert (await spool.find_output(1)).value is None


@aio
async def test_kept_output_follows_the_output_limit(tmp_path):
    hooks = {"r": shell("yes x | head -c 100000", output_limit_bytes=1000)}
    async with running(tmp_path, hooks) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        assert 900 <= len((await spool.find_output(1)).value) <= 1100


def test_kept_output_is_whole_lines_within_its_bound():
    kept = KeptOutput(10)
    for line in ("12345", "678", "9", "x"):
        kept.add(line)
    assert kept.text == "12345\n678\n[further output is not kept]\n"
    assert KeptOutput(100).text == ""
    large = KeptOutput(1 << 30)
    for _ in range(200):
        large.add("x" * 4095)
    assert len(large.text) <= MOST_KEPT_BYTES + 100
