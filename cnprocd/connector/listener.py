"""The proc connector's socket: open or adopt, subscribe with acknowledgement, narrow, drain, count losses, unsubscribe.

Facts that this file relies on (measured on 6.18, read in drivers/connector/cn_proc.c and net/netlink/af_netlink.c):

- Kernels since 6.6 take {op, mask} and filter by event; older ones silently ignore that length. So ask with a mask,
  wait a bounded time for the acknowledgement, and if none comes ask in the 4-byte form.
- A narrowed mask filters the acknowledgement itself. So subscribe to everything, then narrow. Another member of the
  group receives the acknowledgement (ack.py), so no event queued in this socket is read before the first drain.
- The request runs in the daemon's own system call: when sendto() returns, the new mask is in effect.
- A request from another PID or user namespace is silently ignored; in another network namespace nothing receives it.
- recvmmsg receives a batch in one system call (recvmmsg.py, eventslots.py).
- ENOBUFS reports an overrun once. The socket's drop count (`Drops` of /proc/net/netlink) is the number of lost events.
  Until the queue has been read empty the kernel drops everything (NETLINK_S_CONGESTED), so after an overrun read to
  the end first.
- An overrun during recvmmsg ends it early: it returns what it has, and leaves the error for the next call
  (net/socket.c do_recvmmsg). Then the queue is full, and not empty.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from cnprocd.connector import uapi
from cnprocd.connector.ack import AckWatch
from cnprocd.connector.decode import SLOT_SIZE, Rejects
from cnprocd.connector.eventslots import EventSlots
from cnprocd.connector.filter import Instruction
from cnprocd.connector.inflight import EVENT_SLOTS
from cnprocd.connector.netlink import attach_filter, open_member, read_drops, set_receive_buffer
from cnprocd.errors import ConnectorUnavailableError, PrivilegeError

_CAP_NET_ADMIN = 12
_MANY = 16 * SLOT_SIZE  # bytes of a batch behind which the queue can have been full

# The inode numbers of the initial namespaces (include/linux/proc_ns.h).
_INIT_NAMESPACES = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC}

USE_HOST = {
    "user": "run it on the host, or in a container without a user namespace of its own (Kubernetes: hostUsers: true)",
    "pid": "run it on the host, or in a container with the host's PID namespace (Kubernetes: hostPID: true; podman run "
    "--pid host)",
    "net": "run it on the host, or in a container with the host's network (Kubernetes: hostNetwork: true; podman run "
    "--network host)",
}
"""What to do about each namespace in which the kernel ignores a subscriber."""


class Listener:
    """One subscription to the proc connector. It is not subscribed before `subscribe` has returned."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.slots = EventSlots()
        self.rejects = Rejects()
        self.overruns = 0  # how often the kernel raised ENOBUFS
        self.takes_mask = False  # the kernel accepts struct proc_input (6.6 and newer)
        self.mask = uapi.PROC_EVENT_ALL  # what this kernel was last asked for

    @classmethod
    def open(cls, receive_buffer_bytes: int) -> Listener:
        """Return a new socket in the connector's proc group.

        Raises ConnectorUnavailableError (no connector in this kernel) or PrivilegeError.
        """
        require_privilege()
        try:
            return cls(open_member(receive_buffer_bytes))
        except PermissionError as error:
            raise PrivilegeError(
                "cannot join the proc connector: permission denied", "run as root or with CAP_NET_ADMIN"
            ) from error
        except OSError as error:
            raise ConnectorUnavailableError(
                f"cannot open the connector: {error.strerror}",
                "it needs CONFIG_CONNECTOR=y and CONFIG_PROC_EVENTS=y; see `grep PROC_EVENTS /boot/config-$(uname -r)`",
            ) from error

    @classmethod
    def adopt(cls, fd: int) -> Listener:
        """Take over a socket that systemd bound or kept. The first drain reads the events queued in it."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        return cls(sock)

    def receive_into(self, data: memoryview) -> None:
        """Receive into this memory from now on (EVENT_SLOTS slots): see inflight.py."""
        self.slots = EventSlots(EVENT_SLOTS, data)

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_receive_buffer(self, size_bytes: int) -> int:
        """Call netlink.set_receive_buffer."""
        return set_receive_buffer(self._socket, size_bytes)

    def subscribe(self, timeout_s: float = 1.0) -> None:
        """Subscribe to all events (LISTEN), and wait for the kernel's acknowledgement.

        Raises PrivilegeError or ConnectorUnavailableError, each with a hint.
        """
        # A kernel that accepts the mask has acknowledged when send() returns; an older one never does.
        for mask, patience_s in ((uapi.PROC_EVENT_ALL, timeout_s / 5), (None, timeout_s)):
            with AckWatch() as watch:
                ticket = watch.ticket()
                self._request(uapi.PROC_CN_MCAST_LISTEN, mask, ticket)
                ack = watch.wait(ticket, patience_s)
            if ack is None:
                continue
            if ack.err:
                raise PrivilegeError(
                    f"cannot subscribe to process events: {os.strerror(ack.err)}", "run as root or with CAP_NET_ADMIN"
                )
            self.takes_mask, self.mask = mask is not None, uapi.PROC_EVENT_ALL
            return
        raise ConnectorUnavailableError(
            f"cannot subscribe to process events: no acknowledgement within {1.2 * timeout_s:g} s", reason_for_silence()
        )

    def narrow(self, mask: int) -> None:
        """Ask the kernel for exactly these events, in effect when this returns. Kernels before 6.6 send all events."""
        if self.takes_mask:
            self._request(uapi.PROC_CN_MCAST_LISTEN, mask, 0)
            self.mask = mask

    def unsubscribe(self) -> None:
        """Unsubscribe (IGNORE) and close the socket. The kernel stops making events if no other program listens."""
        try:
            self._request(uapi.PROC_CN_MCAST_IGNORE, self.mask if self.takes_mask else None, 0)
        finally:
            self._socket.close()

    def attach(self, program: tuple[Instruction, ...]) -> None:
        """Attach a classic BPF program to the socket in place of the last one. An empty program detaches."""
        attach_filter(self._socket, program)

    def receive(self) -> memoryview | None:
        """Return the next batch of slots, or None if the queue is empty. An overrun is counted in `overruns`."""
        while True:
            try:
                received = self.slots.receive(self._socket.fileno(), self.rejects)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overruns += 1
            else:
                if received is not None and len(received) >= _MANY and not self.slots.filled:
                    self._note_early_end()
                return received

    def _note_early_end(self) -> None:
        """Find out whether an overrun has ended recvmmsg(2) early, and more is queued."""
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.overruns += 1
            self.slots.filled = True

    def drops(self) -> int:
        """Return the datagrams that this socket lost since it was opened (`Drops` of /proc/net/netlink)."""
        return read_drops(self._socket)

    def _request(self, op: int, mask: int | None, ticket: int) -> None:
        try:
            self._socket.send(uapi.pack_subscription(op, mask, ticket))
        except ConnectionRefusedError as error:  # the kernel's own socket is in init_net only (cn_init)
            raise ConnectorUnavailableError(
                "cannot reach the proc connector: this process is in another network namespace", USE_HOST["net"]
            ) from error


def require_privilege() -> None:
    """Raise PrivilegeError unless CAP_NET_ADMIN is effective: without it the kernel silently ignores a subscriber."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and not int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1:
            raise PrivilegeError(
                "cannot use the proc connector: this process lacks CAP_NET_ADMIN",
                "run as root, or under systemd with AmbientCapabilities=CAP_NET_ADMIN",
            )


def reason_for_silence() -> str:
    """Return a hint why the kernel ignores the subscription, from the namespaces of this process."""
    for kind, inode in _INIT_NAMESPACES.items():
        if Path(f"/proc/self/ns/{kind}").stat().st_ino != inode:
            return f"this process is in another {kind} namespace: {USE_HOST[kind]}"
    return "the kernel lacks CONFIG_PROC_EVENTS"
