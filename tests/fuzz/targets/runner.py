"""Frames between the daemon and the runner: runner/wire.py, and what the session of runner/service.py does with them.

Invariant: WireError or messages, nothing else, and the same messages for every way to cut the stream. For any input, a
session starts only hooks of the rules that the runner knows, with the settings and the user of the rule, for at most
the time of the rule, and each attempt once. The input of a hook (render.py) has no NUL, keeps the limits of execve, and
has every variable that the runner sets with the value that the runner set.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
from dataclasses import replace
from functools import partial
from typing import Any, cast

from fuzz.mutate import json_damaged, json_text
from fuzz.target import Target, outcome, pieces

from cnprocd.launch import render
from cnprocd.launch.program import HookRefusedError
from cnprocd.launch.request import AttemptResult, Ending
from cnprocd.launch.user import resolve_user
from cnprocd.rules.language.actions import HookModel
from cnprocd.rules.language.plain import plain
from cnprocd.rules.values import Field, Template
from cnprocd.runner import wire
from cnprocd.runner.attempts import Attempts
from cnprocd.runner.results import Results
from cnprocd.runner.rule_snapshots import FilesRead, RuleSnapshots
from cnprocd.runner.service import Session
from cnprocd.runner.wire_validate import from_daemon

_LENGTH = struct.Struct(">I")
_ID, _OTHER_ID, _SNAPSHOT = "0" * 32, "1" * 32, "5" * 64
_EVENT = {
    "rule": "a", "kind": "exit", "pid": 7, "comm": "x\\xff", "comm_hex": "78ff", "exe": None, "unit": "a.service",
    "unit_hex": "612e73", "exit_code": None, "signal": "SIGKILL", "core_dumped": False, "job_id": 3, "lifetime_s": 1.5,
}  # fmt: skip
_RUN = {
    "type": "run", "attempt_id": _ID, "rule": "a", "job_id": 5, "attempt": 1, "limit_s": 9.0,
    "snapshot": _SNAPSHOT, "events_left_out": 0, "kernel_time_ns": 12, "events": [_EVENT],
}  # fmt: skip
_SENT = (
    {"type": "hello", "version": 3, "pid": 3}, _RUN, _RUN, _RUN, {**_RUN, "rule": "b", "attempt_id": _OTHER_ID},
    {"type": "take_snapshot", "wanted": _SNAPSHOT, "keep": [_SNAPSHOT]},
    {"type": "take_snapshot", "wanted": _SNAPSHOT, "keep": None},
    {"type": "snapshot_taken", "wanted": _SNAPSHOT, "digest": None, "error": "why"},
    {"type": "resume", "attempt_id": _OTHER_ID},
    {"type": "terminate", "attempt_id": _ID, "grace_s": 2.5}, {"type": "announced", "attempt_id": _ID, "hook_pid": 7},
    {"type": "launched", "attempt_id": _ID, "latency_ms": None},
    {"type": "output", "attempt_id": _ID, "line": "said\udcff"},
    {"type": "ended", "attempt_id": _ID, "reason": None, "exit_code": 0},
    {"type": "not_now", "attempt_id": _ID, "reason": "why"},
)  # fmt: skip
_WORDS = (
    "type", "run", "terminate", "hello", "events", "limit_s", "user", "command", "comm_hex", "unit_hex", "signal",
    "exit_code", "core_dumped", "path", "ld_preload", "job_id", "a", "b", "0", "zz", "SIGKILL", "PATH", "__class__",
)  # fmt: skip
_COMMAND = (
    Template(("/bin/true",)),
    *(Template((Field(name),)) for name in ("comm", "unit", "pid", "signal", "lifetime_s")),
    Template(("--exe=", Field("exe"))),
)
_HOOK = replace(plain(HookModel.model_validate({"command": ["/bin/true"]})), command=_COMMAND)
_HOOKS = {
    "a": replace(_HOOK, user="root", timeout_s=5.0, env={"NAME": Template(("n ", Field("comm")))}),
    "b": replace(_HOOK, timeout_s=1.0),
}


class FakeAttempt:
    """A hook that ends as soon as it is waited for."""

    latency_ms = 1.0
    pid = 4242

    def __init__(self, request):
        self.request = request

    def terminate(self, grace_s: float) -> None:
        assert 0 <= grace_s <= 60

    async def wait(self, emit, launched):
        launched(self)
        emit("line")
        return Ending(AttemptResult(None, 0))


class FakeLauncher:
    """Checks what it is to start, and starts nothing."""

    def __init__(self) -> None:
        self.launched = 0

    def launch(self, request, announce):
        hook = request.hook
        assert hook is _HOOKS[request.rule]
        assert request.user.name == "root"
        assert 0 < request.limit_s <= hook.timeout_s
        self.launched += 1
        argv = render.argv(hook, request.first_record)
        assert argv[0] == b"/bin/true"
        assert len(argv) == len(hook.command)
        env = render.environment(request)
        assert (env[b"PATH"], env[b"HOME"], env[b"CNPROCD_JOB_ID"]) == (
            render.PATH.encode(),
            b"/root",
            b"%d" % request.job_id,
        )
        assert all(name.startswith((b"CNPROCD_", b"MONITOR_")) or name in _OWN for name in env), env
        texts = [*argv, *env, *env.values()]
        assert not any(b"\0" in text or len(text) > render.MOST_VALUE_BYTES for text in texts)
        assert not any(b"=" in name for name in env)
        assert render.standard_input(request).count(b"\n") == len(request.events)
        announce(4242)
        return FakeAttempt(request)


_OWN = {b"PATH", b"LANG", b"HOME", b"USER", b"LOGNAME", b"SHELL", b"NAME"}


class FakeReader:
    """Has one snapshot, and rule files with its digest."""

    async def stored(self, digest):
        return _HOOKS if digest == _SNAPSHOT else None

    async def accept(self, wanted, keep):
        return await self.files(wanted)

    async def files(self, wanted):
        return FilesRead(_SNAPSHOT, _HOOKS if wanted == _SNAPSHOT else None)


class FakeWriter:
    def __init__(self) -> None:
        self.frames = bytearray()

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.frames += data


class Runner(Target):
    name = "runner"
    executions = 300_000
    tokens = (
        b'{"type":"run",',
        b'"events":[{}]',
        b"[" * 300,
        b"9" * 4400,
        b"NaN",
        b"Infinity",
        b'"comm_hex":"zz"',
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
    )

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self._loop.close()

    def made(self) -> list[bytes]:
        return [self._framed(json.dumps(one).encode()) for one in _SENT]

    @staticmethod
    def _framed(body: bytes) -> bytes:
        return _LENGTH.pack(len(body)) + body

    def mutated(self, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return super().mutated(rng)
        chosen = [rng.choice(_SENT) for _ in range(1 + rng.getrandbits(1))]
        return b"".join(self._framed(json_text(json_damaged(rng, one, _WORDS))) for one in chosen)

    def check(self, data: bytes) -> None:
        whole = self._bodies([data])
        assert whole == self._bodies(pieces(random.Random(len(data)), data))
        for body in whole[0]:
            said, _ = outcome(partial(wire.from_runner, body), wire.WireError)
            assert said is None or wire.frame(said)
        self._loop.run_until_complete(self._served(whole[0]))

    @staticmethod
    def _bodies(parts: list[bytes]) -> tuple[list[bytes], str]:
        buffer, found = bytearray(), list[bytes]()
        try:
            for part in parts:
                buffer += part
                found += wire.bodies(buffer)
                assert len(buffer) <= wire.MOST_FRAME_BYTES + 4
        except wire.WireError as error:
            return found, str(error)
        return found, ""

    async def _served(self, bodies: list[bytes]) -> None:
        launcher, writer = FakeLauncher(), FakeWriter()
        snapshots = RuleSnapshots(FakeReader())
        await snapshots.find(_SNAPSHOT)

        def log(*_: object, **fields: object) -> None:
            """Log nothing."""

        attempts = Attempts(
            cast(Any, launcher), snapshots, Results(None), log, resolve_user,
            lambda message: session.send(message), lambda: None,  # noqa: PLW0108  # it is made below
        )  # fmt: skip
        session = Session(cast(Any, None), attempts, snapshots, log)
        session._writer = cast(Any, writer)
        started: set[str] = set()
        try:
            for body in bodies:
                message = from_daemon(body)
                if isinstance(message, wire.Resume):
                    continue  # of an unknown attempt: all of /proc is read
                before = launcher.launched
                session._receive(message)
                if launcher.launched > before:
                    assert isinstance(message, wire.Run)
                    assert message.attempt_id not in started
                    started.add(message.attempt_id)
        except (wire.WireError, HookRefusedError):
            pass
        finally:
            await attempts.finish(60)
            if session._taking is not None:
                await asyncio.wait([session._taking])
        assert len(attempts) == 0
        for body in wire.bodies(writer.frames):
            wire.from_runner(body)
