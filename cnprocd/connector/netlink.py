"""What both kernel sockets share: membership of the connector's group, a classic BPF filter, the kernel's drop count.

Sources: socket(7), netlink(7), net/netlink/af_netlink.c.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from pathlib import Path

from cnprocd.connector import uapi
from cnprocd.connector.filter import Instruction

_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def open_member() -> socket.socket:
    """A non-blocking socket in the connector's proc group; it hears what the kernel makes, and asks for nothing yet.

    Raises OSError: EPROTONOSUPPORT without CONFIG_CONNECTOR, EPERM without CAP_NET_ADMIN on older kernels.
    """
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, uapi.NETLINK_CONNECTOR
    )
    try:
        sock.bind((0, 1 << (uapi.CN_IDX_PROC - 1)))
    except OSError:
        sock.close()
        raise
    return sock


def attach_filter(sock: socket.socket, program: tuple[Instruction, ...]) -> None:
    """SO_ATTACH_FILTER (socket(7)); an empty program detaches whatever is attached."""
    if not program:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        except FileNotFoundError:  # ENOENT: none was attached
            return
        return
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(_SockFprog(len(program), ctypes.addressof(buffer))))


def read_drops(protocol: int, port: int) -> int:
    """`Drops` of the netlink socket with this protocol and port in our network namespace; 0 if it is not listed."""
    for line in Path("/proc/net/netlink").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1]) == protocol and int(fields[2]) == port:
            return int(fields[8])
    return 0
