"""Many requests to reload cost at most two reloads, and a reload that could not read the files is tried again."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from unit.hookkit import Records

from cnprocd import reload
from cnprocd.acceptance import RunnerUnreachableError
from cnprocd.reload import RulesInForce
from cnprocd.rules.loader_process import LoaderFailedError
from cnprocd.rules.problems import LoadedRules, Problem, RulesError

FILE = Path("/etc/cnprocd/rules.yaml")
UNREADABLE = LoaderFailedError([Problem(FILE, 0, 0, "cannot load the rules: Too many open files")])
SILENT = RunnerUnreachableError([Problem(FILE, 0, 0, "the runner has no snapshot of the rules: no answer")])
INVALID = RulesError([Problem(FILE, 1, 1, 'unknown event: "x"')])


class Scene:
    """Rules in force whose loads are counted; a load waits for `gate` and raises the next of `errors`."""

    def __init__(self, errors=()):
        self.loads, self.swaps, self.errors = 0, 0, list(errors)
        self.accepts, self.refusals = 0, list[RulesError]()
        self.answer = asyncio.Event()  # of the runner or the disk that accepts
        self.answer.set()
        self.gate = asyncio.Event()
        self.log = Records()
        settings = SimpleNamespace(log_level="info")
        loaded: Any = SimpleNamespace(rules_hash="0", settings=settings, file_digests={}, files=(FILE,))
        self.loaded: LoadedRules = loaded
        manager: Any = SimpleNamespace(reloading=lambda: None, ready=lambda line: None, status=lambda line: None)
        parts: Any = SimpleNamespace(snapshots=list)
        stalls: Any = SimpleNamespace(steps=lambda edge, work: work)
        self.rules: Any = RulesInForce(
            self.loaded, self.load, self.load, parts, parts, parts, manager, self.log, lambda level: None,
            asyncio.Event(), stalls, self.accept,
        )  # fmt: skip
        vars(self.rules).update(_swap=self.swap, status_line=lambda: "")

    async def load(self) -> Any:
        self.loads += 1
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        return self.loaded

    async def accept(self, loaded, keep):
        self.accepts += 1
        await self.answer.wait()
        if self.refusals:
            raise self.refusals.pop(0)

    async def swap(self, loaded):
        self.swaps += 1
        self.log("notice", "rules_loaded")
        return True


def test_a_hundred_requests_cost_two_reloads():
    async def run():
        scene = Scene()
        scene.rules.reload_soon()
        while scene.loads == 0:
            await asyncio.sleep(0)
        for _ in range(100):
            scene.rules.reload_soon()
            await asyncio.sleep(0)
        answers = [asyncio.create_task(scene.rules.reload()) for _ in range(10)]
        scene.gate.set()
        assert await asyncio.gather(*answers) == [None] * 10
        assert (scene.loads, scene.swaps) == (2, 2)

    asyncio.run(run())


def test_a_client_that_leaves_cancels_no_reload():
    async def run():
        scene = Scene()
        first, second = (asyncio.create_task(scene.rules.reload()) for _ in range(2))
        while scene.loads == 0:
            await asyncio.sleep(0)
        first.cancel()
        scene.gate.set()
        assert await second is None

    asyncio.run(run())


def test_an_unreadable_file_is_read_again(monkeypatch):
    monkeypatch.setattr(reload, "RETRY_MOST_S", 0.002)

    async def run():
        scene = Scene([UNREADABLE] * 3)
        scene.rules._retry_s = 0.001
        scene.gate.set()
        scene.rules.reload_soon()
        await scene.log.until(lambda: scene.log.of("rules_loaded"))
        rejected = scene.log.of("rules_rejected")
        assert [record["retry_in_s"] for record in rejected] == [0.001, 0.002, 0.002]
        assert (scene.loads, scene.swaps) == (4, 1)
        assert scene.rules.state.failed_load is None

    asyncio.run(run())


def test_an_invalid_file_is_not_read_again():
    async def run():
        scene = Scene([INVALID])
        scene.gate.set()
        assert await scene.rules.reload() is INVALID
        assert scene.rules._retry is None
        assert [record["retry_in_s"] for record in scene.log.of("rules_rejected")] == [None]

    asyncio.run(run())


def test_rules_that_no_runner_accepts_are_loaded_again():
    async def run():
        scene = Scene()
        scene.refusals = [SILENT, SILENT]
        scene.rules._retry_s = 0.001
        scene.gate.set()
        assert await scene.rules.reload() is SILENT
        await scene.log.until(lambda: scene.log.of("rules_loaded"))
        assert [record["retry_in_s"] for record in scene.log.of("rules_rejected")] == [0.001, 0.002]
        assert (scene.loads, scene.swaps) == (3, 1)

    asyncio.run(run())


def test_a_start_does_not_wait_for_a_frozen_disk():
    """What accepts the rules goes on beside the loop, and a reload waits for its end."""

    async def run():
        scene = Scene()
        scene.answer.clear()
        scene.gate.set()
        async with asyncio.timeout(30.0):
            await scene.rules.accept_at_start(0.0)
        scene.rules.reload_soon()
        for _ in range(10):
            await asyncio.sleep(0)
        assert (scene.accepts, scene.loads) == (1, 0)
        scene.answer.set()
        await scene.log.until(lambda: scene.log.of("rules_loaded"))
        assert (scene.accepts, scene.loads, scene.swaps) == (2, 1, 1)

    asyncio.run(run())
