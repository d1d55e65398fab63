"""Output of programs that a hook left behind is taken over by a small process, and the daemon is not forked for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Any

from unit.reaping import children_reaped  # noqa: F401 (a fixture)

from cnprocd.launch.left_behind import LeftBehind

MANY_BYTES = 1 << 20  # more than a pipe holds
LONG_S = 30.0


class Pipe:
    """An output with its other end, as a program that was left behind has it."""

    def __init__(self) -> None:
        self.fd, self.writer = os.pipe()
        os.set_blocking(self.fd, False)

    def read(self) -> bool:
        return os.read(self.fd, 65536) != b""

    def finish(self) -> None:
        pass


def no_fork():
    raise AssertionError("the daemon is forked")


def test_pipes_are_drained_by_a_process_until_all_are_closed(monkeypatch):
    monkeypatch.setattr(os, "fork", no_fork)
    pipes: list[Any] = [Pipe() for _ in range(3)]
    left = LeftBehind()

    async def hand_over() -> None:
        for pipe in pipes:
            left.keep(pipe)
        left.hand_over()
        left.hand_over()  # nothing is left

    asyncio.run(hand_over())
    assert len(left) == 0
    (drain,) = left._drains
    signal.alarm(int(LONG_S))  # a write that nothing reads would wait for ever
    try:
        for pipe in pipes:
            written = 0
            while written < MANY_BYTES:
                written += os.write(pipe.writer, b"x" * 65536)
            os.close(pipe.writer)
        assert os.waitpid(drain, 0)[1] == 0
    finally:
        signal.alarm(0)


def test_pipes_are_closed_if_no_process_can_be_started(monkeypatch):
    def none(*args, **how):
        raise BlockingIOError("fork")

    monkeypatch.setattr(os, "posix_spawn", none)
    pipe: Any = Pipe()
    left = LeftBehind()

    async def hand_over() -> None:
        left.keep(pipe)
        left.hand_over()

    asyncio.run(hand_over())
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe.writer, b"x")
        raise AssertionError("the other end is open")
    os.close(pipe.writer)
