"""The daemon's client and the runner in one loop, over a real unix socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection
from contextlib import asynccontextmanager
from pathlib import Path

from unit.hookkit import edges_gone, launch_request, shell

from cnprocd.launch.request import LaunchRequest
from cnprocd.rules.ruleset import Hook
from cnprocd.runner.client import RunnerClient
from cnprocd.runner.rule_snapshots import FilesRead, RuleSnapshots
from cnprocd.runner.service import Service

ATTEMPT_ID = "0" * 32
SNAPSHOT = "5" * 64
LIMIT_S = 20.0


def hook(script: str, timeout_s: float = 10.0) -> Hook:
    return shell(script, timeout_s=timeout_s)


def request(
    rule: str, wanted: Hook, job_id: int = 1, limit_s: float = 10.0, attempt_id: str = ATTEMPT_ID
) -> LaunchRequest:
    event = {"pid": 4711, "comm": "x"}
    return launch_request(
        wanted, event, rule=rule, job_id=job_id, attempt_id=attempt_id, limit_s=limit_s, snapshot=SNAPSHOT
    )


def attempt_id_of(job_id: int) -> str:
    return f"{job_id - 1:032x}"


class World:
    """A runner and a client in one loop."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "runner.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.hooks: dict[str, Hook] = {}
        self.records: list[dict[str, object]] = []
        self.runners: list[int] = []
        self.kept: dict[str, dict[str, Hook]] = {SNAPSHOT: self.hooks}
        self.keep: Collection[str] | None = ()  # what the last accepted snapshot left
        self.files_digest = SNAPSHOT
        self.snapshots = RuleSnapshots(self)
        results = directory / "results"
        self.service = Service(self.listener, self.snapshots, {os.getuid()}, self.log, None, results_dir=results)
        self.client = RunnerClient(self.path, self.log, self.runners.append)

    async def stored(self, digest: str) -> dict[str, Hook] | None:
        return self.kept.get(digest)

    async def accept(self, wanted: str, keep: Collection[str] | None) -> FilesRead:
        self.keep = keep
        return await self.files(wanted)

    async def files(self, wanted: str) -> FilesRead:
        if self.files_digest != wanted:
            return FilesRead(self.files_digest, None)
        self.kept[wanted] = dict(self.hooks)
        return FilesRead(wanted, self.kept[wanted])

    def log(self, level: str, event: str, **fields: object) -> None:
        self.records.append({"level": level, "event": event, **fields})

    def launch(self, rule: str, job_id: int = 1, limit_s: float = 10.0, announce=lambda pid: None):
        """Launch the hook of a rule in the runner. Each job has an attempt of its own."""
        wanted = self.hooks.get(rule, hook("false"))
        return self.client.launch(request(rule, wanted, job_id, limit_s, attempt_id_of(job_id)), announce)


@asynccontextmanager
async def world(directory: Path):
    it = World(directory)
    serving = asyncio.ensure_future(it.service.serve(idle_s=60))
    try:
        async with asyncio.timeout(LIMIT_S):
            yield it
    finally:
        it.client.close()
        it.service.stop()
        await asyncio.wait_for(serving, LIMIT_S)
        it.listener.close()
        await edges_gone(it.service._launcher.edges)


def play(directory: Path, scene):
    async def main():
        async with world(directory) as it:
            return await scene(it)

    return asyncio.run(main())
