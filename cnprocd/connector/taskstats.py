"""The taskstats socket: find the family, register for every CPU, drain exit records, deregister.

Registration is per CPU and may name any possible CPU, so CPUs that come online later are covered from the start
(kernel/taskstats.c add_del_listener accepts subsets of cpu_possible_mask). The family is optional in a kernel build and
needs CAP_NET_ADMIN. If it cannot be used for any reason, TaskstatsAbsent is raised, and the plan works without it. Its
version is read from a record about this process, before anything depends on the layout.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from cnprocd.connector.filter import Instruction
from cnprocd.connector.inflight import RECORD_SLOTS
from cnprocd.connector.netlink import attach_filter, read_drops, set_receive_buffer
from cnprocd.connector.recvmmsg import Slots
from cnprocd.connector.taskrecord import (
    BROKEN_VERSIONS,
    MINIMUM_VERSION,
    RECORD_SLOT_SIZE,
    STRUCT_OFFSET,
    ReadRecords,
    RecordReader,
)

_NETLINK_GENERIC = 16
_GENL_ID_CTRL = 0x10
_CTRL_CMD_GETFAMILY = 3
_CTRL_ATTR_FAMILY_ID = 1
_CTRL_ATTR_FAMILY_NAME = 2
_TASKSTATS_CMD_GET = 1
_ATTR_PID = 1
_ATTR_REGISTER_CPUMASK = 3
_ATTR_DEREGISTER_CPUMASK = 4
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_NLMSG_ERROR = 2
_TIMEOUT_S = 1.0
_POSSIBLE_CPUS = Path("/sys/devices/system/cpu/possible")


class TaskstatsAbsent(Exception):  # noqa: N818  # a state of the kernel, not an error
    """This kernel sends no usable exit records. The text is the reason."""


class Taskstats:
    """A registration for the exit records of every CPU."""

    def __init__(
        self,
        receive_buffer_bytes: int,
        adopted_fd: int | None = None,
        data: memoryview | None = None,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        """Register anew, or adopt a registration with the records queued in it. Raises TaskstatsAbsent.

        `make_room` is called before the first slot is used again: it keeps what is in the slots, and blanks them.
        """
        self._make_room = make_room
        self._socket = _open() if adopted_fd is None else socket.socket(fileno=adopted_fd)
        self.set_receive_buffer(receive_buffer_bytes)  # before the first record can come: see netlink.open_member
        self._slots = Slots(RECORD_SLOTS, RECORD_SLOT_SIZE, data)
        self.overruns = 0
        self.unreadable = 0
        self.first = 0  # the slot for the next record: behind those that are still needed
        self.used = 0  # how many slots from the start may hold a record
        self._drops_at_adoption = 0
        if adopted_fd is not None:
            self._drops_at_adoption = self.drops()
        try:
            self._cpus = _possible_cpus()
            with _open() as asking:  # on an adopted socket the answers would be queued behind records
                self._family = _find_family(asking)
                self.version = _ask_version(asking, self._family)
            self.reader = RecordReader(self._family)
            if adopted_fd is None:
                _ask(self._socket, self._family, _TASKSTATS_CMD_GET, _ATTR_REGISTER_CPUMASK, self._cpus, _NLM_F_ACK)
        except OSError as error:
            self._socket.close()
            raise TaskstatsAbsent(f"taskstats: {os.strerror(error.errno) if error.errno else error}") from error
        except TaskstatsAbsent:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_receive_buffer(self, size_bytes: int) -> int:
        """Call netlink.set_receive_buffer."""
        return set_receive_buffer(self._socket, size_bytes)

    def attach(self, program: tuple[Instruction, ...]) -> None:
        attach_filter(self._socket, program)

    def drain(self, until: set[int] | None = None, ahead: int = 0) -> ReadRecords:
        """Return every record that is queued now, or those until each thread in `until` has one, and `ahead` more.

        Unreadable ones and overruns are counted.
        """
        found = ReadRecords()
        while until is None or until or ahead:
            if self.first == self._slots.count:
                self._make_room()
                self.first = self.used = 0
            room = self._slots.count - self.first
            most = room if until is None else min(room, len(until) + ahead)
            received = self._receive(most)
            if received:
                lengths = self._slots.lengths(received, self.first)
                slots = slice(self.first * RECORD_SLOT_SIZE, (self.first + received) * RECORD_SLOT_SIZE)
                read = self.reader.read(self._slots.view[slots], lengths)
                self.unreadable += read.unreadable
                found.add(read)
                if until is not None:
                    until.difference_update(read.passed, [record.pid for record in read.records])
                self.first += received
                self.used = max(self.used, self.first)
            if received < most or not (until is None or until):
                break
        return found

    def _receive(self, most: int) -> int:
        """Receive one batch into the slots from `first` on. Return how many; overruns are counted."""
        while True:
            try:
                return self._slots.receive(self._socket.fileno(), self.first, most)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overruns += 1

    def drops(self) -> int:
        """Return the records that this socket lost since it was opened or adopted."""
        return read_drops(self._socket) - self._drops_at_adoption

    def close(self) -> None:
        with contextlib.suppress(OSError, TaskstatsAbsent):
            _send(self._socket, self._family, _TASKSTATS_CMD_GET, _ATTR_DEREGISTER_CPUMASK, self._cpus)
        self._socket.close()


def _possible_cpus() -> bytes:
    """Return the list of CPUs to register for. Raises TaskstatsAbsent: a container may have no /sys."""
    try:
        return _POSSIBLE_CPUS.read_text().strip().encode() + b"\0"
    except OSError as error:
        raise TaskstatsAbsent(f"taskstats: cannot read {_POSSIBLE_CPUS}: {error.strerror}") from error


def _open() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
    sock.bind((0, 0))
    sock.settimeout(_TIMEOUT_S)
    return sock


def _find_family(sock: socket.socket) -> int:
    reply = _ask(sock, _GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_NAME, b"TASKSTATS\0")
    offset = 20
    while offset + 4 <= len(reply):
        length, kind = struct.unpack_from("=HH", reply, offset)
        if kind == _CTRL_ATTR_FAMILY_ID:
            return int(struct.unpack_from("=H", reply, offset + 4)[0])
        offset += max(4, length + 3 & ~3)
    raise TaskstatsAbsent("taskstats: the kernel's answer has no family id")


def _ask_version(sock: socket.socket, family: int) -> int:
    reply = _ask(sock, family, _TASKSTATS_CMD_GET, _ATTR_PID, struct.pack("=I", os.getpid()))
    version = int(struct.unpack_from("=H", reply, STRUCT_OFFSET)[0])
    if version < MINIMUM_VERSION or version in BROKEN_VERSIONS:
        raise TaskstatsAbsent(
            f"taskstats: version {version} does not mark a process's last thread or has a broken layout"
        )
    return version


def _ask(sock: socket.socket, family: int, command: int, attribute: int, value: bytes, flags: int = 0) -> bytes:
    """Send one request and return the answer. Raises OSError if the answer is an error."""
    _send(sock, family, command, attribute, value, flags)
    reply = sock.recv(65536)
    kind = struct.unpack_from("=H", reply, 4)[0]
    if kind == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", reply, 16)[0]
        if code:
            raise OSError(code, os.strerror(code))
    return reply


def _send(sock: socket.socket, family: int, command: int, attribute: int, value: bytes, flags: int = 0) -> None:
    payload = struct.pack("=BBH", command, 1, 0) + struct.pack("=HH", 4 + len(value), attribute) + value
    payload += b"\0" * (-len(payload) % 4)
    sock.send(struct.pack("=IHHII", 16 + len(payload), family, _NLM_F_REQUEST | flags, 1, 0) + payload)
