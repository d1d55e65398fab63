"""Ending a running hook by hand, and the output that is kept with its job."""

from unit.hookkit import aio, alive, request, running, shell

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
