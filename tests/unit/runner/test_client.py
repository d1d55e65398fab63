"""The daemon's client and the runner together: a real unix socket, real hooks, and a hostile peer."""

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
from unit.hookkit import launch_request, shell

from cnprocd.launch.request import LaunchRequest
from cnprocd.rules.ruleset import Hook
from cnprocd.runner import client, wire
from cnprocd.runner import service as runner_service
from cnprocd.runner.client import RunnerClient
from cnprocd.runner.service import Service

ATTEMPT_ID = "0" * 32
LIMIT_S = 20.0


def hook(script: str, timeout_s: float = 10.0) -> Hook:
    return shell(script, timeout_s=timeout_s)


def request(rule: str, wanted: Hook, job_id: int = 1, limit_s: float = 10.0) -> LaunchRequest:
    event = {"pid": 4711, "comm": "x"}
    return launch_request(wanted, event, rule=rule, job_id=job_id, attempt_id=ATTEMPT_ID, limit_s=limit_s)


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
        self.service = Service(self.listener, lambda: self.hooks, {os.getuid()}, self.log, None)
        self.client = RunnerClient(self.path, self.log, self.runners.append)

    def log(self, level: str, event: str, **fields: object) -> None:
        self.records.append({"level": level, "event": event, **fields})

    def launch(self, rule: str, job_id: int = 1, limit_s: float = 10.0, announce=lambda pid: None):
        return self.client.launch(request(rule, self.hooks.get(rule, hook("false")), job_id, limit_s), announce)


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


def play(directory: Path, scene):
    async def main():
        async with world(directory) as it:
            return await scene(it)

    return asyncio.run(main())


def test_a_hook_runs_and_everything_about_it_comes_back(tmp_path):
    async def scene(it: World) -> None:
        it.hooks["r"] = hook('echo "$CNPROCD_PID $CNPROCD_JOB_ID"; cat; exit 3')
        lines, launched, announced = [], [], []
        one = it.launch("r", 7, announce=announced.append)
        ending = await one.wait(lines.append, launched.append)
        assert it.runners == [os.getpid()]
        assert (ending.result.exit_code, ending.result.reason, ending.interrupted) == (3, "exit code 3", False)
        assert launched == [one]
        assert announced == [one.pid]
        assert lines[0] == "4711 7"
        assert json.loads(lines[1]) == {"pid": 4711, "comm": "x", "job_id": 7}

    play(tmp_path, scene)


def test_the_daemons_own_hook_settings_are_ignored(tmp_path):
    """The command that the daemon knows is not sent."""

    async def scene(it: World) -> list[str]:
        it.hooks["r"] = hook("echo from the rules")
        lines = []
        forged = hook("echo forged")
        one = it.client.launch(request("r", forged), lambda pid: None)
        await one.wait(lines.append, lambda one: None)
        return lines

    assert play(tmp_path, scene) == ["from the rules"]


def test_a_rule_that_the_runner_does_not_know_is_refused(tmp_path):
    async def scene(it: World):
        return await it.launch("nowhere").wait(lambda line: None, lambda one: None)

    ending = play(tmp_path, scene)
    assert ending.result.reason == "the runner has no rule 'nowhere' with a hook"
    assert not ending.interrupted
    assert not ending.not_started


@pytest.mark.parametrize(("asked_s", "ruled_s"), [(0.2, 10.0), (10.0, 0.2)])
def test_the_shorter_limit_holds(tmp_path, asked_s, ruled_s):
    async def scene(it: World):
        it.hooks["r"] = hook("exec sleep 100", ruled_s)
        return await it.launch("r", limit_s=asked_s).wait(lambda line: None, lambda one: None)

    assert play(tmp_path, scene).result.reason == "timed out after 0.2 s"


def test_a_hook_can_be_terminated(tmp_path):
    async def scene(it: World):
        it.hooks["r"] = hook("exec sleep 100")
        one = it.launch("r")
        return await one.wait(lambda line: None, lambda running: running.terminate(0.5))

    assert play(tmp_path, scene).interrupted


def test_a_peer_with_another_uid_is_refused(tmp_path):
    async def scene(it: World):
        it.service._allowed = frozenset({os.getuid() + 1})
        return await it.launch("r").wait(lambda line: None, lambda one: None), it.records

    ending, records = play(tmp_path, scene)
    assert ending.not_started
    assert [record["event"] for record in records] == ["runner_refused"]


def test_without_a_runner_launch_raises_oserror(tmp_path):
    async def scene(it: World) -> None:
        it.path.unlink()
        with pytest.raises(OSError, match="cannot reach the runner"):
            it.launch("r")

    play(tmp_path, scene)


def test_a_daemon_that_leaves_has_its_hooks_ended_first(tmp_path):
    """Two attempts of one job must never run at once, whatever happens to the daemon between them."""

    async def scene(it: World) -> None:
        # It ignores TERM, writes when it begins, and holds a lock that the second attempt would fail to get.
        script = f"trap '' TERM; exec 9>{tmp_path}/lock; flock -n 9 || exit 77; echo $$; sleep 100"
        it.hooks["r"] = hook(script, 60)
        it.hooks["probe"] = hook(f"exec 9>{tmp_path}/lock; flock -n 9")
        begun = asyncio.get_running_loop().create_future()
        one = it.launch("r", limit_s=60)
        waiting = asyncio.ensure_future(one.wait(begun.set_result, lambda one: None))
        pid = int(await begun)
        it.client.close()
        assert (await waiting).interrupted
        second = await it.launch("probe", 2).wait(lambda line: None, lambda one: None)
        assert second.result.reason is None
        assert not Path(f"/proc/{pid}").exists()

    play(tmp_path, scene)


def test_a_runner_that_dies_interrupts_what_it_ran(tmp_path):
    """The test's own runner greets, receives a run, and closes."""

    async def scene(it: World) -> None:
        path = tmp_path / "short.sock"

        async def short_lived(reader, writer) -> None:
            writer.write(wire.frame(wire.Hello(version=wire.VERSION, pid=1)))
            body = bytearray(await reader.read(1 << 16))
            while len(list(wire.bodies(bytearray(body)))) < 2:
                body += await reader.read(1 << 16)
            writer.close()

        server = await asyncio.start_unix_server(short_lived, path)
        far = RunnerClient(path, it.log, lambda pid: None)
        one = far.launch(request("r", hook("")), lambda pid: None)
        ending = await one.wait(lambda line: None, lambda one: None)
        assert ending.interrupted
        assert not ending.not_started
        server.close()

    play(tmp_path, scene)


RUN = asdict(
    wire.Run(
        rule="r",
        job_id=1,
        attempt=1,
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
        [HELLO, RUN | {"job_id": "1"}],
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
def test_a_peer_that_breaks_the_protocol_is_disconnected(tmp_path, bodies):
    async def scene(it: World) -> None:
        it.hooks["r"] = hook("exec sleep 100")
        it.hooks["good"] = hook("exit 0")
        reader, writer = await asyncio.open_unix_connection(it.path)
        for body in bodies:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            whole = raw if len(raw) == 4 else struct.pack(">I", len(raw)) + raw
            writer.write(whole)
        while await reader.read(1 << 16):  # EOF: the connection was closed
            pass
        writer.close()
        assert [record["event"] for record in it.records] == ["runner_protocol"]
        ending = await it.launch("good").wait(lambda line: None, lambda one: None)
        assert ending.result.reason is None

    play(tmp_path, scene)


def test_the_service_ends_without_connections(tmp_path):
    async def main() -> None:
        it = World(tmp_path)
        async with asyncio.timeout(LIMIT_S):
            await it.service.serve(idle_s=0.05)
        it.listener.close()

    asyncio.run(main())


def test_the_client_closes_an_idle_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "IDLE_S", 0.05)

    async def main() -> None:
        it = World(tmp_path)
        it.hooks["r"] = hook("exit 0")
        serving = asyncio.ensure_future(it.service.serve(idle_s=0.2))
        async with asyncio.timeout(LIMIT_S):
            await it.launch("r").wait(lambda line: None, lambda one: None)
            await serving
        it.listener.close()

    asyncio.run(main())


def test_peer_uid_comes_from_the_kernel():
    left, right = socket.socketpair(socket.AF_UNIX)
    assert runner_service.peer_uid(left) == os.getuid()
    left.close()
    right.close()


@given(st.lists(st.binary(max_size=50), max_size=10), st.lists(st.integers(1, 20), max_size=100))
def test_frames_survive_any_splitting(bodies, sizes):
    stream = b"".join(struct.pack(">I", len(body)) + body for body in bodies)
    buffer, seen = bytearray(), []
    for size in [*sizes, len(stream)]:
        buffer += stream[:size]
        stream = stream[size:]
        seen += wire.bodies(buffer)
    assert seen == bodies
    assert not buffer
