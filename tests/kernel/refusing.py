"""Let the kernel refuse forks on request: a seccomp filter reports every clone(2) of a program to the test.

Run as a script, it starts such a program: `python refusing.py SOCKET COMMAND...` installs the filter, sends its
listener (seccomp_unotify(2)) to the socket, and execs the command. The refusal is the error of the system call, as from
a kernel without memory. Facts: include/uapi/linux/seccomp.h; the filter and its listener outlive the exec.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}
_CLONES = {"x86_64": (56, 57, 58, 435), "aarch64": (220, 435)}  # clone, fork, vfork, clone3
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_ALLOW, _USER_NOTIF = 0x7FFF0000, 0x7FC00000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIF_SIZE, _RESPONSE = 80, struct.Struct("=QqiI")
_CONTINUE = 1


def why_not() -> str | None:
    return None if platform.machine() in _SYS_SECCOMP else f"system call numbers of {platform.machine()} are not known"


class Refusal:
    """Answer system calls in place of the kernel. `refused` is the number of refusals."""

    def __init__(self, listener: socket.socket) -> None:
        self.refused = 0
        self._wanted = threading.Event()
        self._listener = listener
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def begin(self) -> None:
        self._wanted.set()

    def end(self) -> None:
        self._wanted.clear()

    def _answer(self) -> None:
        connection, _ = self._listener.accept()
        _, (fd,), _, _ = socket.recv_fds(connection, 1, 1)
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while not poller.poll()[0][1] & select.POLLHUP:  # until no process has the filter
            asked = bytearray(_NOTIF_SIZE)
            try:
                fcntl.ioctl(fd, _RECEIVE, asked)
                refuse = self._wanted.is_set()
                self.refused += refuse
                (number,) = struct.unpack_from("=Q", asked)
                answer = (number, 0, -errno.ENOMEM, 0) if refuse else (number, 0, 0, _CONTINUE)
                fcntl.ioctl(fd, _SEND, bytearray(_RESPONSE.pack(*answer)))
            except FileNotFoundError:  # the caller was killed meanwhile
                continue


@contextmanager
def refusing(directory: Path) -> Iterator[tuple[Refusal, tuple[str, ...]]]:
    """Return the refusal, and the command that a program must run under."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "refusing"))
        listener.listen(1)
        yield Refusal(listener), (sys.executable, "-IS", __file__, str(directory / "refusing"))


def main(path: str, *command: str) -> None:
    asks = _CLONES[platform.machine()]
    code = struct.pack("=HBBI", 0x20, 0, 0, 0)  # load the number of the system call
    for left, number in zip(range(len(asks), 0, -1), asks, strict=True):
        code += struct.pack("=HBBI", 0x15, left, 0, number)  # if it is this one, jump to the last line
    code += struct.pack("=HBBI", 0x06, 0, 0, _ALLOW) + struct.pack("=HBBI", 0x06, 0, 0, _USER_NOTIF)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_SECCOMP[platform.machine()], _SET_MODE_FILTER, _NEW_LISTENER, program)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"x"], [fd])
    os.close(fd)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
