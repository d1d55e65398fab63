"""The runner acts on snapshots: which one, what if the files differ, what if a frame is too long."""

from __future__ import annotations

import asyncio
import json
import struct

import pytest
from unit.hookkit import launch_request
from unit.runnerkit import ATTEMPT_ID, SNAPSHOT, World, hook, play, request

from cnprocd.launch.program import HookRefusedError
from cnprocd.runner import wire
from cnprocd.runner.rule_snapshots import FilesRead

OTHER = "7" * 64


def quiet(line: str) -> None:
    """Take a line of output."""


def test_the_hook_of_the_named_snapshot_runs(tmp_path):
    """The files have other hooks by now, which were not accepted."""

    async def scene(it: World) -> None:
        it.kept[SNAPSHOT] = {"r": hook("exit 5")}
        it.files_digest, it.hooks["r"] = OTHER, hook("exit 6")
        assert (await it.launch("r").wait(quiet, quiet)).result.exit_code == 5

    play(tmp_path, scene)


def test_a_lost_snapshot_is_made_again_of_the_same_files(tmp_path):
    async def scene(it: World) -> None:
        it.hooks["r"] = hook("exit 5")
        it.kept.clear()
        assert (await it.launch("r").wait(quiet, quiet)).result.exit_code == 5

    play(tmp_path, scene)


def test_without_the_snapshot_the_job_waits(tmp_path):
    """Other files do not replace it."""

    async def scene(it: World) -> None:
        it.hooks["r"] = hook("exit 5")
        it.kept.clear()
        it.files_digest = OTHER
        ending = await it.launch("r").wait(quiet, quiet)
        assert ending.not_started
        assert "no snapshot 555555555555" in str(ending.result.reason)

    play(tmp_path, scene)


def test_a_snapshot_is_taken_only_of_the_wanted_files(tmp_path):
    async def scene(it: World) -> None:
        it.kept.clear()
        it.files_digest = OTHER
        assert await it.client.take_snapshot(SNAPSHOT, []) == OTHER
        assert not it.kept
        it.files_digest = SNAPSHOT
        for keep in ([OTHER], None):
            assert await it.client.take_snapshot(SNAPSHOT, keep) == SNAPSHOT
            assert it.keep == keep
        assert list(it.kept) == [SNAPSHOT]

    play(tmp_path, scene)


def test_asking_again_for_a_snapshot_does_not_begin_again(tmp_path):
    """The runner is too slow for the daemon's patience. The first answer is also that of the second request."""

    async def scene(it: World) -> None:
        it.hooks["r"] = hook("true")
        reads, read, may_end = [], it.files, asyncio.Event()

        async def slowly(wanted: str, keep) -> FilesRead:
            reads.append(wanted)
            await may_end.wait()
            return await read(wanted)

        setattr(it, "accept", slowly)  # noqa: B010
        assert (await it.launch("r").wait(quiet, quiet)).result.exit_code == 0  # its hooks are in memory from now on
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(it.client.take_snapshot(SNAPSHOT, []), 0.01)
        while not reads:
            await asyncio.sleep(0)
        again = asyncio.ensure_future(it.client.take_snapshot(SNAPSHOT, []))
        await it.launch("r", job_id=2).wait(quiet, quiet)  # so the second request has arrived
        may_end.set()
        assert await again == SNAPSHOT
        assert reads == [SNAPSHOT]

    play(tmp_path, scene)


def test_a_frame_that_is_too_long_is_refused_alone(tmp_path):
    """The hook that runs goes on, and so does the connection. The refusal is final."""

    async def scene(it: World) -> None:
        it.hooks["r"] = hook("exit 0")
        reader, writer = await asyncio.open_unix_connection(it.path)
        run = {
            "attempt_id": ATTEMPT_ID, "attempt": 1, "snapshot": SNAPSHOT, "rule": "r", "job_id": 1, "limit_s": 5.0,
            "kernel_time_ns": None, "events_left_out": 0,
        }  # fmt: skip
        event = {"pid": 1, "cmdline": "x" * 4096}
        many = [event] * (wire.MOST_FRAME_BYTES // 4096 + 1)
        for body in (
            {"type": "hello", "version": wire.VERSION},
            {"type": "run", **run, "events": many},
            {"type": "run", **run, "attempt_id": "1" * 32, "events": [event]},
        ):
            raw = json.dumps(body).encode()
            writer.write(struct.pack(">I", len(raw)) + raw)
            await writer.drain()
        buffer, ended = bytearray(), {}
        while len(ended) < 2:
            buffer += await reader.read(1 << 16)
            for content in wire.bodies(buffer):
                message = wire.from_runner(content)
                if isinstance(message, wire.Ended):
                    ended[message.attempt_id] = message.reason
        writer.close()
        assert ended["1" * 32] is None
        assert ended[ATTEMPT_ID].startswith("a frame of ")

    play(tmp_path, scene)


def test_the_client_sends_no_frame_that_is_too_long(tmp_path):
    async def scene(it: World) -> None:
        wanted = hook("true")
        with pytest.raises(HookRefusedError, match="its newest event is longer"):
            it.client.launch(
                launch_request(wanted, {"pid": 1, "cmdline": "x" * wire.MOST_FRAME_BYTES}, snapshot=SNAPSHOT),
                lambda pid: None,
            )
        with pytest.raises(HookRefusedError, match="a key that no record has"):
            it.client.launch(launch_request(wanted, {"A=B": 1}, snapshot=SNAPSHOT), lambda pid: None)
        it.hooks["r"] = wanted
        assert (await it.client.launch(request("r", wanted), lambda pid: None).wait(quiet, quiet)).result.reason is None

    play(tmp_path, scene)
