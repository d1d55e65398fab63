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

from fuzz.mutate import json_damaged, json_text
from fuzz.target import Target, outcome, pieces

from cnprocd.launch import render
from cnprocd.launch.attempt import Ending
from cnprocd.launch.program import HookRefusedError
from cnprocd.rules.values import Field, Template
from cnprocd.runner import wire
from cnprocd.runner import wire_validate as strict
from cnprocd.runner.service import Session
from cnprocd.spool.job import Attempt, HookSpec, Identity

_LENGTH = struct.Struct(">I")
_EVENT = {
    "rule": "a", "kind": "exit", "pid": 7, "comm": "x\\xff", "comm_hex": "78ff", "exe": None, "unit": "a.service",
    "unit_hex": "612e73", "exit_code": None, "signal": "SIGKILL", "core_dumped": False, "job_id": 3, "lifetime_s": 1.5,
}  # fmt: skip
_RUN = {
    "type": "run", "try_id": 1, "rule": "a", "job_id": 5, "attempts": 1, "attempt_id": "0" * 32, "limit_s": 9.0,
    "kernel_time_ns": 12, "events": [_EVENT],
}  # fmt: skip
_SENT = (
    {"type": "hello", "version": 1, "pid": 3}, _RUN, _RUN, _RUN, {**_RUN, "rule": "b", "try_id": 2},
    {"type": "cut", "try_id": 1, "grace_s": 2.5}, {"type": "announced", "try_id": 1, "hook_pid": 7},
    {"type": "launched", "try_id": 1, "latency_ms": None}, {"type": "output", "try_id": 1, "line": "said\udcff"},
    {"type": "ended", "try_id": 1, "reason": None, "exit_code": 0}, {"type": "not_now", "try_id": 1, "reason": "why"},
)  # fmt: skip
_WORDS = (
    "type", "run", "cut", "hello", "events", "limit_s", "user", "command", "comm_hex", "unit_hex", "signal",
    "exit_code", "core_dumped", "path", "ld_preload", "job_id", "a", "b", "0", "zz", "SIGKILL", "PATH", "__class__",
)  # fmt: skip
_WHO = Identity(0, 0, (), "root", "/root", "/bin/sh", False)
_COMMAND = (
    Template(("/bin/true",)),
    *(Template((Field(name),)) for name in ("comm", "unit", "pid", "signal", "lifetime_s")),
    Template(("--exe=", Field("exe"))),
)
_SPECS = {
    "a": HookSpec("a", _COMMAND, user="root", timeout_s=5.0, env={"NAME": Template(("n ", Field("comm")))}),
    "b": HookSpec("b", _COMMAND, timeout_s=1.0),
}


class FakeTry:
    """A hook that ends at the first look."""

    latency_ms = 1.0

    def cut(self, grace_s: float) -> None:
        assert 0 <= grace_s <= 60

    async def attend(self, emit, launched):
        launched(self)
        emit("line")
        return Ending(Attempt(None, 0))


class FakeHere:
    """Check the requests and start nothing."""

    def __init__(self) -> None:
        self.launched = 0

    def launch(self, job, spec, who, attempt_id, *, limit_s, announce):
        assert spec is _SPECS[job.rule]
        assert who.name == "root"
        assert 0 < limit_s <= spec.timeout_s
        self.launched += 1
        argv = render.argv(spec, job)
        assert argv[0] == b"/bin/true"
        assert len(argv) == len(spec.command)
        env = render.environment(spec, job, _WHO, attempt_id)
        assert (env[b"PATH"], env[b"HOME"], env[b"CNPROCD_JOB_ID"]) == (
            render.PATH.encode(),
            b"/root",
            b"%d" % job.job_id,
        )
        assert all(name.startswith((b"CNPROCD_", b"MONITOR_")) or name in _OWN for name in env), env
        texts = [*argv, *env, *env.values()]
        assert not any(b"\0" in text or len(text) > render.MOST_VALUE_BYTES for text in texts)
        assert not any(b"=" in name for name in env)
        assert render.standard_input(job).count(b"\n") == len(job.events)
        announce(4242)
        return FakeTry()


_OWN = {b"PATH", b"LANG", b"HOME", b"USER", b"LOGNAME", b"SHELL", b"NAME"}


class FakeWriter:
    def __init__(self) -> None:
        self.frames = bytearray()

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
            said, _ = outcome(lambda body=body: wire.from_runner(body), wire.WireError)
            assert said is None or wire.frame(said)
        self._loop.run_until_complete(self._served(whole[0]))

    @staticmethod
    def _bodies(parts: list[bytes]) -> tuple[list[bytes], str]:
        buffer, found = bytearray(), []
        try:
            for part in parts:
                buffer += part
                found += wire.bodies(buffer)
                assert len(buffer) <= wire.MOST_FRAME_BYTES + 4
        except wire.WireError as error:
            return found, str(error)
        return found, ""

    async def _served(self, bodies: list[bytes]) -> None:
        here, tries = FakeHere(), set()
        session = Session(None, here, lambda: _SPECS, tries, lambda *said, **fields: None)
        session._writer = FakeWriter()
        started: set[int] = set()
        try:
            for body in bodies:
                message = strict.from_reader(body)
                before = here.launched
                session._hear(message)
                if here.launched > before:
                    assert message.try_id not in started
                    started.add(message.try_id)
        except (wire.WireError, HookRefusedError):
            pass
        finally:
            if session._tasks:
                done, _ = await asyncio.wait(list(session._tasks))
                for task in done:
                    task.result()
        assert not session._mine
        assert not tries
        for body in wire.bodies(session._writer.frames):
            wire.from_runner(body)
