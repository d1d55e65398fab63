"""A runner that does not answer holds no slot, is reported, and runs no hook twice when it answers again."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest
from unit.reaping import children_reaped  # noqa: F401 (a fixture)
from unit.runnerkit import LIMIT_S, attempt_id_of, hook, request

from cnprocd.runner import client, wire
from cnprocd.runner.wire_validate import from_daemon


class DeafRunner:
    """A runner that accepts a connection and reads and sends only what a test asks for."""

    def __init__(self, path, monkeypatch) -> None:
        for name in ("ANSWER_S", "TERM_GRACE_S", "END_MARGIN_S"):
            monkeypatch.setattr(client, name, 0.05)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.records = []
        self.client = client.RunnerClient(path, self.log, lambda pid: None)
        self.peer: socket.socket | None = None

    def log(self, level, event, **fields) -> None:
        self.records.append(event)

    def greet(self) -> None:
        self.peer, _ = self.listener.accept()
        self.send(wire.Hello(version=wire.VERSION, pid=os.getpid()))

    def send(self, message) -> None:
        assert self.peer is not None
        self.peer.sendall(wire.frame(message))

    def launch(self, job_id=1, limit_s=0.05):
        wanted = request("r", hook("true"), job_id, limit_s=limit_s, attempt_id=attempt_id_of(job_id))
        return self.client.launch(wanted, lambda pid: None)

    async def until(self, condition) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.001)

    def close(self) -> None:
        self.client.close()
        self.listener.close()
        if self.peer is not None:
            self.peer.close()


def with_deaf_runner(tmp_path, monkeypatch, scene):
    async def main():
        it = DeafRunner(tmp_path / "deaf.sock", monkeypatch)
        try:
            return await scene(it)
        finally:
            it.close()

    return asyncio.run(main())


def ignore(*_: object) -> None:
    """Take what a hook reports."""


def test_a_runner_that_never_greets_lets_the_job_wait(tmp_path, monkeypatch):
    async def scene(it):
        ending = await asyncio.wait_for(it.launch().wait(ignore, ignore), LIMIT_S)
        assert (ending.not_started, ending.result.reason) == (True, client.SILENT)
        assert not it.client.ready
        assert it.records == ["runner_silent"]
        woken = []
        it.client.on_ready = lambda: woken.append(True)
        it.greet()
        await it.until(lambda: woken)
        assert it.client.ready
        it.peer.setblocking(False)
        frames = it.peer.recv(1 << 16)
        assert b"attempt_id" not in frames, "the hook was not sent late"

    with_deaf_runner(tmp_path, monkeypatch, scene)


def test_a_hook_that_was_sent_is_asked_about_not_sent_again(tmp_path, monkeypatch):
    async def scene(it):
        one = it.launch()
        it.greet()
        waiting = asyncio.ensure_future(one.wait(ignore, ignore))
        await it.until(lambda: one.silent)
        assert not it.client.ready
        assert not waiting.done()
        it.peer.setblocking(False)
        kinds = [type(from_daemon(body)) for body in wire.bodies(bytearray(it.peer.recv(1 << 16)))]
        assert kinds == [wire.Hello, wire.Run, wire.Resume]
        it.send(wire.Announced(attempt_id=attempt_id_of(1), hook_pid=4711))
        await it.until(lambda: it.client.ready)
        assert not one.silent
        it.send(wire.Ended(attempt_id=attempt_id_of(1), reason=None))
        ending = await asyncio.wait_for(waiting, LIMIT_S)
        assert (ending.result.reason, ending.interrupted, ending.not_started) == (None, False, False)

    with_deaf_runner(tmp_path, monkeypatch, scene)


def test_an_attempt_over_its_limit_frees_its_slot(tmp_path, monkeypatch):
    """The runner announced it and is silent from then on."""

    async def scene(it):
        one = it.launch()
        it.greet()
        waiting = asyncio.ensure_future(one.wait(ignore, ignore))
        it.send(wire.Announced(attempt_id=attempt_id_of(1), hook_pid=4711))
        await it.until(lambda: one.pid == 4711)
        await it.until(lambda: one.silent)
        it.client.close()
        assert (await waiting).left_running

    with_deaf_runner(tmp_path, monkeypatch, scene)


def test_frames_that_come_before_the_wait_are_not_lost(tmp_path, monkeypatch):
    """As when the loop stalls: a hook is sent, and its frames are read, before the task that waits for it runs."""

    async def scene(it):
        one = it.launch()
        it.greet()
        it.send(wire.Announced(attempt_id=attempt_id_of(1), hook_pid=4711))
        it.send(wire.Launched(attempt_id=attempt_id_of(1), latency_ms=2.0))
        it.send(wire.Output(attempt_id=attempt_id_of(1), line="first"))
        it.send(wire.Ended(attempt_id=attempt_id_of(1), reason=None))
        await it.until(lambda: not it.client._attempts)
        lines, launched = [], []
        ending = await asyncio.wait_for(one.wait(lines.append, launched.append), LIMIT_S)
        assert (lines, launched, ending.result.reason) == (["first"], [one], None)

    with_deaf_runner(tmp_path, monkeypatch, scene)


def test_a_late_answer_counts_for_the_next_request(tmp_path, monkeypatch):
    """Once, and for the same files: on a machine that is busy for long, no reload would be accepted else."""
    wanted = "1" * 64

    async def scene(it):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(it.client.take_snapshot(wanted, []), 0.01)
        it.greet()
        it.send(wire.SnapshotTaken(wanted=wanted, digest=wanted, error=None))
        while it.client._accepted_late is None:
            await asyncio.sleep(0)
        assert await asyncio.wait_for(it.client.take_snapshot(wanted, []), LIMIT_S) == wanted
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(it.client.take_snapshot(wanted, []), 0.01)

    with_deaf_runner(tmp_path, monkeypatch, scene)


def test_a_late_answer_to_a_former_reload_accepts_nothing(tmp_path, monkeypatch):
    """The files are those of the second reload already, but the runner took no snapshot of them yet, and cannot."""
    former, wanted = "1" * 64, "2" * 64

    async def scene(it):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(it.client.take_snapshot(former, []), 0.01)
        it.greet()
        answer = asyncio.ensure_future(it.client.take_snapshot(wanted, []))
        await asyncio.sleep(0)
        it.send(wire.SnapshotTaken(wanted=former, digest=wanted, error=None))
        it.send(wire.SnapshotTaken(wanted=wanted, digest=None, error="the disk is full"))
        with pytest.raises(client.SnapshotRefusedError, match="the disk is full"):
            await asyncio.wait_for(answer, LIMIT_S)

    with_deaf_runner(tmp_path, monkeypatch, scene)
