"""Messages between the daemon and the process of the spool, on a socket pair of AF_UNIX, SOCK_SEQPACKET.

They are pickled: both processes run the same code as the same user, and no other process holds the socket. A message
that is too long for a datagram is passed as a memfd (memfd_create(2)): it is memory, so writing never waits.
"""

from __future__ import annotations

import os
import pickle
import socket

MOST_DATAGRAM_BYTES = 128 * 1024  # net.core.wmem_default is 208 KiB
_INLINE, _MEMFD = b"i", b"m"


def send_message(to: socket.socket, message: object) -> None:
    """Send a message. Raises OSError."""
    data = pickle.dumps(message, protocol=5)
    if len(data) < MOST_DATAGRAM_BYTES:
        to.sendmsg([_INLINE, data])
        return
    fd = os.memfd_create("cnprocd-spool", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        socket.send_fds(to, [_MEMFD], [fd])
    finally:
        os.close(fd)


def receive_message(source: socket.socket) -> tuple[bool, object]:
    """Return whether there was a message, or EOF, and the message. Raises OSError."""
    data, fds, _, _ = socket.recv_fds(source, MOST_DATAGRAM_BYTES + 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return False, None
    if fds:
        with open(fds[0], "rb") as file:
            file.seek(0)
            return True, pickle.load(file)  # noqa: S301
    return True, pickle.loads(memoryview(data)[1:])  # noqa: S301
