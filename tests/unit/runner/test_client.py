"""The daemon's client and the runner together: a real unix socket, real hooks, and a hostile peer."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.reaping import children_reaped  # noqa: F401 (a fixture)
from unit.runnerkit import ATTEMPT_ID, LIMIT_S, SNAPSHOT, World, hook, play, request

from cnprocd.runner import client, wire
from cnprocd.runner import service as runner_service


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


RUN = asdict(
    wire.Run(
        rule="r",
        snapshot=SNAPSHOT,
        events_left_out=0,
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
        [struct.pack(">I", wire.MOST_FRAME_BYTES + 1), b"x" * 300],
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
        ending = await it.launch("good", 2).wait(lambda line: None, lambda one: None)
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
