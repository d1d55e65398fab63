"""The interface to the service manager: sd_notify, the watchdog, adopted and stored descriptors.

One object is built from an environment mapping at start. Without NOTIFY_SOCKET every method does nothing, so a
foreground run needs no special case. The sdnotify package sends plain ASCII. Other texts and descriptors are sent as
bytes on the same socket, because sdnotify encodes as latin-1, hides the error, and passes no descriptors.

Facts relied on (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)):
- NOTIFY_SOCKET is a path, or `@name` in the abstract namespace; a message is KEY=VALUE lines in one datagram.
- RELOADING=1 of Type=notify-reload (systemd 253) must carry MONOTONIC_USEC; older ones ignore the extra line.
- WATCHDOG_USEC applies only if WATCHDOG_PID is absent or this process; LISTEN_* only if LISTEN_PID is this process.
- Passed descriptors begin at 3, in the order of LISTEN_FDNAMES, and without close-on-exec. The sockets of Sockets= and
  descriptors stored with FDSTORE=1 both come this way and differ by name only.
- FDPOLL=0 keeps systemd from dropping a stored netlink socket: an overrun raises POLLERR on it, which systemd would
  take for a hang-up.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import re
import socket
import time
from collections.abc import Mapping, MutableMapping

import sdnotify

LISTEN_FDS_START = 3
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_FD_NAME = re.compile(r"[\x21-\x39\x3b-\x7e]{1,255}")  # FileDescriptorName=: printable ASCII without the colon
_OURS_ALONE = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID")


class ServiceManager:
    """The service manager behind NOTIFY_SOCKET, if there is one.

    Removes the variables of sd_notify(3) from `environ`, because a hook that inherited them could act as the daemon.
    """

    def __init__(self, environ: MutableMapping[str, str], pid: int | None = None) -> None:
        pid = os.getpid() if pid is None else pid
        self.watchdog_interval_s = watchdog_interval_s(environ, pid)
        self._adopted = adopted_descriptors(environ, pid)
        for descriptor in (each for group in self._adopted.values() for each in group):
            fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        self._socket = connect(notify_address(environ))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: dict[str, tuple[str, int | None]] = {}  # kind -> message that waits, and a descriptor to pass
        self._notifier = sdnotify.SystemdNotifier()
        if self._notifier.socket is not None:  # sdnotify reads os.environ itself
            self._notifier.socket.close()
        self._notifier.socket = self._socket
        self._notifier.debug = True  # raise errors instead of ignoring them
        for name in _OURS_ALONE:
            environ.pop(name, None)

    @property
    def present(self) -> bool:
        """Whether there is a service manager."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """Report that the start, or a reload, is complete."""
        self._notify(f"READY=1\nSTATUS={one_line(status)}")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._notify(f"STATUS={one_line(text)}")

    def reloading(self) -> None:
        """Report that a reload began. `ready` ends it, whether the new rules were loaded or rejected."""
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._notify("STOPPING=1")

    def watchdog(self) -> None:
        self._notify("WATCHDOG=1")

    def adopted(self, name: str) -> list[int]:
        """Return the descriptors passed under `name`, oldest first. The caller owns them."""
        return list(self._adopted.get(name, ()))

    def store_fd(self, name: str, fd: int) -> None:
        """Store a duplicate of `fd` with the manager, for the next process of this service to adopt.

        Needs FileDescriptorStoreMax= in the unit; without it the manager closes the duplicate.
        """
        if not _FD_NAME.fullmatch(name):
            raise ValueError(
                f"invalid descriptor name {name!r}: use printable ASCII without a colon, at most 255 bytes"
            )
        if self._socket is not None:
            self._notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", kind=f"descriptor {name}", fd=os.dup(fd))

    def adopted_like(self, prefix: str) -> dict[str, list[int]]:
        """Return the descriptors whose names begin so. The caller owns them."""
        return {name: list(fds) for name, fds in self._adopted.items() if name.startswith(prefix)}

    def forget_fd(self, name: str) -> None:
        """Have the manager close the descriptors stored under `name`."""
        self._notify(f"FDSTOREREMOVE=1\nFDNAME={name}", kind=f"descriptor {name}")

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send from this event loop what the manager has no room for now."""
        self._loop = loop
        self._flush()

    def _notify(self, message: str, kind: str = "", fd: int | None = None) -> None:
        """Send a message, or keep it until there is room. Of each kind only the latest is kept, and all in order."""
        if self._socket is None:
            return
        former = self._pending.pop(kind or message.partition("=")[0], None)
        if former is not None and former[1] is not None:
            os.close(former[1])
        self._pending[kind or message.partition("=")[0]] = message, fd
        self._flush()

    def _flush(self) -> None:
        """Send what waits. The manager's socket is full while PID 1 reads nothing: never wait for it."""
        if self._socket is None:
            return
        if self._loop is not None:
            self._loop.remove_writer(self._socket)
        while self._pending:
            kind, (message, fd) = next(iter(self._pending.items()))
            try:
                self._send(message, fd)
            except BlockingIOError:
                if self._loop is not None:
                    self._loop.add_writer(self._socket, self._flush)
                return
            except OSError:
                pass  # the daemon works without the manager
            del self._pending[kind]
            if fd is not None:
                os.close(fd)

    def _send(self, message: str, fd: int | None) -> None:
        assert self._socket is not None
        if fd is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self._socket.sendmsg([message.encode()], rights)
        elif message.isascii():
            self._notifier.notify(message)
        else:
            self._socket.send(message.encode("utf-8", "replace"))


def one_line(text: str) -> str:
    """Return `text` without control characters, which could end the line and begin another command."""
    return " ".join(_CONTROL.sub(" ", text).split())


def notify_address(environ: Mapping[str, str]) -> str | None:
    """Return NOTIFY_SOCKET as an AF_UNIX address. Other families (vsock) are for virtual machines."""
    value = environ.get("NOTIFY_SOCKET", "")
    if value.startswith("@"):
        return "\0" + value[1:]
    return value if value.startswith("/") else None


def connect(address: str | None) -> socket.socket | None:
    if address is None:
        return None
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    channel.setblocking(False)
    try:
        channel.connect(address)
    except OSError:  # left over from another service's environment
        channel.close()
        return None
    return channel


def watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    """Return half of the watchdog timeout, or None if the manager does not watch this process."""
    try:
        allowed = int(environ.get("WATCHDOG_USEC", "0"))
        meant = int(environ.get("WATCHDOG_PID", str(pid)))
    except ValueError:
        return None
    return allowed / 2_000_000 if allowed > 0 and meant == pid else None


def adopted_descriptors(environ: Mapping[str, str], pid: int) -> dict[str, list[int]]:
    """Return name -> descriptors from LISTEN_FDS and LISTEN_FDNAMES; empty if they are for another process."""
    try:
        count = int(environ.get("LISTEN_FDS", "0"))
        meant = int(environ.get("LISTEN_PID", "0"))
    except ValueError:
        return {}
    if meant != pid or count <= 0:
        return {}
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    adopted: dict[str, list[int]] = {}
    for index in range(count):
        name = names[index] if index < len(names) and names[index] else "unknown"
        adopted.setdefault(name, []).append(LISTEN_FDS_START + index)
    return adopted
