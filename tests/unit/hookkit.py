"""What the tests of hooks share: a log to wait on, jobs, hooks, and a scheduler that is always stopped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from cnprocd.launch.request import HookUser, LaunchRequest
from cnprocd.launch.user import resolve_user
from cnprocd.rules.ruleset import Backoff, Hook
from cnprocd.rules.values import Field, Template
from cnprocd.spool.job import JobRequest
from cnprocd.spool.scheduler import Scheduler
from cnprocd.spool.spool import Spool

T = TypeVar("T")
PATIENCE_S = 60.0  # only a test that fails waits so long
ATTEMPT_ID = "a" * 32
# The defaults of the rule language, without pydantic: tests of ordinary users run with the system's Python.
HOOK = Hook(
    command=(Template(("/bin/true",)),), user=None, group=None, timeout_s=30.0, deadline_s=None, retries=0,
    backoff=Backoff(1.0, 300.0), env={}, working_directory="/", umask=0o077, nice=0, limits=None, slots=None,
    serialize="none", output_limit_bytes=65536, on_failure=None,
)  # fmt: skip


class Records:
    """A log. `await until(...)` returns as soon as a condition on it holds, without sleeping."""

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
        """Wait until each of these jobs is done or dead."""
        await self.until(lambda: all(self.of("hook_finished", job_id=j) or self.of("job_dead", job_id=j) for j in jobs))


class Clock:
    """A clock that only the test moves: `now_ns` as time goes by, `step` as an administrator does."""

    def __init__(self):
        self.now_ns = 1_700_000_000 * 10**9
        self.offset_ns = self.now_ns - 5 * 10**9

    def step(self, by_ns):
        self.now_ns += by_ns
        self.offset_ns += by_ns

    def __call__(self):
        return self.now_ns


def aio(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """Run a coroutine test in a loop of its own."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def searched(search: Coroutine[None, None, T]) -> T:
    """Return what a search of a spool returns that has no process of its own: it never waits."""
    try:
        search.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    raise AssertionError("it waits")


def template(text: str) -> Template:
    """`{field}` in a text becomes the event's field."""
    parts: list[str | Field] = []
    for index, part in enumerate(text.replace("}", "{").split("{")):
        if part:
            parts.append(Field(part) if index % 2 else part)
    return Template(tuple(parts))


def hook(*command: str, **more: object) -> Hook:
    """Return a hook with the defaults of the rule language; `{field}` in its command becomes the event's field."""
    return dataclasses.replace(HOOK, command=tuple(map(template, command)), **more)


def shell(script: str, **more: object) -> Hook:
    """Return a hook that runs a script; braces in it are the shell's."""
    command = tuple(Template((part,)) for part in ("/bin/sh", "-c", script))
    return dataclasses.replace(HOOK, command=command, **more)


def launch_request(
    wanted: Hook, *events: dict[str, object], user: HookUser | None = None, **more: object
) -> LaunchRequest:
    """Return the first attempt of job 7 of the rule "r"."""
    fields = {"rule": "r", "job_id": 7, "attempt": 1, "attempt_id": ATTEMPT_ID, "limit_s": 10.0} | more
    return LaunchRequest(
        hook=wanted, user=user or resolve_user(wanted.user, wanted.group), events=events or ({"pid": 1},), **fields
    )


_number = iter(range(1 << 60))


def request(rule: str, event: dict[str, object] | None = None, **more: object) -> JobRequest:
    key = str(more.pop("key", f"key-{next(_number)}"))
    record = {"pid": 4242, "comm": "ora_pmon"} if event is None else event
    return JobRequest(key, rule, record, kernel_time_ns=time.monotonic_ns(), **more)


@contextlib.asynccontextmanager
async def running(directory: Path, hooks: dict[str, Hook], slots: int = 4, records: Records | None = None, **more):
    """Yield a spool, a scheduler over it, and its records. Stop and close them whatever happens. `hooks` by rule."""
    records = records or Records()
    spool = Spool.open(directory, log=records, disk=more.pop("disk", None))
    scheduler = Scheduler(spool, hooks, slots=slots, log=records, **more)
    scheduler.start()
    try:
        yield spool, scheduler, records
    finally:
        await scheduler.stop(0)
        spool.close()
        await edges_gone(scheduler.launcher.edges)


async def edges_gone(edges: Iterable[Any]) -> None:
    """Wait until the worker processes of closed edges have ended, and reap them."""
    for edge in edges:
        while edge._leaving:
            edge._reap()
            await asyncio.sleep(0.001)


def alive(pid: int) -> bool:
    """Whether a process lives (a zombie does not)."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return raw[raw.rindex(b")") + 2 : raw.rindex(b")") + 3] not in b"ZX"


def children() -> list[int]:
    """Return the children of this process's main thread, dead or alive."""
    return list(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def zombies() -> list[int]:
    """Return the children of this process that have exited and are not reaped.

    Without those that read what programs left behind write: they outlive the daemon, and end with such a program.
    """
    found = []
    for pid in children():
        with contextlib.suppress(OSError):
            if not alive(pid) and Path(f"/proc/{pid}/comm").read_text() != "cnprocd-drain\n":
                found.append(pid)
    return found
