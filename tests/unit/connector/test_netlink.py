"""The kernel's drop count, of a netlink socket that is unrelated to the connector."""

import errno
import socket
import struct
from pathlib import Path

import pytest

from cnprocd.connector.netlink import read_drops

NETLINK_USERSOCK = 2
GROUP = 1 << 7


def listed_drops(port):
    rows = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:]]
    return next(int(row[8]) for row in rows if (int(row[1]), int(row[2])) == (NETLINK_USERSOCK, port))


def test_drops_are_those_that_the_kernel_lists():
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_USERSOCK) as full,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_USERSOCK) as sender,
    ):
        try:
            full.bind((0, GROUP))
        except PermissionError:
            pytest.skip("joining a group needs CAP_NET_ADMIN")
        full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        assert read_drops(full) == 0
        for _ in range(100):
            try:
                sender.sendto(struct.pack("=IHHII", 116, 20, 0, 0, 0) + bytes(100), (0, GROUP))
            except OSError as error:
                assert error.errno in (errno.ECONNREFUSED, errno.ENOBUFS)  # no socket had room for it
        assert read_drops(full) == listed_drops(full.getsockname()[0]) > 0
