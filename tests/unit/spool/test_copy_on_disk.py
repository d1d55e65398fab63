"""The file follows the memory: with its real process, which is stopped, continued and killed."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import time

import pytest
from unit.hookkit import PATIENCE_S, Clock, Records, aio, hook, request, running, searched, shell
from unit.reaping import children_reaped  # noqa: F401 (a fixture)

from cnprocd.launch.request import AttemptResult
from cnprocd.spool import copy_on_disk
from cnprocd.spool.disk import ChildDisk, DirectDisk
from cnprocd.spool.job import State
from cnprocd.spool.rows import Keep, MatchFilter, PastMatch
from cnprocd.spool.spool import FILE_NAME, Spool

FINE, FAILED = AttemptResult(None, 0), AttemptResult("exit code 1", 1)


class Child:
    """A spool whose file is in a process."""

    def __init__(self, directory):
        self.directory = directory
        self.records = Records()
        self.disk = ChildDisk(asyncio.get_running_loop())
        self.spool = Spool.open(directory, log=self.records, disk=self.disk)

    @property
    def pid(self):
        return self.disk._worker._pid

    @contextlib.contextmanager
    def stopped(self):
        """As while the disk does not answer."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    async def durable(self):
        """Wait until the file has everything: on a busy machine a commit takes longer than the spool waits for it."""
        await on_file(self.spool)


async def on_file(spool):
    """Wait until the file of a spool has everything."""
    async with asyncio.timeout(PATIENCE_S):
        while not spool.durable or spool.has_changes:
            spool.sync()
            await asyncio.sleep(0.01)


async def found_in_file(find):
    """Return what a search finds in the file. One that the process answers too late is answered from memory."""
    async with asyncio.timeout(PATIENCE_S):
        while (found := await find()).why is not None:
            """The process got no processor in time."""
    return found.value


def reopened(directory):
    """The states of the jobs in the file."""
    spool = Spool.open(directory, log=Records())
    assert spool.durable
    states = {job.job_id: str(job.state) for job in searched(spool.find_jobs(limit=1000)).value}
    spool.close()
    return states


def gone(pid):
    """Wait until the process of a closed spool has ended."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


# -- a disk that does not answer ---------------------------------------------------------------------------------


@aio
async def test_jobs_go_on_in_memory_while_the_disk_is_stuck(tmp_path):
    child = Child(tmp_path)
    spool = child.spool
    assert spool.enqueue([request("r")]).job_ids == (1,)
    await child.durable()
    with child.stopped():
        began = time.monotonic()
        assert spool.enqueue([request("r")]).job_ids == (2,)
        assert not spool.durable
        assert "has not answered for" in spool.why and "0.0" not in spool.why
        for job_id in (1, 2):
            spool.start(job_id, "t")
            spool.finish(job_id, FINE)
        spool.enqueue([request("r") for _ in range(50)])
        assert time.monotonic() - began < 1.0
        assert spool.counts().done == 2
        assert child.records.of("spool_not_durable")
    await child.durable()
    assert child.records.of("spool_durable")
    spool.close()
    assert reopened(tmp_path) == {1: "done", 2: "done"} | dict.fromkeys(range(3, 53), "waiting")


@aio
async def test_a_stuck_disk_is_waited_for_once_not_each_time(tmp_path):
    child = Child(tmp_path)
    with child.stopped():
        child.spool.enqueue([request("r")])
        began = time.monotonic()
        for _ in range(100):
            child.spool.enqueue([request("r")])
        assert time.monotonic() - began < copy_on_disk.PATIENCE_S * 50
    await child.durable()
    child.spool.close()


@aio
async def test_a_stop_leaves_the_changes_to_the_stuck_process(tmp_path):
    """It ends at once. When the disk answers, everything is written, and nothing runs again."""
    child = Child(tmp_path)
    spool, pid = child.spool, child.pid
    spool.enqueue([request("r"), request("r")])
    with child.stopped():
        spool.start(1, "t")
        spool.finish(1, FINE)
        spool.enqueue([request("r")])
        began = time.monotonic()
        spool.close()
        assert time.monotonic() - began < copy_on_disk.STOP_S
        assert "hooks may run again" in child.records.of("spool_not_durable")[-1]["message"]
    gone(pid)
    assert reopened(tmp_path) == {1: "done", 2: "waiting", 3: "waiting"}


@aio
async def test_what_a_stuck_disk_misses_is_found_in_memory(tmp_path):
    child = Child(tmp_path)
    spool = child.spool
    spool.record_matches([PastMatch(1, "old", "c", 1, {"pid": 1})])
    assert [match.pid for match in await found_in_file(lambda: spool.find_matches(MatchFilter()))] == [1]
    with child.stopped():
        spool.enqueue([request("r")])
        spool.record_matches([PastMatch(2, "new", "c", 2, {"pid": 2})])
        found = await spool.find_matches(MatchFilter(rule="n*"))
        assert [match.pid for match in found.value] == [2]
        assert "has not answered" in found.why
        jobs = await spool.find_jobs()
        assert [job.job_id for job in jobs.value] == [1] and jobs.why
    await child.durable()
    assert [match.pid for match in await found_in_file(lambda: spool.find_matches(MatchFilter()))] == [2, 1]
    spool.close()


@aio
async def test_a_search_ends_although_the_disk_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(copy_on_disk.CopyOnDisk.find, "__defaults__", (0.05,))
    child = Child(tmp_path)
    with child.stopped():
        found = await child.spool.find_jobs()
        assert (found.value, found.why) == ([], "the disk has not answered for 0.05 s")
    child.spool.close()


@aio
async def test_matches_do_not_wait_and_a_stuck_disk_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(copy_on_disk, "LATE_S", 0.05)
    child = Child(tmp_path)
    with child.stopped():
        for number in range(20_000):
            child.spool.record_matches([PastMatch(time.time_ns(), "r", "c", number, {})])
        async with asyncio.timeout(PATIENCE_S):
            while child.spool.durable:
                child.spool.sync()
                await asyncio.sleep(0.01)
    await child.durable()
    (newest,) = await found_in_file(lambda: child.spool.find_matches(MatchFilter(limit=1)))
    assert newest.pid == 19_999
    child.spool.close()


# -- a start -----------------------------------------------------------------------------------------------------


@aio
async def test_a_start_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """The jobs of the file, also one that a crash interrupted, are taken up when it answers."""
    before = Spool.open(tmp_path, log=Records())
    before.enqueue([request("r"), request("r")])
    before.start(1, "t")
    before.close()
    monkeypatch.setattr(copy_on_disk, "START_S", 0.0)
    ran = tmp_path / "ran"
    disk = ChildDisk(asyncio.get_running_loop())
    hooks = {"r": shell(f"echo $CNPROCD_JOB_ID >> {ran}")}
    async with running(tmp_path, hooks, disk=disk) as (spool, scheduler, records):
        assert not spool.durable
        (new,) = spool.enqueue([request("r")]).job_ids
        assert new > 1_000_000_000_000, "the ids of the file are not known yet"
        scheduler.wake()
        await records.ended(1, 2, new)
        await on_file(spool)
    assert reopened(tmp_path) == {1: "done", 2: "done", new: "done"}
    assert sorted(map(int, ran.read_text().split())) == [1, 2, new]


@aio
async def test_a_file_that_is_locked_at_the_start_is_taken_up_later(tmp_path, monkeypatch):
    """A job that a crash interrupted does not stay `running` for ever.

    A lock of a moment costs a moment: the pause between two tries begins short, however long it may become.
    """
    monkeypatch.setattr("cnprocd.spool.database.BUSY_TIMEOUT_S", 0.0)
    monkeypatch.setattr("cnprocd.spool.scheduler.HOUSEKEEPING_S", 0.01)
    monkeypatch.setattr("cnprocd.spool.scheduler.DURABLE_RETRY_S", 10 * PATIENCE_S)
    before = Spool.open(tmp_path, log=Records())
    before.enqueue([request("r")])
    before.start(1, "t")
    before.close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        async with running(tmp_path, {"r": hook("/bin/true")}) as (spool, _, records):
            assert "locked" in spool.why
            for _ in range(3):
                await tried(spool)
            holder.execute("ROLLBACK")
            holder.close()
            await records.ended(1)
            assert spool.job(1).attempts == 2
    assert reopened(tmp_path) == {1: "done"}


async def tried(spool):
    """Return when the spool has tried once more to open its file."""
    done, real = asyncio.Event(), spool.try_durable
    spool.try_durable = lambda: (real(), done.set())
    async with asyncio.timeout(PATIENCE_S):
        await done.wait()
    spool.try_durable = real


# -- the process ends --------------------------------------------------------------------------------------------


@aio
async def test_a_process_that_was_killed_is_replaced(tmp_path):
    child = Child(tmp_path)
    spool = child.spool
    spool.enqueue([request("r"), request("r")])
    spool.start(1, "t")
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    spool.finish(1, FINE)
    spool.enqueue([request("r")])
    assert not spool.durable
    assert "ended" in spool.why
    spool.try_durable()
    await child.durable()
    spool.close()
    assert reopened(tmp_path) == {1: "done", 2: "waiting", 3: "waiting"}


# -- the memory forgets, the file does not -----------------------------------------------------------------------


@pytest.fixture
def forgets(monkeypatch):
    monkeypatch.setattr(copy_on_disk, "MEMORY_KEEPS", 0)


@aio
async def test_a_job_that_is_forgotten_in_memory_never_returns(tmp_path, forgets):
    """It is finished while the disk is stuck, and then forgotten. Its row in the file must not run again."""
    child = Child(tmp_path)
    spool = child.spool
    spool.enqueue([request("r") for _ in range(3)])
    with child.stopped():
        for job_id in (1, 2):
            spool.start(job_id, "t")
        spool.finish(1, FINE)
        spool.bury(2, FAILED, "x")
        spool.prune()
        assert spool.job(1) is None
    await child.durable()
    spool.close()
    assert reopened(tmp_path) == {1: "done", 2: "dead", 3: "waiting"}


def test_hooks_done_while_the_disk_had_failed_never_run_again(tmp_path, forgets):
    """The history in memory was pruned before the disk came back."""
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue([request("r", key=f"k{n}") for n in range(3)])
    disk = spool._copy._disk
    assert isinstance(disk, DirectDisk)
    db = disk.file._store._db
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    spool.enqueue([request("r", {"filler": "x" * 100_000}, key="large")])
    assert not spool.durable
    for job_id in (1, 2, 4):
        spool.start(job_id, "t")
        spool.finish(job_id, FINE)
    spool.prune()
    assert spool.job(1) is None
    assert spool.try_durable()
    assert [job.job_id for job in spool.due(9)] == [3]
    assert spool.enqueue([request("r", key="k0"), request("r", key="large")]).duplicates == 2
    spool.close()
    again = Spool.open(tmp_path, log=Records())
    assert [job.job_id for job in again.due(9)] == [3]
    assert again.enqueue([request("r", key="k0")]).duplicates == 1
    again.close()


def test_a_dead_job_that_only_the_file_has_is_revived(tmp_path, forgets):
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue([request("r", {"pid": 7})])
    spool.start(1, "t")
    spool.bury(1, FAILED, "x")
    spool.prune()
    assert (spool.job(1), spool.counts().dead) == (None, 1)
    assert searched(spool.revive(job_id=1)) == [1]
    assert (spool.counts().dead, spool.counts().waiting) == (0, 1)
    assert spool.job(1).events == ({"pid": 7},)
    spool.close()
    assert reopened(tmp_path) == {1: "waiting"}


# -- two memories, one file --------------------------------------------------------------------------------------


def held(path):
    """A spool without its file."""
    (path / FILE_NAME).rename(path / "elsewhere")
    (path / FILE_NAME).mkdir()
    return Spool.open(path, log=Records())


def given_back(path):
    (path / FILE_NAME).rmdir()
    (path / "elsewhere").rename(path / FILE_NAME)


@pytest.mark.parametrize("state", ["waiting", "done"])
def test_one_event_makes_one_job_when_the_file_returns(tmp_path, state):
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue([request("r", key="k")])
    spool.close()
    spool = held(tmp_path)
    (job_id,) = spool.enqueue([request("r", key="k")]).job_ids
    if state == "done":
        spool.start(job_id, "t")
        spool.finish(job_id, FINE)
    given_back(tmp_path)
    assert spool.try_durable()
    assert [job.job_id for job in spool.due(9)] == ([] if state == "done" else [job_id])
    spool.close()
    assert reopened(tmp_path) == {job_id: state}


def test_an_event_that_the_file_knows_as_handled_does_not_run(tmp_path):
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue([request("r", key="k")])
    spool.start(1, "t")
    spool.finish(1, FINE)
    spool.close()
    spool = held(tmp_path)
    spool.enqueue([request("r", key="k"), request("r")])
    given_back(tmp_path)
    assert spool.try_durable()
    assert len(spool.due(9)) == spool.counts().waiting == 1
    spool.close()


def test_a_number_that_two_jobs_have_is_changed_in_the_file(tmp_path):
    """As after a clock that was wrong: the number of the job in memory has been announced to its hook."""
    spool = Spool.open(tmp_path, log=Records(), clock=Clock())
    spool.enqueue([request("file", {"pid": 1})])
    spool.close()
    spool = held(tmp_path)
    spool._store.skip_ids(0)
    (job_id,) = spool.enqueue([request("memory", {"pid": 2})]).job_ids
    assert job_id == 1
    given_back(tmp_path)
    assert spool.try_durable()
    assert {(job.rule, job.job_id == 1) for job in spool.due(9)} == {("memory", True), ("file", False)}
    spool.close()
    assert len(reopened(tmp_path)) == 2


# -- messages ----------------------------------------------------------------------------------------------------


@aio
async def test_large_records_and_answers_pass(tmp_path):
    child = Child(tmp_path)
    record = {"pid": 1, "cmdline": "x" * (3 << 20)}
    child.spool.enqueue([request("r", record)])
    child.spool.record_matches([PastMatch(1, "r", "c", 1, record)])
    await child.durable()
    (match,) = await found_in_file(lambda: child.spool.find_matches(MatchFilter()))
    assert match.record == record
    child.spool.close()
    assert reopened(tmp_path) == {1: "waiting"}


@aio
async def test_all_pages_of_a_search_are_found(tmp_path):
    child = Child(tmp_path)
    child.spool.record_matches([PastMatch(number, "r", "c", number, {}) for number in range(1234)])
    found = await found_in_file(lambda: child.spool.find_matches(MatchFilter(limit=1000)))
    assert [match.pid for match in found] == list(range(1233, 233, -1))
    child.spool.close()


@aio
async def test_the_process_ignores_the_signals_that_stop_the_daemon(tmp_path):
    child = Child(tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(child.pid, number)
    child.spool.enqueue([request("r")])
    await child.durable()
    child.spool.close()


@pytest.mark.parametrize("keep", [Keep(), Keep(history_count=5)])
def test_ended_jobs_are_counted_wherever_they_are(tmp_path, keep):
    spool = Spool.open(tmp_path, log=Records(), keep=keep, disk=DirectDisk())
    spool.enqueue([request("r") for _ in range(700)])
    for job_id in range(1, 701):
        spool.start(job_id, "t")
        spool.finish(job_id, FINE)
    spool.sync()
    in_file = len(searched(spool.find_jobs(state=State.DONE, limit=1000)).value)
    assert spool.counts().done == in_file == min(700, keep.history_count)
    spool.close()
