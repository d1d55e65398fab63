"""Functions of both kernel sockets: membership of the connector's group, buffer, BPF filter, drop count.

Sources: socket(7), netlink(7), net/netlink/af_netlink.c.
"""

from __future__ import annotations

import ctypes
import socket
import struct

from cnprocd.connector import uapi
from cnprocd.connector.filter import Instruction

_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_SO_RCVBUFFORCE = 33  # which Python does not name
_SO_MEMINFO = 55  # since Linux 4.12; a hundred times cheaper than a search of /proc/net/netlink
_MEMINFO = struct.Struct("=32xI")  # eight numbers before SK_MEMINFO_DROPS (include/uapi/linux/sock_diag.h)


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def open_member(receive_buffer_bytes: int | None = None, program: tuple[Instruction, ...] = ()) -> socket.socket:
    """Return a non-blocking socket in the connector's proc group. It asks the kernel for no events yet.

    Buffer and filter are set before it joins. If other programs listen, their events fill a default buffer within
    milliseconds, and a socket that was overrun receives nothing more until it has been read empty.
    Raises OSError: EPROTONOSUPPORT without CONFIG_CONNECTOR, EPERM without CAP_NET_ADMIN on older kernels.
    """
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, uapi.NETLINK_CONNECTOR
    )
    try:
        attach_filter(sock, program)
        if receive_buffer_bytes is not None:
            set_receive_buffer(sock, receive_buffer_bytes)
        sock.bind((0, 1 << (uapi.CN_IDX_PROC - 1)))
    except OSError:
        sock.close()
        raise
    return sock


def set_receive_buffer(sock: socket.socket, size_bytes: int) -> int:
    """Ask for a receive buffer. Return the size that the kernel grants, which is smaller without CAP_NET_ADMIN.

    The kernel doubles the number for its own bookkeeping (socket(7)), and charges datagrams against the doubled number:
    uapi.QUEUED_EVENT_BYTES for an event, 1,280 or 2,304 for an exit record (measured on 6.18).
    """
    wanted = max(1, size_bytes // 2)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, wanted)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def attach_filter(sock: socket.socket, program: tuple[Instruction, ...]) -> None:
    """Attach a filter (SO_ATTACH_FILTER, socket(7)). An empty program detaches."""
    if not program:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        except FileNotFoundError:  # ENOENT: none was attached
            return
        return
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(_SockFprog(len(program), ctypes.addressof(buffer))))


def read_drops(sock: socket.socket) -> int:
    """Return the datagrams dropped because this socket's buffer was full: its `Drops` in /proc/net/netlink."""
    return int(_MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))[0])
