"""Is the kernel still telling anybody anything? And if not, make it.

The kernel makes events only while its global count of listeners is above zero, and that count can be wrong: on kernels
before 6.6 any program's stray IGNORE takes one off, later ones still do for an IGNORE after an invalid request. Then
every listener on the machine hears silence, which looks like a quiet day (drivers/connector/cn_proc.c, measured).

The probe needs no child process: a request with an operation that does not exist changes nothing, and is acknowledged
with EINVAL before sendto() returns, but only if the count is above zero. The cure is a LISTEN by a socket closed
without IGNORE: that leaves the count one higher for good, which costs nothing and cannot be undone by accident.
"""

from __future__ import annotations

from cnprocd.connector import uapi
from cnprocd.connector.ack import AckWatch
from cnprocd.connector.netlink import open_member

_NO_SUCH_OPERATION = 0x7F


def kernel_sends_events() -> bool:
    """Whether the kernel sends events at all. Raises OSError if the connector cannot even be asked."""
    with AckWatch() as watch:
        ticket = watch.ticket()
        watch.socket.send(uapi.pack_subscription(_NO_SUCH_OPERATION, None, ticket))
        return watch.wait(ticket, 0) is not None


def raise_listener_count() -> None:
    """Raise the kernel's count of listeners by one."""
    with open_member() as sock:
        sock.send(uapi.pack_subscription(uapi.PROC_CN_MCAST_LISTEN, None))
