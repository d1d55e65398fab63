"""One daemon for one state directory and one runtime directory.

Two daemons on the same directories would share one in-flight buffer and one spool: each would miss events, and each
hook would run twice. So the daemon takes a POSIX record lock on a file in both directories (fcntl(2), F_SETLK). The
kernel releases the lock when the process ends, however it ends, and its children do not inherit it; F_GETLK names the
PID of the process that holds it. The content of the file means nothing, so nothing in it can be out of date.

A record lock is lost when the process closes any descriptor of that file: nothing else may open it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from cnprocd.errors import EX_TEMPFAIL, CnprocdError, StateError

FILE_NAME = "owner.lock"
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_WHOLE_FILE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class OwnedError(CnprocdError):
    """Another process holds the state or runtime directory. It may end: trying again later is right."""

    exit_status = EX_TEMPFAIL

    def __init__(self, directory: Path, pid: int | None) -> None:
        self.directory = directory
        self.pid = pid  # None: it ended just now; 0: in another PID namespace
        holder = f"cnprocd with PID {pid}" if pid else "cnprocd in another PID namespace"
        super().__init__(
            f"cannot use {directory}: {holder} holds it",
            "stop that process, or give this one its own --state-dir and --runtime-dir",
        )


class OwnerLock:
    """The locks on the directories of this process, held until it ends or calls close()."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], int] = {}  # device and inode of a directory -> descriptor of its lock file
        self.directories: list[Path] = []  # that are locked

    def take(self, directories: Iterable[Path]) -> None:
        """Lock each directory that is not locked by this object yet.

        Raises OwnedError: another process holds one. Raises StateError: a lock file cannot be made or locked.
        """
        for directory in directories:
            try:
                found = os.stat(directory)
                if (found.st_dev, found.st_ino) in self._held:
                    self.directories.append(directory)
                    continue
                fd = _opened(directory / FILE_NAME)
            except OSError as error:
                raise StateError(f"cannot open {directory / FILE_NAME}: {error.strerror}") from error
            try:
                fcntl.fcntl(fd, fcntl.F_SETLK, _WHOLE_FILE)
            except OSError as error:
                pid = _holder(fd)
                os.close(fd)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise OwnedError(directory, pid) from error
                raise StateError(f"cannot lock {directory / FILE_NAME}: {error.strerror}") from error
            self._held[found.st_dev, found.st_ino] = fd
            self.directories.append(directory)

    def close(self) -> None:
        """Release the locks."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()
        self.directories.clear()


def _opened(path: Path) -> int:
    """Open a lock file, and make it only if need be: on a frozen file system O_CREAT waits for the thaw."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o600)


def holder_of(directory: Path) -> int | None:
    """Return the PID of the process that holds a directory; 0: it is in another PID namespace; None: none does.

    Not for the process that holds it itself: the lock would be lost. Raises StateError: the file cannot be read.
    """
    try:
        fd = os.open(directory / FILE_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot open {directory / FILE_NAME}: {error.strerror}") from error
    try:
        return _holder(fd)
    finally:
        os.close(fd)


def _lock_file(path: Path) -> int:
    """Open the file, and create it only if it is missing: O_CREAT waits for a frozen disk (mnt_want_write)."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        os.lstat(path)  # so that the kernel knows the name: an unknown one waits as well
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o600)


def _holder(fd: int) -> int | None:
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, _WHOLE_FILE))
    return None if kind == fcntl.F_UNLCK else int(pid)
