"""The credentials of a client of the control socket, and the requests that they permit.

SO_PEERCRED gives pid, uid and primary gid as they were at connect(); SO_PEERGROUPS (Linux 4.13) gives the supplementary
groups. Both come from the kernel, so no name service is asked and nothing can block. Root and the daemon's own user may
change things. Members of the group cnprocd may read. All others are refused with the reason.
"""

from __future__ import annotations

import grp
import os
import socket
import struct
from dataclasses import dataclass

GROUP = "cnprocd"
_SO_PEERGROUPS = 59  # asm-generic/socket.h; x86, arm, riscv, s390 and power64 use it
_UCRED = struct.Struct("=iII")
_MOST_GROUPS = 256  # Python's getsockopt() takes at most 1024 bytes


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected."""

    pid: int
    uid: int
    groups: frozenset[int]


@dataclass(frozen=True, slots=True)
class Access:
    """The requests that a peer may make. `refusal` is the reason why it may not make the others."""

    read: bool
    change: bool
    refusal: str = ""


def peer_of(connection: socket.socket) -> Peer:
    """Return the process at the other end. Raises OSError."""
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError:  # more groups than that, or an old kernel: only the primary group counts
        raw = b""
    return Peer(pid, uid, frozenset({gid, *(number for (number,) in struct.iter_unpack("=I", raw))}))


def readers_group() -> int | None:
    """Return the gid of the group cnprocd, or None if there is no such group."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


def access_of(peer: Peer, own_uid: int, group: int | None) -> Access:
    """Return the requests that this peer may make."""
    if peer.uid in (0, own_uid):
        return Access(read=True, change=True)
    if group is not None and group in peer.groups:
        return Access(read=True, change=False, refusal="permission denied: only root may change things")
    return Access(
        read=False,
        change=False,
        refusal=f"permission denied: uid {peer.uid} is neither root nor in the group {GROUP}",
    )


def own_uid() -> int:
    """Return the uid of the daemon."""
    return os.geteuid()
