"""The hook of a new job is prepared while the job is committed, and gets its order after that."""

import os

from unit.hookkit import aio, hook, request, running
from unit.reaping import children_reaped  # noqa: F401 (a fixture)

from cnprocd.launch.program import HookRefusedError
from cnprocd.spool.disk import DirectDisk
from cnprocd.spool.disk_messages import Write
from cnprocd.spool.job import Gather, State
from cnprocd.spool.starting import only_job

RUN = {"r": hook("/bin/true"), "one": hook("/bin/true", slots=1)}


class SlowDisk(DirectDisk):
    """Answers a request when the spool waits for it, as another process does. Notes what it was sent."""

    def __init__(self):
        super().__init__()
        self.sent, self._waiting = [], None

    def send(self, asked, done):
        if not isinstance(asked, Write):
            super().send(asked, done)
            return
        self.sent.append(asked)
        self._waiting = (asked, done)

    def wait(self, within_s):
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            super().send(*waiting)
        return True


class Watched:
    """Notes the order of what the scheduler and its launcher do."""

    def __init__(self, scheduler, disk):
        self.calls = []
        self.note(scheduler.launcher, "make_ready")
        self.note(scheduler.launcher, "launch")
        self.note(disk, "send")
        self.note(disk, "wait")

    def note(self, owner, name):
        real = getattr(owner, name)

        def call(*arguments, **more):
            self.calls.append(name)
            return real(*arguments, **more)

        setattr(owner, name, call)


@aio
async def test_a_hook_is_ready_before_the_commit_and_starts_after_it(tmp_path):
    disk = SlowDisk()
    async with running(tmp_path, RUN, disk=disk) as (_, scheduler, records):
        watched = Watched(scheduler, disk)
        scheduler.enqueue([request("r")])
        assert watched.calls[:3] == ["send", "make_ready", "wait"]
        assert "launch" not in watched.calls
        scheduler.wake()
        assert watched.calls[3:] == ["launch"]
        (written,) = disk.sent
        assert [row[2] for row in written.rows.jobs] == [State.RUNNING], "the start is in the same commit"
        await records.ended(1)
        assert records.of("hook_finished", job_id=1)


@aio
async def test_a_job_without_a_free_slot_is_committed_as_waiting(tmp_path):
    disk = SlowDisk()
    async with running(tmp_path, RUN, slots=1, disk=disk) as (_, scheduler, records):
        scheduler.enqueue([request("r"), request("r")])
        scheduler.wake()
        scheduler.enqueue([request("r")])
        assert [row[2] for row in disk.sent[0].rows.jobs] == [State.RUNNING, State.WAITING]
        assert [row[2] for row in disk.sent[1].rows.jobs] == [State.WAITING]
        scheduler.wake()
        await records.ended(1, 2, 3)


@aio
async def test_what_prevents_a_preparation_prevents_no_job(tmp_path):
    async with running(tmp_path, RUN) as (spool, scheduler, records):

        def lacking(*_):
            raise OSError(24, os.strerror(24))

        real = scheduler.launcher.make_ready
        scheduler.launcher.make_ready = lacking
        assert scheduler.enqueue([request("r")]).job_ids == (1,)
        scheduler.launcher.make_ready = real
        scheduler.wake()
        await records.ended(1)
        assert spool.job(1).state is State.DONE


@aio
async def test_a_refusal_during_the_preparation_fails_the_attempt(tmp_path):
    async with running(tmp_path, RUN) as (spool, scheduler, records):

        def refuse(*_):
            raise HookRefusedError("its arguments cannot be used")

        scheduler.launcher.make_ready = refuse
        scheduler.enqueue([request("r")])
        assert not records.all
        scheduler.wake()
        await records.ended(1)
        assert spool.job(1).reason == "its arguments cannot be used (1 attempt)"


@aio
async def test_a_choice_that_fails_costs_no_commit(tmp_path):
    async with running(tmp_path, RUN) as (spool, scheduler, records):
        real = scheduler._chooser.next_job

        def fail(*_):
            raise ZeroDivisionError

        scheduler._chooser.next_job = fail
        assert scheduler.enqueue([request("r")]).job_ids == (1,)
        assert not spool.has_changes
        scheduler._chooser.next_job = real
        scheduler.wake()
        await records.ended(1)


@aio
async def test_the_only_job_is_the_one_that_the_spool_would_return(tmp_path):
    """`slots: 1` and a serialize key count as they do for jobs that the spool is asked for."""
    lasting = {"r": hook("/bin/sleep", "1000"), "one": hook("/bin/sleep", "1000", slots=1)}
    async with running(tmp_path, lasting) as (spool, scheduler, records):
        cases = [
            request("r"),
            request("one", serialize_key="one/"),
            request("one", serialize_key="one/"),  # the hook of the one before it runs
            request("r", serialize_key="one/"),
        ]
        for case in cases:
            seen = []

            def compare(enqueued, case=case, seen=seen):
                known = only_job([case], enqueued, spool.boot_id)
                assert known == spool.job(enqueued.job_ids[0])
                seen.append((scheduler._next_job(known), scheduler._next_job()))
                return lambda: None

            (job_id,) = spool.enqueue([case], compare).job_ids
            ((short, long),) = seen
            assert (short and short.job_id) == (long and long.job_id)
            assert (short is None) == (case in cases[2:])
            if short is None:
                spool.drop(job_id=job_id)
            else:
                scheduler.wake()
                await records.until(lambda job_id=job_id: records.of("hook_started", job_id=job_id))


@aio
async def test_a_job_that_gathers_or_is_not_alone_is_looked_up(tmp_path):
    async with running(tmp_path, {}) as (spool, _, _):
        for requests in ([request("r", gather=Gather("r", 60.0))], [request("r")], [request("r"), request("r")]):
            enqueued = spool.enqueue(requests)
            assert only_job(requests, enqueued, spool.boot_id) is None
