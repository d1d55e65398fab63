"""scheduler.py over a real spool with real children: order, results and recovery."""

import asyncio
import itertools
import os
import signal
import sys

import pytest
from unit.hookkit import PATIENCE_S, Records, aio, alive, hook, request, running, shell, zombies

from cnprocd import names as names_module
from cnprocd.launch.user import resolve_user
from cnprocd.names import Names, NameServiceSilentError
from cnprocd.rules.ruleset import Backoff, RuleLog
from cnprocd.spool import pauses
from cnprocd.spool import scheduler as scheduler_module
from cnprocd.spool.job import NS, Gather, State
from cnprocd.spool.spool import Spool

SOON = Backoff(0.01, 0.02)


def line_of(records, event, **wanted):
    (fields,) = records.of(event, **wanted)
    return fields


def order_of(records, event="hook_started"):
    return [fields["job_id"] for fields in records.of(event)]


@aio
async def test_a_hook_runs_and_its_record_says_how(tmp_path):
    calls = []
    async with running(
        tmp_path,
        {"r": shell('echo "$CNPROCD_COMM"; cat')},
        before_start=lambda: calls.append("before"),
        on_started=lambda pid, job: calls.append(("started", pid, job)),
        on_finished=lambda pid, job: calls.append(("finished", pid, job)),
    ) as (spool, scheduler, records):
        assert spool.enqueue([request("r", {"pid": 42, "comm": "ora_pmon"})]).job_ids == (1,)
        scheduler.wake()
        assert [one.job_id for one in scheduler.running()] == [1], "the first starts before wake() returns"
        await records.ended(1)
        started, finished = line_of(records, "hook_started"), line_of(records, "hook_finished")
        assert (started["job_id"], started["rule"], started["pid"], started["attempt"]) == (1, "r", 42, 1)
        assert 0 < started["latency_ms"] < PATIENCE_S * 1000
        assert (finished["exit_code"], finished["signal"], finished["reason"]) == (0, None, None)
        assert finished["hook_pid"] == started["hook_pid"]
        assert [fields["line"] for fields in records.of("hook_output", job_id=1)] == [
            "ora_pmon",
            '{"pid": 42, "comm": "ora_pmon", "job_id": 1}',
        ]
        pid = started["hook_pid"]
        assert calls == ["before", ("started", pid, 1), ("finished", pid, 1)]
        job = spool.job(1)
        assert (job.state, job.exit_code, job.latency_ms) == (State.DONE, 0, started["latency_ms"])
        assert scheduler.latency.count == 1
        assert (scheduler.totals.started, scheduler.totals.succeeded) == (1, 1)
        assert scheduler.running() == []
    assert zombies() == []


@aio
async def test_a_failing_hook_is_retried_and_then_dead(tmp_path):
    failing = shell("exit 255", retries=1, backoff=SOON, on_failure=RuleLog(level="critical", message=None))
    async with running(tmp_path, {"r": failing}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        first, second = records.of("hook_failed")
        assert (first["exit_code"], first["will_retry"]) == (255, True)
        assert (second["exit_code"], second["will_retry"], second["attempt"]) == (255, False, 2)
        level, _, dead = next(entry for entry in records.all if entry[1] == "job_dead")
        assert level == "critical"
        assert dead["reason"].endswith("(2 attempts)")
        assert (spool.job(1).state, spool.job(1).attempts) == (State.DEAD, 2)


@aio
async def test_a_job_that_failed_once_may_succeed_later(tmp_path):
    spec = shell('test "$CNPROCD_ATTEMPT" = 3', retries=5, backoff=SOON)
    async with running(tmp_path, {"r": spec}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        assert spool.job(1).attempts == 3
        assert scheduler.totals.failed == 2


@aio
async def test_a_dead_letters_message_is_rendered_for_people(tmp_path):
    message = hook("{comm} was not cleaned up").command[0]
    async with running(tmp_path, {"r": hook("/bin/false", on_failure=RuleLog(level="error", message=message))}) as (
        spool,
        scheduler,
        records,
    ):
        spool.enqueue([request("r", {"pid": 1, "comm": "x"})])
        scheduler.wake()
        await records.ended(1)
        assert line_of(records, "job_dead")["message"] == "x was not cleaned up"


@aio
async def test_a_hook_over_its_time_limit_is_ended_with_its_group(tmp_path):
    script = "sleep 1000 & echo $!; setsid sleep 1000 & echo $!; wait"
    async with running(tmp_path, {"r": shell(script, timeout_s=0.3)}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        failed = line_of(records, "hook_failed")
        assert failed["reason"] == "timed out after 0.3 s"
        pids = [int(fields["line"]) for fields in records.of("hook_output")]
        assert len(pids) == 2
        assert not [pid for pid in pids if alive(pid)]
    assert zombies() == []


@aio
async def test_a_hook_that_ignores_term_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("cnprocd.launch.attempt.TERM_GRACE_S", 0.1)
    spec = shell("trap '' TERM; while :; do sleep 1000; done", timeout_s=0.2)
    async with running(tmp_path, {"r": spec}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        assert line_of(records, "hook_failed")["signal"] == signal.SIGKILL


@aio
async def test_the_deadline_bounds_the_attempt_and_the_retries(tmp_path):
    spec = shell("sleep 1000", timeout_s=1000, deadline_s=0.3, retries=50, backoff=Backoff(0.001, 0.001))
    async with running(tmp_path, {"r": spec}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        assert "deadline" in line_of(records, "job_dead")["reason"]


@aio
async def test_what_a_failed_hook_leaves_behind_is_ended_with_it(tmp_path):
    async with running(tmp_path, {"r": shell("setsid sleep 1000 & echo $!; exit 3")}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        assert line_of(records, "hook_failed")["reason"] == "exit code 3"
        assert not alive(int(line_of(records, "hook_output")["line"]))


@aio
async def test_what_a_hook_that_succeeded_leaves_behind_lives_on(tmp_path):
    async with running(tmp_path, {"r": shell("sleep 1000 & echo $!")}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        pid = int(line_of(records, "hook_output")["line"])
        assert alive(pid)
        os.kill(pid, signal.SIGKILL)


# -- order and slots --------------------------------------------------------------------------------------------


class Gate:
    """Hooks that wait until the test releases them: they read a FIFO."""

    def __init__(self, directory, name="gate"):
        self.path = directory / name
        os.mkfifo(self.path)
        self._end = os.open(self.path, os.O_RDWR)

    def hook(self, **more):
        return shell(f"read line <{self.path}", **more)

    def release(self, count=1):
        os.write(self._end, b"\n" * count)


@pytest.fixture
def gate(tmp_path):
    return Gate(tmp_path)


@aio
async def test_no_more_than_the_slots_run_and_the_oldest_go_first(tmp_path, gate):
    async with running(tmp_path, {"r": gate.hook()}, slots=3) as (spool, scheduler, records):
        spool.enqueue([request("r") for _ in range(7)])
        scheduler.wake()
        for done in range(8):
            expected = min(3 + done, 7)
            await records.until(lambda n=expected: len(records.of("hook_started")) == n)
            assert len(scheduler.running()) == min(3, 7 - done)
            gate.release()
            await records.until(lambda n=done: len(records.of("hook_finished")) == min(n + 1, 7))
        assert sorted(order_of(records)) == list(range(1, 8))
        assert spool.counts().done == 7


@aio
async def test_jobs_of_one_slot_run_in_the_order_of_their_age(tmp_path):
    async with running(tmp_path, {"r": hook("/bin/true")}, slots=1) as (spool, scheduler, records):
        spool.enqueue([request("r") for _ in range(20)])
        scheduler.wake()
        await records.ended(*range(1, 21))
        assert order_of(records) == order_of(records, "hook_finished") == list(range(1, 21))


@aio
async def test_a_rule_has_its_own_slots_and_does_not_hold_up_others(tmp_path, gate):
    async with running(tmp_path, {"slow": gate.hook(slots=1), "quick": hook("/bin/true")}, slots=4) as (
        spool,
        scheduler,
        records,
    ):
        spool.enqueue([request("slow") for _ in range(3)] + [request("quick") for _ in range(3)])
        scheduler.wake()
        await records.ended(4, 5, 6)
        assert [one.job_id for one in scheduler.running()] == [1]
        gate.release(3)
        await records.ended(1, 2, 3)


@aio
async def test_serialised_jobs_never_overlap(tmp_path):
    overlap = shell(f"mkdir {tmp_path}/lock || exit 9; sleep 0.01; rmdir {tmp_path}/lock")
    async with running(tmp_path, {"r": overlap}, slots=8) as (spool, scheduler, records):
        spool.enqueue([request("r", serialize_key="k") for _ in range(8)])
        scheduler.wake()
        await records.ended(*range(1, 9))
        assert spool.counts().done == 8


@aio
async def test_another_key_passes_one_that_waits(tmp_path, gate):
    async with running(tmp_path, {"r": gate.hook(), "q": hook("/bin/true")}, slots=4) as (spool, scheduler, records):
        spool.enqueue([request("r", serialize_key="a"), request("r", serialize_key="a"), request("q")])
        scheduler.wake()
        await records.ended(3)
        assert [one.job_id for one in scheduler.running()] == [1]
        gate.release(2)
        await records.ended(1, 2)


@aio
async def test_gathered_events_are_all_on_standard_input_of_one_run(tmp_path):
    gather = Gather("r", window_s=3600, max=5)
    async with running(tmp_path, {"r": shell("wc -l; echo $CNPROCD_EVENTS")}) as (spool, scheduler, records):
        spool.enqueue([request("r", {"pid": n}, gather=gather) for n in range(5)])
        scheduler.wake()
        await records.ended(1)
        assert [fields["line"] for fields in records.of("hook_output")] == ["5", "5"]


@aio
async def test_a_coalesced_job_starts_when_its_window_closes(tmp_path):
    async with running(tmp_path, {"r": hook("/bin/true")}) as (spool, scheduler, records):
        spool.enqueue([request("r", gather=Gather("r", window_s=0.2))])
        scheduler.wake()
        assert scheduler.running() == []
        await records.ended(1)


@aio
async def test_the_backlog_leaves_half_of_the_slots_to_new_jobs(tmp_path, gate):
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue([request("r") for _ in range(10)])
    spool.close()
    async with running(tmp_path, {"r": gate.hook(), "new": hook("/bin/true")}, slots=4) as (spool, scheduler, records):
        await records.until(lambda: len(records.of("hook_started")) == 2)
        assert len(scheduler.running()) == 2
        (job_id,) = spool.enqueue([request("new")]).job_ids
        scheduler.wake()
        await records.ended(job_id)
        gate.release(10)
        await records.ended(*range(1, 11))


@aio
async def test_with_one_slot_new_jobs_go_before_the_backlog(tmp_path, gate):
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue([request("r") for _ in range(3)])
    spool.close()
    async with running(tmp_path, {"r": gate.hook()}, slots=1) as (spool, scheduler, records):
        await records.until(lambda: records.of("hook_started"))
        spool.enqueue([request("r")])
        scheduler.wake()
        gate.release(4)
        await records.ended(1, 2, 3, 4)
        assert order_of(records) == [1, 4, 2, 3]


# -- rules that change -------------------------------------------------------------------------------------------


@aio
async def test_a_reload_applies_to_waiting_jobs_and_orphans_are_dead(tmp_path, gate):
    async with running(tmp_path, {"r": gate.hook(), "gone": gate.hook()}, slots=1) as (spool, scheduler, records):
        spool.enqueue([request("r"), request("r"), request("gone")])
        scheduler.wake()
        await records.until(lambda: records.of("hook_started", job_id=1))
        scheduler.reload({"r": shell("echo new")}, slots=2)
        await records.ended(2, 3)
        assert line_of(records, "hook_output", job_id=2)["line"] == "new"
        assert "its rule does not exist any more" in line_of(records, "job_dead", job_id=3)["reason"]
        gate.release()
        await records.ended(1)


@aio
async def test_a_user_is_looked_up_once_for_each_load_of_the_rules(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(names_module, "resolve_user", lambda *args: asked.append(args) or resolve_user(*args))
    names = Names(asyncio.get_running_loop(), Records())
    async with running(tmp_path, {"r": hook("/bin/true")}, resolve_user=names.hook_user) as (spool, scheduler, records):
        spool.enqueue([request("r"), request("r")])
        scheduler.wake()
        await records.ended(1, 2)
        assert len(asked) == 1
        names.expire()  # as after a reload
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(3)
        assert len(asked) == 2
    names.close()


@aio
async def test_a_job_waits_while_its_user_cannot_be_resolved(tmp_path):
    """The name service does not answer: the job is retried, and no failure is counted."""
    answers = [NameServiceSilentError("the name service does not answer")]

    def resolve(user, group):
        if answers:
            raise answers.pop()
        return resolve_user(user, group)

    async with running(tmp_path, {"r": hook("/bin/true")}, resolve_user=resolve) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        (failed,) = records.of("hook_failed")
        assert failed["will_retry"] and "does not answer" in failed["reason"]
        assert scheduler.totals.postponed == 1


@aio
async def test_a_revived_job_runs(tmp_path):
    async with running(tmp_path, {"r": hook("/bin/false")}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        scheduler.reload({"r": hook("/bin/true")}, slots=1)
        assert await spool.revive(job_id=1)
        scheduler.wake()
        await records.until(lambda: records.of("hook_finished", job_id=1))


# -- stopping and coming back ------------------------------------------------------------------------------------


@aio
async def test_stop_lets_hooks_finish_within_the_bound(tmp_path, gate):
    async with running(tmp_path, {"r": gate.hook()}, slots=1) as (spool, scheduler, records):
        spool.enqueue([request("r"), request("r")])
        scheduler.wake()
        await records.until(lambda: records.of("hook_started"))
        stopping = asyncio.ensure_future(scheduler.stop(PATIENCE_S))
        await asyncio.sleep(0)
        gate.release(2)
        await stopping
        assert records.of("hook_finished", job_id=1)
        assert not records.of("hook_started", job_id=2), "nothing is started any more"
        assert (spool.counts().done, spool.counts().waiting) == (1, 1)


@aio
async def test_stop_ends_what_is_left_and_it_runs_again_next_time(tmp_path, gate):
    async with running(tmp_path, {"r": gate.hook(retries=0)}, slots=1) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.until(lambda: records.of("hook_started"))
        pid = scheduler.running()[0].hook_pid
        await scheduler.stop(0)
        assert not alive(pid)
        assert spool.job(1).state is State.WAITING
        assert line_of(records, "hook_failed")["reason"] == "interrupted"
    assert zombies() == []
    async with running(tmp_path, {"r": hook("/bin/true")}) as (spool, scheduler, records):
        await records.ended(1)
        assert line_of(records, "hook_finished")["attempt"] == 2


DRIVER = """
import asyncio, sys
from unit.hookkit import Records, request, running, shell
async def main(directory):
    async with running(directory, {"r": shell("echo $$; trap '' TERM; while :; do sleep 1000; done")}) as (spool, scheduler, records):
        spool.enqueue([request("r", key="k")])
        scheduler.wake()
        await records.until(lambda: records.of("hook_output"))
        print(records.of("hook_output")[0]["line"], flush=True)
        await asyncio.Event().wait()
import pathlib
asyncio.run(main(pathlib.Path(sys.argv[1])))
"""  # noqa: E501


@aio
async def test_a_surviving_hook_is_ended_before_its_job_runs_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler_module, "TERM_GRACE_S", 0.1)
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DRIVER, str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    pid = int(await daemon.stdout.readline())
    daemon.kill()
    await daemon.wait()
    assert alive(pid), "the hook outlives the daemon"
    seen = []
    again = running(tmp_path, {"r": hook("/bin/true")}, on_started=lambda *_: seen.append(alive(pid)), slots=1)
    async with again as (_, _, records):
        await records.ended(1)
        assert records.of("hook_leftover", job_id=1)
        assert seen == [False]
        assert line_of(records, "hook_finished")["attempt"] == 2


# -- missing resources and damage -------------------------------------------------------------------------------


@aio
async def test_jobs_that_cannot_start_are_logged_in_few_records(tmp_path, monkeypatch):
    """The runner is away and 2,000 jobs of a rule wait. A few are tried, another rule's runs, and then all run."""
    monkeypatch.setattr(pauses, "LONGEST_PAUSE_S", 0.2)
    async with running(tmp_path, {"a": hook("/bin/true"), "b": hook("/bin/true")}) as (spool, scheduler, records):
        launch, away = scheduler.launcher.launch, [True]

        def lacking(one, announce):
            if away and one.rule == "a":
                raise OSError(2, "cannot reach the runner")
            return launch(one, announce)

        monkeypatch.setattr(scheduler.launcher, "launch", lacking)
        spool.enqueue([request("a") for _ in range(2000)] + [request("b")])
        scheduler.wake()
        await records.ended(2001)
        await records.until(lambda: len(records.of("hook_failed", job_id=1)) == 3)  # after two pauses
        assert scheduler.totals.postponed == len(records.of("hook_failed")) < 20
        for record in records.of("hook_failed"):
            spool.drop(job_id=record["job_id"])  # the others are held by their rule alone
        scheduler.wake()
        away.clear()
        left = spool.counts().waiting
        await records.until(lambda: spool.counts().waiting < left - 20)


@aio
async def test_a_lack_of_descriptors_postpones_a_job(tmp_path, monkeypatch):
    async with running(tmp_path, {"r": hook("/bin/true", retries=0)}) as (spool, scheduler, records):
        real = scheduler.launcher.launch

        def launch(*args, **kwargs):
            monkeypatch.setattr(scheduler.launcher, "launch", real)
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(scheduler.launcher, "launch", launch)
        spool.enqueue([request("r")])
        scheduler.wake()
        failed = line_of(records, "hook_failed")
        assert "Too many open files" in failed["reason"]
        assert failed["will_retry"]
        assert spool.job(1).attempts == 0
        assert scheduler.totals.postponed == 1
        scheduler._spool._store._db.execute("UPDATE jobs SET due_ns = 0")  # so that the test does not wait for it
        scheduler.wake()
        await records.ended(1)
        assert spool.counts().done == 1


@aio
async def test_an_unknown_user_is_a_failed_attempt_with_its_reason(tmp_path):
    async with running(tmp_path, {"r": hook("/bin/true", user="no-such-user")}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        assert "unknown user 'no-such-user'" in line_of(records, "job_dead")["reason"]


@aio
async def test_a_job_with_a_damaged_record_becomes_dead(tmp_path):
    async with running(tmp_path, {"r": hook("/bin/true")}, slots=1) as (spool, scheduler, records):
        spool.enqueue([request("r"), request("r")])
        spool._store._db.execute("UPDATE events SET record = '[' WHERE job_id = 1")
        scheduler.wake()
        await records.ended(1, 2)
        assert "cannot be read" in line_of(records, "job_dead", job_id=1)["reason"]
        assert records.of("hook_finished", job_id=2)


@aio
async def test_cleanup_goes_on_in_memory_and_comes_back_to_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler_module, "HOUSEKEEPING_S", 0.01)
    monkeypatch.setattr(scheduler_module, "DURABLE_RETRY_S", 0.0)
    async with running(tmp_path / "late", {"r": hook("/bin/true")}) as (spool, scheduler, records):
        assert not spool.durable
        (job_id,) = spool.enqueue([request("r")]).job_ids
        scheduler.wake()
        await records.ended(job_id)
        (tmp_path / "late").mkdir()
        await records.until(lambda: records.of("spool_durable"))
        assert spool.counts().done == 1


@aio
async def test_an_idle_scheduler_has_no_timer(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler_module, "HOUSEKEEPING_S", 0.01)
    async with running(tmp_path, {"r": hook("/bin/true")}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        async with asyncio.timeout(PATIENCE_S):
            while spool.has_changes or scheduler._next_housekeeping is not None:
                await asyncio.sleep(0.01)
        assert scheduler._next_due is None


@aio
async def test_latency_counts_from_kernel_time_for_first_attempts(tmp_path):
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue([request("r")])
    spool.close()
    spec = shell('test "$CNPROCD_ATTEMPT" = 2 || test "$CNPROCD_JOB_ID" = 1', retries=1, backoff=SOON)
    async with running(tmp_path, {"r": spec}) as (spool, scheduler, records):
        await records.ended(1)
        assert scheduler.latency.count == 0, "the backlog's age is not our latency"
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(2)
        assert scheduler.latency.count == 1
        first, second = records.of("hook_started", job_id=2)
        assert spool.job(2).latency_ms == first["latency_ms"] < second["latency_ms"]
        assert spool.job(2).kernel_time_ns < spool.clock() + NS


@aio
async def test_a_gathering_window_is_no_latency(tmp_path):
    async with running(tmp_path, {"r": hook("/bin/true")}) as (spool, scheduler, records):
        spool.enqueue([request("r", gather=Gather("r", window_s=0.1))])
        scheduler.wake()
        await records.ended(1)
        assert scheduler.latency.count == 0
        assert spool.job(1).latency_ms > 100


@aio
async def test_every_descriptor_and_process_is_given_back(tmp_path):
    async with running(tmp_path, {"r": shell("exit $((CNPROCD_JOB_ID % 3))")}, slots=4) as (spool, scheduler, records):
        spool.enqueue([request("r") for _ in range(4)])
        scheduler.wake()
        await records.ended(1, 2, 3, 4)
        before = len(os.listdir("/proc/self/fd"))
        spool.enqueue([request("r") for _ in range(40)])
        scheduler.wake()
        await records.ended(*range(1, 45))
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # a spare's socket may be on its way
    assert zombies() == []


class EachReading:
    """A clock that moves by a nanosecond at each reading."""

    offset_ns = 0

    def __init__(self, now_ns: int) -> None:
        self._readings = itertools.count(now_ns)

    def __call__(self) -> int:
        return next(self._readings)


@aio
async def test_a_job_that_becomes_due_while_one_is_sought_runs(tmp_path):
    """At whichever reading of the clock it becomes due: the scheduler had no timer for it, and forgot it."""
    for reading in range(1, 12):
        (directory := tmp_path / str(reading)).mkdir()
        async with running(directory, {"r": hook("/bin/true")}) as (spool, scheduler, records):
            spool.enqueue([request("r")])
            now_ns = spool.clock()
            spool.start(1, "t")
            spool.postpone(1, now_ns + reading)
            spool.clock = EachReading(now_ns + 1)
            scheduler.wake()
            await records.ended(1)
