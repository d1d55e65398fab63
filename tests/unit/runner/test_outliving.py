"""Hooks outlive the daemon and its connection: the next daemon takes them over, and nothing runs twice."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from unit.reaping import children_reaped  # noqa: F401 (a fixture)
from unit.runnerkit import World, attempt_id_of, hook, play, request

from cnprocd.launch.request import Ending
from cnprocd.runner.client import RunnerClient
from cnprocd.runner.results import Results
from cnprocd.runner.service import Service


def quiet(line: str) -> None:
    """Take a line of output."""


def resumed(it: World, job_id: int = 1, announce=lambda pid: None):
    """Ask for an attempt as a new daemon does, and return it."""
    it.client = RunnerClient(it.path, it.log, it.runners.append)
    return it.client.resume(request("r", it.hooks["r"], job_id, attempt_id=attempt_id_of(job_id)), announce)


async def begun(it: World, job_id: int = 1) -> Ending:
    """Start the hook of "r" and let its daemon stop when it runs. Return how the daemon's wait ended."""
    one = it.launch("r", job_id)
    started = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(one.wait(quiet, started.set_result))
    await started
    it.client.close()
    return await waiting


def test_a_daemon_that_stops_leaves_its_hook_to_the_next(tmp_path):
    async def scene(it: World) -> None:
        os.mkfifo(tmp_path / "go")
        it.hooks["r"] = hook(f"echo begun >> {tmp_path}/log; cat {tmp_path}/go; echo late; exit 3")
        ending = await begun(it)
        assert ending.left_running
        announced: list[int] = []
        lines: list[str] = []
        two = resumed(it, announce=announced.append)
        waiting = asyncio.ensure_future(two.wait(lines.append, quiet))
        while not announced:
            await asyncio.sleep(0)
        (tmp_path / "go").write_text("x\n")
        result = (await waiting).result
        assert (result.exit_code, result.reason) == (3, "exit code 3")
        assert lines[-1] == "late"
        assert (tmp_path / "log").read_text() == "begun\n"

    play(tmp_path, scene)


def test_a_hook_that_ends_meanwhile_is_not_run_again(tmp_path):
    """Its result is kept; its output goes into the runner's own log."""

    async def scene(it: World) -> None:
        os.mkfifo(tmp_path / "go")
        it.hooks["r"] = hook(f"cat {tmp_path}/go; echo alone")
        await begun(it)
        (tmp_path / "go").write_text("x\n")
        while len(it.service._attempts):
            await asyncio.sleep(0.01)
        ending = await resumed(it).wait(quiet, quiet)
        assert (ending.result.reason, ending.interrupted) == (None, False)
        assert [record["line"] for record in it.records if record["event"] == "hook_output"] == ["x", "alone"]

    play(tmp_path, scene)


def test_a_result_survives_the_runner(tmp_path):
    async def scene(it: World) -> None:
        it.hooks["r"] = hook("sleep 0.2; exit 4")
        await begun(it)
        while len(it.service._attempts):
            await asyncio.sleep(0.01)
        it.service.stop()
        await asyncio.sleep(0)
        again = Service(it.listener, it.snapshots, {os.getuid()}, it.log, None, results_dir=tmp_path / "results")
        serving = asyncio.ensure_future(again.serve(60))
        ending = await resumed(it).wait(quiet, quiet)
        assert ending.result.exit_code == 4
        it.client.close()
        again.stop()
        await serving

    play(tmp_path, scene)


def test_what_an_unknown_runner_left_is_ended_first(tmp_path):
    """A runner was killed, and its hook lives on. The answer "interrupted" comes when the hook is gone."""

    async def scene(it: World) -> None:
        it.hooks["r"] = hook("false")
        environment = {"CNPROCD_ATTEMPT_ID": attempt_id_of(1)}
        orphan = await asyncio.create_subprocess_exec("/bin/sleep", "100", env=environment)
        ending = await resumed(it).wait(quiet, quiet)
        assert ending.interrupted
        assert await orphan.wait() == -15

    play(tmp_path, scene)


def test_a_lost_connection_interrupts_nothing(tmp_path):
    async def scene(it: World) -> None:
        os.mkfifo(tmp_path / "go")
        it.hooks["r"] = hook(f"cat {tmp_path}/go")
        one = it.launch("r")
        started = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(one.wait(quiet, started.set_result))
        await started
        assert it.service._session is not None
        it.service._session._writer.close()
        (tmp_path / "go").write_text("x\n")
        ending = await waiting
        assert (ending.result.reason, ending.interrupted) == (None, False)
        assert len(it.runners) == 2

    play(tmp_path, scene)


def test_a_hook_is_ended_although_the_connection_is_lost(tmp_path):
    async def scene(it: World) -> None:
        it.hooks["r"] = hook("exec sleep 100")
        one = it.launch("r")
        started = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(one.wait(quiet, started.set_result))
        await started
        it.client._disconnect("lost")
        one.terminate(0.1)
        assert (await waiting).interrupted
        assert len(it.runners) == 2

    play(tmp_path, scene)


def test_a_second_attempt_of_a_running_job_waits(tmp_path):
    async def scene(it: World) -> None:
        it.hooks["r"] = hook("exec sleep 100")
        await begun(it)
        it.client = RunnerClient(it.path, it.log, it.runners.append)
        second = it.client.launch(request("r", it.hooks["r"], 1, attempt_id="f" * 32), lambda pid: None)
        ending = await second.wait(quiet, quiet)
        assert (ending.not_started, ending.this_job) == (True, True)
        assert ending.result.reason == "an earlier attempt of job 1 is still running"
        resumed(it).terminate(0.1)

    play(tmp_path, scene)


def test_a_stopping_runner_starts_nothing_and_waits(tmp_path):
    """SIGTERM: it ends with the hook that runs, however many jobs follow, and whether or not the daemon disconnects."""

    async def scene(it: World) -> None:
        os.mkfifo(tmp_path / "go")
        it.hooks["r"] = hook(f"cat {tmp_path}/go")
        one = it.launch("r")
        started = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(one.wait(quiet, started.set_result))
        await started
        it.service.stop()
        refused = await it.launch("r", 2).wait(quiet, quiet)
        assert (refused.not_started, refused.result.reason) == (True, "the runner is stopping")
        (tmp_path / "go").write_text("x\n")
        assert (await waiting).result.reason is None
        while it.client._socket is not None:  # the runner closes it
            await asyncio.sleep(0.01)

    play(tmp_path, scene)


def test_a_retiring_runner_stops_between_two_hooks(tmp_path):
    async def scene(it: World) -> None:
        os.mkfifo(tmp_path / "go")
        it.hooks["r"] = hook(f"cat {tmp_path}/go")
        it.hooks["short"] = hook("true")
        one = it.launch("r")
        started = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(one.wait(quiet, started.set_result))
        await started
        it.service.retire()
        assert (await it.launch("short", 2).wait(quiet, quiet)).result.reason is None
        assert not it.service._stop.is_set()
        (tmp_path / "go").write_text("x\n")
        assert (await waiting).result.reason is None
        assert it.service._stop.is_set()

    play(tmp_path, scene)


def test_a_clock_ahead_makes_no_result_old(tmp_path, monkeypatch):
    """The runner starts with a clock that stands a month ahead. The daemon still asks for a result of this boot."""
    from cnprocd.runner import results, wire

    ended = wire.Ended(attempt_id=attempt_id_of(1), reason="1")
    Results(tmp_path / "results").add(ended, delivered=False)
    path = tmp_path / "results" / attempt_id_of(1)
    ahead_s = time.time() + 30 * 86400
    monkeypatch.setattr(time, "time", lambda: ahead_s)
    kept = Results(tmp_path / "results")
    kept.prune()
    assert kept.find(attempt_id_of(1)) == ended
    for age_s, is_kept in ((results.KEPT_S - 60, True), (results.KEPT_S + 1, False), (-60, False)):
        kept.add(ended, delivered=False)
        written_s = time.clock_gettime(time.CLOCK_BOOTTIME) - age_s
        os.utime(path, (written_s, written_s))
        kept.prune()
        assert path.exists() == is_kept, "-60: of an earlier boot"


def test_results_are_bounded_and_pruned(tmp_path, monkeypatch):
    from cnprocd.runner import results, wire

    monkeypatch.setattr(results, "MOST_KEPT", 3)
    kept = Results(tmp_path / "results")
    for job in range(1, 6):
        kept.add(wire.Ended(attempt_id=attempt_id_of(job), reason=str(job)), delivered=False)
        os.utime(tmp_path / "results" / attempt_id_of(job), (job, job + 2e9))
    assert len(kept._latest) == 3
    kept.prune()
    assert len(list(Path(tmp_path / "results").iterdir())) == 3
    assert Results(tmp_path / "results").find(attempt_id_of(5)) == wire.Ended(attempt_id=attempt_id_of(5), reason="5")
    assert Results(tmp_path / "results").find(attempt_id_of(1)) is None
