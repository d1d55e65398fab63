"""The state of the rule files: a failed reload and changed files are shown until a reload succeeds."""

import asyncio
import re
from pathlib import Path

import pytest

from cnprocd import load_state
from cnprocd.load_state import LoadState
from cnprocd.rules.problems import LoadedRules, Problem, RulesError

FILE, OTHER = Path("/etc/cnprocd/rules.yaml"), Path("/etc/cnprocd/rules.d/a.yaml")


def loaded(**digests):
    files = {{"rules": FILE, "other": OTHER}[name]: digest for name, digest in digests.items()}
    return LoadedRules((), None, {}, (FILE,), (), file_digests=files)


class Disk:
    """The digests that another process would read."""

    def __init__(self, **digests):
        self.digests = loaded(**digests).file_digests
        self.reads = 0
        self.gate = None

    async def read(self):
        self.reads += 1
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.digests, Exception):
            raise self.digests
        return self.digests


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(load_state, "PAUSE_S", 0.0)


def error(message='unknown event: "x"'):
    return RulesError([Problem(FILE, 3, 5, message)])


def checked(state):
    asyncio.run(state.check())


def test_a_failed_reload_is_shown_until_one_succeeds():
    disk = Disk(rules="1")
    state = LoadState(loaded(rules="1"), disk.read, lambda: None)
    began_ns = state.loaded_ns
    assert (state.phrase(), state.time_ns) == ("", began_ns)
    state.failed(error())
    assert state.phrase().endswith(f'Z: {FILE}:3:5: unknown event: "x"')
    assert state.phrase().startswith("; RELOAD FAILED at 2")
    assert state.time_ns >= state.loaded_ns == began_ns
    checked(state)  # the files are as loaded again, but no reload has read them
    assert "RELOAD FAILED" in state.phrase()
    state.succeeded(loaded(rules="2"))
    assert (state.phrase(), state.failed_load) == ("", None)


def test_a_start_with_accepted_rules_shows_its_own_time():
    """The time is that of the start. The rules were accepted earlier."""
    state = LoadState(loaded(), Disk().read, lambda: None)
    state.failed(error(), "start")
    assert re.match(r"; STARTED WITH THE RULES ACCEPTED LAST \(start at \S+Z\): ", state.phrase())


def test_a_long_error_is_cut_in_the_status_line():
    state = LoadState(loaded(), Disk().read, lambda: None)
    state.failed(error("x" * 5000))
    assert len(state.phrase()) < 300


def test_changed_files_are_shown_until_they_are_loaded():
    disk, seen = Disk(rules="1"), []
    state = LoadState(loaded(rules="1"), disk.read, lambda: seen.append(state.phrase()))
    checked(state)
    assert (state.changed_files, seen) == ((), [])
    disk.digests = loaded(rules="2", other="1").file_digests
    checked(state)
    assert state.changed_files == (OTHER, FILE)
    assert seen == [f"; NOT LOADED: {OTHER}, {FILE}"]
    state.succeeded(loaded(rules="2", other="1"))
    checked(state)
    assert (state.changed_files, state.phrase(), len(seen)) == ((), "", 1)


def test_files_that_cannot_be_compared_are_unknown():
    disk = Disk()
    state = LoadState(loaded(), disk.read, lambda: None)
    disk.digests = error("the loader process failed")
    checked(state)
    assert (state.changed_files, state.phrase()) == (None, "")


def test_a_stuck_disk_delays_a_request_by_a_bound(monkeypatch):
    """One check is enough for all requests, and its result arrives later."""
    monkeypatch.setattr(load_state, "WAIT_S", 0.01)
    disk = Disk(rules="2")
    state = LoadState(loaded(rules="1"), disk.read, lambda: None)

    async def scene():
        disk.gate = asyncio.Event()
        await state.check()
        await state.check()
        assert (disk.reads, state.changed_files) == (1, ())
        disk.gate.set()
        await state.check()
        assert state.changed_files == (FILE,)

    asyncio.run(scene())


def test_a_check_of_rules_that_were_replaced_is_ignored():
    disk = Disk(rules="2")
    state = LoadState(loaded(rules="1"), disk.read, lambda: None)

    async def scene():
        disk.gate = asyncio.Event()
        check = asyncio.create_task(state.check())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        state.succeeded(loaded(rules="2"))
        disk.gate.set()
        await check

    asyncio.run(scene())
    assert (disk.reads, state.changed_files) == (1, ())


@pytest.mark.parametrize(("every_s", "reads"), [(0.0, 1), (1e9, 0)])
def test_an_idle_daemon_checks_once_in_a_while(monkeypatch, every_s, reads):
    monkeypatch.setattr(load_state, "CHECK_EVERY_S", every_s)
    disk = Disk()
    state = LoadState(loaded(), disk.read, lambda: None)

    async def scene():
        state.check_if_due()
        state.check_if_due()
        await asyncio.sleep(0)

    asyncio.run(scene())
    assert disk.reads == reads


def test_checks_one_after_the_other_have_a_pause(monkeypatch):
    """A client that asks for the status again and again starts a bounded number of processes."""
    monkeypatch.setattr(load_state, "PAUSE_S", 1e9)
    monkeypatch.setattr(load_state, "WAIT_S", 0.01)
    disk = Disk()
    state = LoadState(loaded(), disk.read, lambda: None)

    async def scene():
        for _ in range(3):
            await state.check()

    asyncio.run(scene())
    assert disk.reads == 0
