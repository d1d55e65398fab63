"""A kernel with a wrong count of listeners sends no events; the daemon detects this and makes it send again.

The test restores the count of listeners, because other listeners on this machine must not suffer.
"""

from __future__ import annotations

import socket
import struct

import pytest

from cnprocd.connector.canary import kernel_sends_events, raise_listener_count


def request(sock, op):
    payload = struct.pack("=I", op)
    message = struct.pack("=IIIIHH", 1, 1, 0, 0, len(payload), 0) + payload
    sock.send(struct.pack("=IHHII", 16 + len(message), 3, 0, 0, 0) + message)


def mute_once():
    """Decrement the count: IGNORE after an invalid request decrements it without an increment (all kernels)."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 11) as sock:
        sock.bind((0, 1))
        request(sock, 99)
        request(sock, 2)


# Each listener that ends without IGNORE leaves the count one too high; every bench makes a hundred of these.
MOST = 100_000


@pytest.fixture
def muted():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 11) as listener:
        listener.bind((0, 1))
        request(listener, 1)
        taken = 0
        try:
            while kernel_sends_events() and taken < MOST:
                mute_once()
                taken += 1
            yield taken
        finally:
            for _ in range(taken):
                raise_listener_count()
            request(listener, 2)


def test_speaks_when_somebody_listens():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 11) as listener:
        listener.bind((0, 1))
        request(listener, 1)
        assert kernel_sends_events()
        request(listener, 2)


def test_a_muted_kernel_is_noticed_and_revived(muted):
    if not muted:
        pytest.skip("this kernel's count of listeners cannot be brought down from outside")
    assert not kernel_sends_events()
    raise_listener_count()
    assert kernel_sends_events()
