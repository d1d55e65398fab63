"""The proc connector's socket: open or adopt, subscribe with acknowledgement, narrow, drain, measure losses, let go.

Hard facts this file is built on (measured on 6.18, read in drivers/connector/cn_proc.c and net/netlink/af_netlink.c):

- Kernels since 6.6 take {op, mask} and filter by event; older ones ignore that length without a word. So: ask with a
  mask, wait a bounded time for the acknowledgement, and if none comes ask in the 4-byte form.
- A narrowed mask filters the acknowledgement itself. So: subscribe to everything, then narrow. The acknowledgement is
  heard by another member of the group (ack.py): nothing that is queued in this socket is read before the first drain.
- The request runs in our own system call: when sendto() returns, the new mask is in force.
- From another PID or user namespace the request is ignored silently; in another network namespace nobody listens.
- recvmmsg takes a batch in one system call (recvmmsg.py, eventslots.py).
- An overrun is told once as ENOBUFS; how many were lost is the socket's drop count (`Drops` of /proc/net/netlink).
  Until the queue has been read empty the kernel drops everything (NETLINK_S_CONGESTED), so on overrun: read to the
  end first.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from cnprocd.connector import uapi
from cnprocd.connector.ack import AckWatch
from cnprocd.connector.decode import Rejects
from cnprocd.connector.eventslots import EventSlots
from cnprocd.connector.filter import Instruction
from cnprocd.connector.inflight import EVENT_SLOTS
from cnprocd.connector.netlink import attach_filter, open_member, read_drops, set_receive_buffer
from cnprocd.errors import ConnectorUnavailableError, PrivilegeError

_CAP_NET_ADMIN = 12

# The inode numbers of the initial namespaces (include/linux/proc_ns.h).
_INIT_NAMESPACES = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC}


class Listener:
    """One subscription to the proc connector. Not subscribed until `subscribe` returned."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.slots = EventSlots()
        self.rejects = Rejects()
        self.overruns = 0  # how often ENOBUFS was told
        self.takes_mask = False  # struct proc_input is understood (kernel 6.6 and newer)
        self.mask = uapi.PROC_EVENT_ALL  # what this kernel was last asked for

    @classmethod
    def open(cls, receive_buffer_bytes: int) -> Listener:
        """A new socket in the connector's proc group.

        Raises ConnectorUnavailableError (no connector in this kernel) or PrivilegeError.
        """
        require_privilege()
        try:
            return cls(open_member(receive_buffer_bytes))
        except PermissionError as error:
            raise PrivilegeError(
                "joining the proc connector was refused", "run as root or with CAP_NET_ADMIN"
            ) from error
        except OSError as error:
            raise ConnectorUnavailableError(
                f"this kernel has no connector ({error.strerror})",
                "it needs CONFIG_CONNECTOR=y and CONFIG_PROC_EVENTS=y; see `grep PROC_EVENTS /boot/config-$(uname -r)`",
            ) from error

    @classmethod
    def adopt(cls, fd: int) -> Listener:
        """Take over a socket that systemd bound or kept for us; what is queued in it comes with the first drain."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        return cls(sock)

    def receive_into(self, data: memoryview) -> None:
        """Use this memory for the slots from now on (EVENT_SLOTS of them): see inflight.py."""
        self.slots = EventSlots(EVENT_SLOTS, data)

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_receive_buffer(self, size_bytes: int) -> int:
        """As netlink.set_receive_buffer."""
        return set_receive_buffer(self._socket, size_bytes)

    def subscribe(self, timeout_s: float = 1.0) -> None:
        """LISTEN to everything, and wait for the kernel's acknowledgement.

        Raises PrivilegeError or ConnectorUnavailableError, each with what to do.
        """
        # A kernel that takes the mask has answered when send() returns; one that does not never will.
        for mask, patience_s in ((uapi.PROC_EVENT_ALL, timeout_s / 5), (None, timeout_s)):
            with AckWatch() as watch:
                ticket = watch.ticket()
                self._request(uapi.PROC_CN_MCAST_LISTEN, mask, ticket)
                ack = watch.wait(ticket, patience_s)
            if ack is None:
                continue
            if ack.err:
                raise PrivilegeError(
                    f"the kernel refused the subscription ({os.strerror(ack.err)})", "run as root or with CAP_NET_ADMIN"
                )
            self.takes_mask, self.mask = mask is not None, uapi.PROC_EVENT_ALL
            return
        raise ConnectorUnavailableError(
            f"the proc connector did not answer within {1.2 * timeout_s:g} s", reason_for_silence()
        )

    def narrow(self, mask: int) -> None:
        """Ask the kernel for these events only, or more again; in force when this returns. Old kernels send all."""
        if self.takes_mask:
            self._request(uapi.PROC_CN_MCAST_LISTEN, mask, 0)
            self.mask = mask

    def unsubscribe(self) -> None:
        """IGNORE, so that the kernel stops making events if nobody else listens; then close the socket."""
        try:
            self._request(uapi.PROC_CN_MCAST_IGNORE, self.mask if self.takes_mask else None, 0)
        finally:
            self._socket.close()

    def attach(self, program: tuple[Instruction, ...]) -> None:
        """Put a classic BPF program in front of the receive queue, replacing the last one; an empty one detaches."""
        attach_filter(self._socket, program)

    def receive(self) -> memoryview | None:
        """The next batch of slots, or None when the queue is empty. An overrun is counted in `overruns`."""
        while True:
            try:
                return self.slots.receive(self._socket.fileno(), self.rejects)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overruns += 1

    def drops(self) -> int:
        """Datagrams lost by this socket since it was opened (`Drops` of /proc/net/netlink)."""
        return read_drops(self._socket)

    def _request(self, op: int, mask: int | None, ticket: int) -> None:
        try:
            self._socket.send(uapi.pack_subscription(op, mask, ticket))
        except ConnectionRefusedError as error:
            raise ConnectorUnavailableError("nobody answers on the connector", reason_for_silence()) from error


def require_privilege() -> None:
    """Raise PrivilegeError unless CAP_NET_ADMIN is effective: the kernel refuses such a subscriber in silence."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and not int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1:
            raise PrivilegeError(
                "the proc connector needs CAP_NET_ADMIN, which this process lacks",
                "run as root, or under systemd with AmbientCapabilities=CAP_NET_ADMIN",
            )


def reason_for_silence() -> str:
    """Why the kernel may ignore a subscription, judged from our namespaces; a hint for the reader."""
    for kind, inode in _INIT_NAMESPACES.items():
        if Path(f"/proc/self/ns/{kind}").stat().st_ino != inode:
            return f"we are in another {kind} namespace: run on the host, not in a container"
    return "the kernel lacks CONFIG_PROC_EVENTS, or we are in another network namespace (container)"
