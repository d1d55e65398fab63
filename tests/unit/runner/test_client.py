"""The reader's and the runner's half together: a real unix socket, real hooks, and a reader that means no good."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.launch.identity import resolve
from cnprocd.rules.values import Template
from cnprocd.runner import client as remote
from cnprocd.runner import service as serve
from cnprocd.runner import wire
from cnprocd.runner.client import Remote
from cnprocd.runner.service import Service
from cnprocd.spool.job import HookSpec, Job, State

ATTEMPT_ID = "0" * 32
LIMIT_S = 20.0


def spec(rule: str, script: str, timeout_s: float = 10.0) -> HookSpec:
    return HookSpec(
        rule=rule, command=tuple(Template((part,)) for part in ("/bin/sh", "-c", script)), timeout_s=timeout_s
    )


def job(rule: str, job_id: int = 1) -> Job:
    return Job(
        job_id=job_id, rule=rule, state=State.RUNNING, serialize_key=None, kernel_time_ns=None, boot_id="",
        created_ns=0, due_ns=0, attempts=1, failures=0, event_count=1, events=({"pid": 4711, "comm": "x"},),
    )  # fmt: skip


class World:
    """A runner service and a reader's launcher in one loop."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "runner.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.specs: dict[str, HookSpec] = {}
        self.records: list[dict[str, object]] = []
        self.runners: list[int] = []
        self.service = Service(self.listener, lambda: self.specs, {os.getuid()}, self.log, None)
        self.remote = Remote(self.path, self.log, self.runners.append)

    def log(self, level: str, event: str, **fields: object) -> None:
        self.records.append({"level": level, "event": event, **fields})

    def launch(self, rule: str, job_id: int = 1, limit_s: float = 10.0, announce=lambda pid: None):
        who = resolve(None, None)
        local = self.specs.get(rule, spec(rule, "false"))
        return self.remote.launch(job(rule, job_id), local, who, ATTEMPT_ID, limit_s=limit_s, announce=announce)


@asynccontextmanager
async def world(directory: Path):
    it = World(directory)
    serving = asyncio.ensure_future(it.service.serve(idle_s=60))
    try:
        async with asyncio.timeout(LIMIT_S):
            yield it
    finally:
        it.remote.close()
        it.service.stop()
        await asyncio.wait_for(serving, LIMIT_S)
        it.listener.close()


def play(directory: Path, scene) -> object:
    async def main() -> object:
        async with world(directory) as it:
            return await scene(it)

    return asyncio.run(main())


def test_a_hook_runs_and_everything_about_it_comes_back(tmp_path):
    async def scene(it: World) -> None:
        it.specs["r"] = spec("r", 'echo "$CNPROCD_PID $CNPROCD_JOB_ID"; cat; exit 3')
        lines, launched, announced = [], [], []
        one = it.launch("r", 7, announce=announced.append)
        ending = await one.attend(lines.append, launched.append)
        assert it.runners == [os.getpid()]
        assert (ending.attempt.exit_code, ending.attempt.reason, ending.interrupted) == (3, "exit code 3", False)
        assert launched == [one]
        assert announced == [one.pid]
        assert lines[0] == "4711 7"
        assert json.loads(lines[1]) == {"pid": 4711, "comm": "x", "job_id": 7}

    play(tmp_path, scene)


def test_what_the_reader_believes_about_a_rule_does_not_matter(tmp_path):
    """The reader's own idea of the command is not even sent."""

    async def scene(it: World) -> list[str]:
        it.specs["r"] = spec("r", "echo from the rules")
        lines = []
        forged = spec("r", "echo forged")
        one = it.remote.launch(job("r"), forged, resolve(None, None), ATTEMPT_ID, limit_s=9, announce=lambda pid: None)
        await one.attend(lines.append, lambda one: None)
        return lines

    assert play(tmp_path, scene) == ["from the rules"]


def test_a_rule_that_the_runner_does_not_know_is_refused(tmp_path):
    async def scene(it: World):
        return await it.launch("nowhere").attend(lambda line: None, lambda one: None)

    ending = play(tmp_path, scene)
    assert ending.attempt.reason == "the runner knows no rule 'nowhere' with a hook"
    assert not ending.interrupted
    assert not ending.not_started


@pytest.mark.parametrize(("asked_s", "ruled_s"), [(0.2, 10.0), (10.0, 0.2)])
def test_the_shorter_limit_holds(tmp_path, asked_s, ruled_s):
    async def scene(it: World):
        it.specs["r"] = spec("r", "exec sleep 100", ruled_s)
        return await it.launch("r", limit_s=asked_s).attend(lambda line: None, lambda one: None)

    assert play(tmp_path, scene).attempt.reason == "timed out after 0.2 s"


def test_a_hook_can_be_cut(tmp_path):
    async def scene(it: World):
        it.specs["r"] = spec("r", "exec sleep 100")
        one = it.launch("r")
        return await one.attend(lambda line: None, lambda running: running.cut(0.5))

    assert play(tmp_path, scene).interrupted


def test_a_stranger_is_turned_away(tmp_path):
    async def scene(it: World):
        it.service._allowed = frozenset({os.getuid() + 1})
        return await it.launch("r").attend(lambda line: None, lambda one: None), it.records

    ending, records = play(tmp_path, scene)
    assert ending.not_started
    assert [record["event"] for record in records] == ["runner_refused"]


def test_without_a_runner_the_job_is_told_to_wait(tmp_path):
    async def scene(it: World) -> None:
        it.path.unlink()
        with pytest.raises(OSError, match="cannot reach the runner"):
            it.launch("r")

    play(tmp_path, scene)


def test_a_daemon_that_leaves_has_its_hooks_ended_first(tmp_path):
    """Two tries of one job must never run at once, whatever happens to the reader between them."""

    async def scene(it: World) -> None:
        # It ignores TERM, writes when it begins, and holds a lock that the second try would fail to get.
        script = f"trap '' TERM; exec 9>{tmp_path}/lock; flock -n 9 || exit 77; echo $$; sleep 100"
        it.specs["r"] = spec("r", script, 60)
        it.specs["probe"] = spec("probe", f"exec 9>{tmp_path}/lock; flock -n 9")
        begun = asyncio.get_running_loop().create_future()
        one = it.launch("r", limit_s=60)
        waiting = asyncio.ensure_future(one.attend(begun.set_result, lambda one: None))
        pid = int(await begun)
        it.remote.close()
        assert (await waiting).interrupted
        second = await it.launch("probe", 2).attend(lambda line: None, lambda one: None)
        assert second.attempt.reason is None
        assert not Path(f"/proc/{pid}").exists()

    play(tmp_path, scene)


def test_a_runner_that_dies_interrupts_what_it_ran(tmp_path):
    """A runner of the test's own: it greets, takes a run, and goes."""

    async def scene(it: World) -> None:
        path = tmp_path / "short.sock"

        async def short_lived(reader, writer) -> None:
            writer.write(wire.frame(wire.Hello(version=wire.VERSION, pid=1)))
            body = bytearray(await reader.read(1 << 16))
            while len(list(wire.bodies(bytearray(body)))) < 2:
                body += await reader.read(1 << 16)
            writer.close()

        server = await asyncio.start_unix_server(short_lived, path)
        far = Remote(path, it.log, lambda pid: None)
        one = far.launch(job("r"), spec("r", ""), resolve(None, None), ATTEMPT_ID, limit_s=9, announce=lambda pid: None)
        ending = await one.attend(lambda line: None, lambda one: None)
        assert ending.interrupted
        assert not ending.not_started
        server.close()

    play(tmp_path, scene)


RUN = asdict(
    wire.Run(
        try_id=1,
        rule="r",
        job_id=1,
        attempts=1,
        attempt_id=ATTEMPT_ID,
        limit_s=1.0,
        kernel_time_ns=None,
        events=[{"pid": 1}],
    )
)
HELLO = {"type": "hello", "version": wire.VERSION}


@pytest.mark.parametrize(
    "bodies",
    [
        [HELLO, RUN | {"command": ["/bin/sh"]}],
        [HELLO, RUN | {"user": 0}],
        [HELLO, RUN | {"events": []}],
        [HELLO, RUN | {"events": [{"A=B": 1}]}],
        [HELLO, RUN | {"events": [{"PATH": "/tmp"}]}],
        [HELLO, RUN | {"limit_s": -1}],
        [HELLO, RUN | {"try_id": "1"}],
        [HELLO, RUN | {"attempt_id": "../../etc"}],
        [HELLO, RUN, RUN],
        [HELLO | {"version": 99}],
        [{"type": "exec"}],
        [[]],
        [b"\xff\xfe not json"],
        [b"x" * 10, struct.pack(">I", wire.MOST_FRAME_BYTES + 1)],
    ],
    ids=repr,
)
def test_a_peer_that_breaks_the_protocol_is_cut_off_alone(tmp_path, bodies):
    async def scene(it: World) -> None:
        it.specs["r"] = spec("r", "exec sleep 100")
        it.specs["good"] = spec("good", "exit 0")
        reader, writer = await asyncio.open_unix_connection(it.path)
        for body in bodies:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            whole = raw if len(raw) == 4 else struct.pack(">I", len(raw)) + raw
            writer.write(whole)
        while await reader.read(1 << 16):  # EOF: cut off
            pass
        writer.close()
        assert [record["event"] for record in it.records] == ["runner_protocol"]
        ending = await it.launch("good").attend(lambda line: None, lambda one: None)
        assert ending.attempt.reason is None

    play(tmp_path, scene)


def test_the_service_ends_when_nobody_comes(tmp_path):
    async def main() -> None:
        it = World(tmp_path)
        async with asyncio.timeout(LIMIT_S):
            await it.service.serve(idle_s=0.05)
        it.listener.close()

    asyncio.run(main())


def test_the_reader_lets_go_of_an_idle_runner(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "IDLE_S", 0.05)

    async def main() -> None:
        it = World(tmp_path)
        it.specs["r"] = spec("r", "exit 0")
        serving = asyncio.ensure_future(it.service.serve(idle_s=0.2))
        async with asyncio.timeout(LIMIT_S):
            await it.launch("r").attend(lambda line: None, lambda one: None)
            await serving
        it.listener.close()

    asyncio.run(main())


def test_the_kernel_says_who_connected():
    left, right = socket.socketpair(socket.AF_UNIX)
    assert serve.peer_uid(left) == os.getuid()
    left.close()
    right.close()


@given(st.lists(st.binary(max_size=50), max_size=10), st.lists(st.integers(1, 20), max_size=100))
def test_frames_survive_any_splitting(bodies, cuts):
    stream = b"".join(struct.pack(">I", len(body)) + body for body in bodies)
    buffer, seen = bytearray(), []
    for cut in [*cuts, len(stream)]:
        buffer += stream[:cut]
        stream = stream[cut:]
        seen += wire.bodies(buffer)
    assert seen == bodies
    assert not buffer
