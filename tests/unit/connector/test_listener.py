"""An overrun that ends recvmmsg(2) early: more is queued than it returned."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from cnprocd.connector.decode import SLOT_SIZE
from cnprocd.connector.listener import Listener


@pytest.mark.parametrize(("pending", "overruns"), [(0, 0), (errno.ENOBUFS, 1)])
@pytest.mark.parametrize("filled", [False, True])
def test_an_overrun_during_a_batch_shows_that_more_is_queued(pending, overruns, filled):
    """Else the daemon takes the queue for empty, and the exit records of its events for those of lost events."""
    listener = listener_with(64, pending, filled)
    assert listener.receive() is not None
    assert listener.slots.filled is (filled or bool(pending))
    assert listener.overruns == (0 if filled else overruns)


def test_an_isolated_event_costs_no_further_system_call():
    listener = listener_with(1, None, filled=False)
    assert listener.receive() is not None
    assert not listener.slots.filled


def listener_with(count: int, pending: int | None, filled: bool) -> Listener:
    """Return a listener whose next batch has so many events, and whose socket has this error pending. None: no look."""

    def getsockopt(level: int, option: int) -> int:
        assert pending is not None, "the socket was asked"
        return pending

    sock: Any = SimpleNamespace(fileno=lambda: 5, getsockopt=getsockopt)
    listener = Listener(sock)
    slots: Any = SimpleNamespace(filled=filled, receive=lambda fd, rejects: memoryview(bytes(count * SLOT_SIZE)))
    listener.slots = slots
    return listener
