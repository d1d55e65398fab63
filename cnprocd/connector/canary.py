"""Check whether the kernel still sends events to any listener, and make it send them again.

The kernel makes events only while its global count of listeners is above zero, and that count can be wrong. On kernels
before 6.6 a stray IGNORE of any program decrements it; later kernels still do so for an IGNORE after an invalid
request. Then no listener on the machine receives events, which looks like an idle machine (drivers/connector/cn_proc.c,
measured).

The probe needs no child process. A request with an unknown operation changes nothing, and the kernel acknowledges it
with EINVAL before sendto() returns, but only if the count is above zero. The fix is a LISTEN by a socket that is closed
without IGNORE: it leaves the count one higher for good. That costs nothing.
"""

from __future__ import annotations

from cnprocd.connector import uapi
from cnprocd.connector.ack import AckWatch
from cnprocd.connector.netlink import open_member

_NO_SUCH_OPERATION = 0x7F


def kernel_sends_events() -> bool:
    """Return whether the kernel sends events at all. Raises OSError if the request cannot be sent."""
    with AckWatch() as watch:
        ticket = watch.ticket()
        watch.socket.send(uapi.pack_subscription(_NO_SUCH_OPERATION, None, ticket))
        return watch.wait(ticket, 0) is not None


def raise_listener_count() -> None:
    """Raise the kernel's count of listeners by one."""
    with open_member() as sock:
        sock.send(uapi.pack_subscription(uapi.PROC_CN_MCAST_LISTEN, None))
