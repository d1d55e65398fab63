"""Call recvmmsg(2) into one preallocated buffer: many datagrams for one system call, without an allocation.

Python's socket module has no recvmmsg, and a recv() per datagram costs more than all the handling of it. So the
headers, the address slots and the data slots are laid out once through ctypes, and each call only fills them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from array import array

SOCKADDR_NL = struct.Struct("=HHII")  # family, pad, nl_pid, nl_groups (netlink(7))
_MSG_TRUNC = 0x20


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("hdr", _Msghdr), ("len", ctypes.c_uint))


HEADER_SIZE = ctypes.sizeof(_Mmsghdr)
_FLAGS_AT, _LENGTH_AT = _Msghdr.flags.offset, _Mmsghdr.len.offset
_SENDER_AT = 4  # nl_pid
_NOTHING = memoryview(array("I", [0] * 1024))  # no flag, and the kernel as sender
_libc = ctypes.CDLL(None, use_errno=True)


class Slots:
    """`count` data slots of `size` bytes each. `view` is the data, `names` the senders, `headers` the raw mmsghdrs."""

    def __init__(self, count: int, size: int, data: memoryview | None = None) -> None:
        """`data`: writable memory of count * size bytes to receive into; by default it is allocated here."""
        self.count, self.size = count, size
        self.view = memoryview(bytearray(count * size)) if data is None else data
        self.names = bytearray(count * SOCKADDR_NL.size)
        self._mmsghdrs = (_Mmsghdr * count)()
        self.headers = memoryview(self._mmsghdrs).cast("B")
        self._iovecs = (_Iovec * count)()
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.view))
        names = ctypes.addressof(ctypes.c_char.from_buffer(self.names))
        for i in range(count):
            self._iovecs[i] = _Iovec(base + i * size, size)
            header = self._mmsghdrs[i].hdr
            header.name, header.namelen = names + i * SOCKADDR_NL.size, SOCKADDR_NL.size
            header.iov, header.iovlen = ctypes.addressof(self._iovecs[i]), 1
        self._recvmmsg = _libc.recvmmsg

    def receive(self, fd: int, first: int = 0, most: int | None = None) -> int:
        """Call recvmmsg() once, without blocking, into the slots from `first` on. Return how many it filled.

        0 means that the queue is empty. Raises OSError.
        """
        headers = ctypes.byref(self._mmsghdrs, first * HEADER_SIZE) if first else self._mmsghdrs
        room = self.count - first if most is None else min(most, self.count - first)
        received: int = self._recvmmsg(fd, headers, room, socket.MSG_DONTWAIT, None)
        if received < 0:
            code = ctypes.get_errno()
            if code in (errno.EAGAIN, errno.EINTR):
                return 0
            raise OSError(code, os.strerror(code))
        return received

    def set_lengths(self, length: int) -> None:
        """Write `length` into every header, as the kernel does for datagrams of that length."""
        for header in self._mmsghdrs:
            header.len = length

    def slot(self, i: int) -> memoryview:
        return self.view[i * self.size : (i + 1) * self.size]

    def length(self, i: int) -> int:
        return int(self._mmsghdrs[i].len)

    def truncated(self, i: int) -> bool:
        return bool(self._mmsghdrs[i].hdr.flags & _MSG_TRUNC)

    def sender(self, i: int) -> int:
        """Return nl_pid of the sender; 0 is the kernel."""
        return int(SOCKADDR_NL.unpack_from(self.names, i * SOCKADDR_NL.size)[2])

    def lengths(self, received: int, first: int = 0) -> list[int]:
        """Return the lengths of the datagrams of the last `receive`; 0 for those that the kernel did not send whole."""
        last = first + received
        lengths = _strided(self.headers, first * HEADER_SIZE + _LENGTH_AT, HEADER_SIZE, received).tolist()
        flags = _strided(self.headers, first * HEADER_SIZE + _FLAGS_AT, HEADER_SIZE, received)
        senders = _strided(memoryview(self.names), first * SOCKADDR_NL.size + _SENDER_AT, SOCKADDR_NL.size, received)
        if flags == senders == _NOTHING[:received]:
            return lengths
        return [
            0 if self.sender(i) or self.truncated(i) else length
            for i, length in zip(range(first, last), lengths, strict=True)
        ]

    def datagrams(self, received: int, first: int = 0) -> list[memoryview]:
        """Return the whole datagrams of the last `receive` that the kernel sent; others are skipped."""
        lengths = self.lengths(received, first)
        return [
            self.view[i * self.size :][:length]
            for i, length in zip(range(first, first + received), lengths, strict=True)
            if length
        ]


def _strided(memory: memoryview, at: int, apart: int, count: int) -> memoryview:
    """Return the 32-bit numbers of memory that begin at `at` and are `apart` bytes apart."""
    return memory.cast("I")[at // 4 : (at + apart * count) // 4 : apart // 4]
