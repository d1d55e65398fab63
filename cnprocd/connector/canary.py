"""Is the kernel still telling anybody anything? And if not, make it.

The kernel makes events only while its global count of listeners is above zero, and that count can be wrong: on kernels
before 6.6 any program's stray IGNORE takes one off, later ones still do for an IGNORE after an invalid request. Then
every listener on the machine hears silence, which looks like a quiet day (drivers/connector/cn_proc.c, measured).

The probe needs no child process: a request with an operation that does not exist changes nothing, and is acknowledged
with EINVAL before sendto() returns, but only if the count is above zero. The cure is a LISTEN by a socket closed
without IGNORE: that leaves the count one higher for good, which costs nothing and cannot be undone by accident.
"""

from __future__ import annotations

import errno
import os
import socket

from cnprocd.connector import uapi
from cnprocd.connector.decode import Rejects, decode
from cnprocd.connector.event import Ack
from cnprocd.connector.listener import EventSlots

_NO_SUCH_OPERATION = 0x7F
_MOST_BATCHES = 64  # of other events that may stand before the answer in a storm


def kernel_speaks() -> bool:
    """Whether the kernel sends events at all. Raises OSError if the connector cannot even be asked."""
    with _member() as sock:
        ticket = int.from_bytes(os.urandom(3), "little")
        sock.send(uapi.pack_subscription(_NO_SUCH_OPERATION, None, ticket))
        slots, rejects = EventSlots(64), Rejects()
        for _ in range(_MOST_BATCHES):
            try:
                batch = slots.receive(sock.fileno(), rejects)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                return True  # overrun: so there is something to hear
            if batch is None:
                return False
            if any(isinstance(event, Ack) and event.ack == ticket + 1 for event in decode(batch, rejects)):
                return True
    return True


def make_kernel_speak() -> None:
    """Raise the kernel's count of listeners by one."""
    with _member() as sock:
        sock.send(uapi.pack_subscription(uapi.PROC_CN_MCAST_LISTEN, None))


def _member() -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, uapi.NETLINK_CONNECTOR
    )
    sock.bind((0, 1 << (uapi.CN_IDX_PROC - 1)))
    return sock
