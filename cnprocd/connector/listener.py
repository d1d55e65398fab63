"""The proc connector's socket: open or adopt, subscribe with acknowledgement, narrow, drain, measure losses, let go.

Hard facts this file is built on (measured on 6.18, read in drivers/connector/cn_proc.c and net/netlink/af_netlink.c):

- Kernels since 6.6 take {op, mask} and filter by event; older ones ignore that length without a word. So: ask with a
  mask, wait a bounded time for the acknowledgement, and if none comes ask in the 4-byte form.
- A narrowed mask filters the acknowledgement itself. So: subscribe to everything, wait for the ack, then narrow.
- The request runs in our own system call: when sendto() returns, the new mask is in force.
- From another PID or user namespace the request is ignored silently; in another network namespace nobody listens.
- recvmmsg takes a batch in one system call. After a clean batch the kernel has written the same headers again (address
  length 12, no flags, length 76, sender 0, group 1), so one memcmp with the expected bytes checks every datagram's
  sender, length and truncation at once; only a batch that differs is looked at slot by slot.
- An overrun is told once as ENOBUFS; how many were lost is the `Drops` column of /proc/net/netlink. Until the queue has
  been read empty the kernel drops everything (NETLINK_S_CONGESTED), so on overrun: read to the end first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import time
from pathlib import Path

from cnprocd.connector import uapi
from cnprocd.connector.decode import SLOT_SIZE, Rejects, decode
from cnprocd.connector.event import Ack
from cnprocd.connector.filter import Instruction
from cnprocd.connector.inflight import EVENT_SLOTS
from cnprocd.connector.recvmmsg import HEADER_SIZE, SOCKADDR_NL, Slots
from cnprocd.errors import ConnectorUnavailableError, PrivilegeError

_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_CAP_NET_ADMIN = 12

# The inode numbers of the initial namespaces (include/linux/proc_ns.h).
_INIT_NAMESPACES = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC}


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class EventSlots:
    """The receive slots of the connector socket, and what their headers look like after a clean batch."""

    def __init__(self, slots: int = EVENT_SLOTS, data: memoryview | None = None) -> None:
        self._slots = Slots(slots, SLOT_SIZE, data)
        self._slots.set_lengths(uapi.DATAGRAM_SIZE)
        self._clean_headers = bytes(self._slots.headers)
        self._clean_names = SOCKADDR_NL.pack(socket.AF_NETLINK, 0, 0, 1 << (uapi.CN_IDX_PROC - 1)) * slots

    def receive(self, fd: int, rejects: Rejects) -> memoryview | None:
        """One recvmmsg(). The slots that hold kernel datagrams of the right length; None when the queue is empty.

        Raises OSError; ENOBUFS means that the socket was overrun and more can be read.
        """
        slots = self._slots
        count = slots.receive(fd)
        if count == 0:
            return None
        used, named = count * HEADER_SIZE, count * SOCKADDR_NL.size
        if (
            bytes(slots.headers[:used]) == self._clean_headers[:used]
            and slots.names[:named] == self._clean_names[:named]
        ):
            return slots.view[: count * SLOT_SIZE]
        return self._pick_clean(count, rejects)

    def _pick_clean(self, count: int, rejects: Rejects) -> memoryview:
        """Move the good slots of a mixed batch together, count the others, and restore the headers."""
        slots, good = self._slots, 0
        for i in range(count):
            if slots.sender(i) != 0:
                rejects.foreign_sender += 1
            elif slots.truncated(i):
                rejects.truncated += 1
            elif slots.length(i) != uapi.DATAGRAM_SIZE:
                rejects.wrong_length += 1
            else:
                if good != i:
                    slots.view[good * SLOT_SIZE : (good + 1) * SLOT_SIZE] = slots.slot(i)
                good += 1
        slots.headers[:] = self._clean_headers
        return slots.view[: good * SLOT_SIZE]


class Listener:
    """One subscription to the proc connector. Not subscribed until `subscribe` returned."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._slots = EventSlots()
        self.rejects = Rejects()
        self.overruns = 0  # how often ENOBUFS was told
        self.takes_mask = False  # struct proc_input is understood (kernel 6.6 and newer)
        self.mask = uapi.PROC_EVENT_ALL  # what this kernel was last asked for
        self._port = sock.getsockname()[0]

    @classmethod
    def open(cls) -> Listener:
        """A new socket in the connector's proc group.

        Raises ConnectorUnavailableError (no connector in this kernel) or PrivilegeError.
        """
        require_privilege()
        try:
            sock = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                uapi.NETLINK_CONNECTOR,
            )
        except OSError as error:
            raise ConnectorUnavailableError(
                f"this kernel has no connector ({error.strerror})",
                "it needs CONFIG_CONNECTOR=y and CONFIG_PROC_EVENTS=y; see `grep PROC_EVENTS /boot/config-$(uname -r)`",
            ) from error
        try:
            sock.bind((0, 1 << (uapi.CN_IDX_PROC - 1)))
        except PermissionError as error:
            sock.close()
            raise PrivilegeError(
                "joining the proc connector was refused", "run as root or with CAP_NET_ADMIN"
            ) from error
        return cls(sock)

    @classmethod
    def adopt(cls, fd: int) -> Listener:
        """Take over a socket that systemd bound or kept for us; what is queued in it is not lost (see subscribe)."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        # The filter of the daemon before us is still on it, and would keep the acknowledgement from us.
        attach_filter(sock, ())
        return cls(sock)

    def receive_into(self, data: memoryview) -> None:
        """Use this memory for the slots from now on (EVENT_SLOTS of them): see inflight.py."""
        self._slots = EventSlots(EVENT_SLOTS, data)

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_receive_buffer(self, size_bytes: int) -> int:
        """Ask for a receive buffer; returns what the kernel grants, which is less without CAP_NET_ADMIN.

        The kernel doubles the number for its own bookkeeping (socket(7)); the doubled number is what events are charged
        against, QUEUED_EVENT_BYTES each.
        """
        wanted = max(1, size_bytes // 2)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, 33, wanted)  # SO_RCVBUFFORCE, which Python does not name
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    def subscribe(self, timeout_s: float = 1.0) -> list[memoryview]:
        """LISTEN to everything, and wait for the kernel's acknowledgement. Returns event slots that came before it.

        Raises PrivilegeError or ConnectorUnavailableError, each with what to do.
        """
        early: list[memoryview] = []
        # An adopted socket that was overrun takes nothing, not even the acknowledgement, until it has been read empty.
        while (slots := self.receive()) is not None:
            early.append(memoryview(bytes(slots)))
        for mask in (uapi.PROC_EVENT_ALL, None):
            ticket = int.from_bytes(os.urandom(3), "little")
            self._request(uapi.PROC_CN_MCAST_LISTEN, mask, ticket)
            ack = self._await_ack(ticket + 1, timeout_s, early)
            if ack is None:
                continue
            if ack.err:
                raise PrivilegeError(
                    f"the kernel refused the subscription ({os.strerror(ack.err)})", "run as root or with CAP_NET_ADMIN"
                )
            self.takes_mask, self.mask = mask is not None, uapi.PROC_EVENT_ALL
            return early
        raise ConnectorUnavailableError(
            f"the proc connector did not answer within {2 * timeout_s:g} s", reason_for_silence()
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
                return self._slots.receive(self._socket.fileno(), self.rejects)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overruns += 1

    def drops(self) -> int:
        """Datagrams lost by this socket since it was opened (`Drops` of /proc/net/netlink)."""
        return read_drops(uapi.NETLINK_CONNECTOR, self._port)

    def _request(self, op: int, mask: int | None, ticket: int) -> None:
        try:
            self._socket.send(uapi.pack_subscription(op, mask, ticket))
        except ConnectionRefusedError as error:
            raise ConnectorUnavailableError("nobody answers on the connector", reason_for_silence()) from error

    def _await_ack(self, ticket: int, timeout_s: float, early: list[memoryview]) -> Ack | None:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if not poller.poll(left * 1000):
                return None
            slots = self.receive()
            if slots is None:
                continue
            kept = memoryview(bytes(slots))
            early.append(kept)
            for event in decode(kept, Rejects()):
                if isinstance(event, Ack) and event.ack == ticket:
                    return event
        return None


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
