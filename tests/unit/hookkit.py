"""What the tests of this room share: a log that can be waited on, jobs, hooks, and a runner that is always stopped."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

from cnprocd.rules.values import Field, Template
from cnprocd.spool.job import HookSpec, JobRequest
from cnprocd.spool.scheduler import Runner
from cnprocd.spool.spool import Spool

PATIENCE_S = 60.0  # only a test that fails waits so long


class Records:
    """A log sink. `await until(...)` returns as soon as a condition on it holds: nobody sleeps."""

    def __init__(self) -> None:
        self.all: list[tuple[str, str, dict[str, object]]] = []
        self._news: asyncio.Event | None = None

    def __call__(self, level: str, event: str, **fields: object) -> None:
        self.all.append((level, event, fields))
        if self._news is not None:
            self._news.set()

    def of(self, event: str, **wanted: object) -> list[dict[str, object]]:
        return [
            fields
            for _, name, fields in self.all
            if name == event and all(fields.get(key) == value for key, value in wanted.items())
        ]

    async def until(self, condition: Callable[[], object]) -> None:
        self._news = asyncio.Event()
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self._news.wait()
                self._news.clear()

    async def ended(self, *jobs: int) -> None:
        """Until each of these jobs is done or dead."""
        await self.until(lambda: all(self.of("hook_finished", job_id=j) or self.of("job_dead", job_id=j) for j in jobs))


def aio(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """A test that is a coroutine, in a loop of its own."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def template(text: str) -> Template:
    """`{field}` in a text becomes the event's field."""
    parts: list[str | Field] = []
    for index, part in enumerate(text.replace("}", "{").split("{")):
        if part:
            parts.append(Field(part) if index % 2 else part)
    return Template(tuple(parts))


def hook(rule: str, *command: str, **more: object) -> HookSpec:
    return HookSpec(rule, tuple(map(template, command)), **more)  # type: ignore[arg-type]


def shell(rule: str, script: str, **more: object) -> HookSpec:
    """A hook that runs a script; braces in it are the shell's."""
    command = (Template(("/bin/sh",)), Template(("-c",)), Template((script,)))
    return HookSpec(rule, command, **more)  # type: ignore[arg-type]


_number = iter(range(1 << 60))


def request(rule: str, event: dict[str, object] | None = None, **more: object) -> JobRequest:
    key = str(more.pop("key", f"key-{next(_number)}"))
    record = {"pid": 4242, "comm": "ora_pmon"} if event is None else event
    return JobRequest(key, rule, record, kernel_time_ns=time.monotonic_ns(), **more)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(directory: Path, *specs: HookSpec, slots: int = 4, records: Records | None = None, **more):
    """A spool and a runner over it: yields (spool, runner, records), and stops and closes them whatever happens."""
    records = records or Records()
    spool = Spool.open(directory, log=records)
    runner = Runner(spool, {spec.rule: spec for spec in specs}, slots=slots, log=records, **more)
    runner.start()
    try:
        yield spool, runner, records
    finally:
        await runner.stop(0)
        spool.close()


def alive(pid: int) -> bool:
    """Whether a process lives (a zombie does not)."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return raw[raw.rindex(b")") + 2 : raw.rindex(b")") + 3] not in b"ZX"


def zombies() -> list[int]:
    """Our own children that died and were not reaped."""
    found = []
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            if not alive(int(pid)):
                found.append(int(pid))
    return found
