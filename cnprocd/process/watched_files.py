"""The files that rules name, kept up to date: inotify(7) on them and on their directories, statx(2) when one changes.

An upgrade stays exact: inotify reports the rename before a process can run the new file, and IN_DELETE_SELF of the old
file when its last name and the last process that runs it are gone, before the kernel gives its inode number away again
(fs/dcache.c dentry_unlink_inode). So inotify is read after the exit records and before they are used: then every change
that they depend on is known. A file that was let go is kept until `let_go`, for records of the same batch.

A look at a path never asks another machine or a process: paths on such filesystems are not looked at, and statx is
called with AT_STATX_DONT_SYNC.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cnprocd.process.files import FileId, KnownFiles, Mounts, device_number, parse_mountinfo

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _AT_STATX_DONT_SYNC, _STATX_INO = -100, 0x4000, 0x100
_STATX_BYTES = 256
_STATX = struct.Struct("=I28xQ96xII")  # mask | ino | dev_major dev_minor (include/uapi/linux/stat.h)
_EVENT = struct.Struct("=iIII")  # wd mask cookie len (inotify(7))
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200
_IN_DELETE_SELF, _IN_MOVE_SELF = 0x400, 0x800
_IN_UNMOUNT, _IN_Q_OVERFLOW, _IN_IGNORED = 0x2000, 0x4000, 0x8000
_OF_DIRECTORY = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF
_READ_BYTES = 64 * 1024


class Unwatched(NamedTuple):
    """A named path whose file exit records do not identify, and why."""

    path: str
    reason: str


def file_id(path: str) -> FileId | None:
    """The file that a path leads to, from what this kernel has cached; None if there is none or it may not be seen."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _LIBC.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_INO, buffer) != 0:
        return None
    mask, inode, major, minor = _STATX.unpack_from(buffer)
    return FileId(device_number(major, minor), inode) if mask & _STATX_INO else None


def read_mounts() -> Mounts:
    """The mounts that this process sees."""
    with open("/proc/self/mountinfo", "rb") as file:
        return parse_mountinfo(file.read())


class WatchedFiles:
    """Keeps a KnownFiles true to the paths that rules name."""

    def __init__(self, files: KnownFiles) -> None:
        """Raises OSError if the kernel gives no inotify instance."""
        self._files = files
        self._inotify = _checked(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._mounts = read_mounts()
        self._directories: dict[int, str] = {}  # watch -> directory of named paths
        self._watched: dict[int, tuple[FileId, set[str]]] = {}  # watch -> a file and the paths that it has or had
        self._watch_of: dict[FileId, int] = {}
        self._gone: list[tuple[str, FileId]] = []

    def fileno(self) -> int:
        return self._inotify

    def close(self) -> None:
        os.close(self._inotify)

    def use(self, paths: Iterable[str]) -> None:
        """Watch these paths from now on, and no others."""
        wanted = frozenset(paths)
        self._mounts = read_mounts()
        for path in self._files.named_paths - wanted:
            self._files.unname(path)
        for path in wanted - self._files.named_paths:
            self._files.name(path, None)
            self._watch_directory(os.path.dirname(path))
        self._drop_unused()
        self.look_again()

    def unwatched(self) -> list[Unwatched]:
        """The named paths whose files exit records do not identify here."""
        reasons = ((path, self._reason_against(path)) for path in sorted(self._files.named_paths))
        return [Unwatched(path, reason) for path, reason in reasons if reason is not None]

    def refresh(self) -> None:
        """Take what inotify has: call it when the exit records of a batch were read and before they are used."""
        dirty: set[str] = set()
        for watch, mask, name in self._events():
            if mask & _IN_Q_OVERFLOW:
                dirty |= self._files.named_paths
            elif watch in self._watched:
                self._take_file_event(watch, mask)
            elif watch in self._directories:
                dirty |= self._take_directory_event(watch, mask, name)
        for path in dirty & self._files.named_paths:
            self._look(path)

    def look_again(self) -> None:
        """Look at every named path: finds what inotify cannot show, a renamed directory above or a new mount."""
        for path in self._files.named_paths:
            self._look(path)

    def let_go(self) -> None:
        """The batch is done: forget the files that the kernel let go."""
        for path, file in self._gone:
            self._files.release(path, file)
        self._gone.clear()

    def keep_old(self, path: str, tgid: int, file: FileId) -> None:
        """A process of the host runs a file that had this named path. Known until the kernel lets go of it."""
        if file in self._files.old_files(path) or not self._mounts.identifies(file.device):
            return
        if self._watch_file(f"/proc/{tgid}/exe", path, file) and file_id(f"/proc/{tgid}/exe") == file:
            self._files.name_old(path, file)

    def _look(self, path: str) -> None:
        before = self._files.current(path)
        file = file_id(path) if self._mounts.is_local(path) else None
        if file is not None and not self._mounts.identifies(file.device):
            file = None
        if file == before:
            return
        if file is not None:
            self._watch_file(path, path, file)
        self._files.name(path, file)
        if before is not None and before not in self._watch_of:
            self._gone.append((path, before))  # nothing will report when it is let go

    def _reason_against(self, path: str) -> str | None:
        if not self._mounts.is_local(path):
            return "it is on a filesystem that another machine or a process serves"
        file = file_id(path)
        if file is not None and not self._mounts.identifies(file.device):
            return "its filesystem gives one device and inode number to several files, as btrfs does"
        return None

    def _watch_directory(self, directory: str) -> None:
        if directory in self._directories.values() or not self._mounts.is_local(directory):
            return
        watch = self._add_watch(directory, _OF_DIRECTORY)
        if watch is not None:
            self._directories[watch] = directory

    def _watch_file(self, at: str, path: str, file: FileId) -> bool:
        watch = self._add_watch(at, _IN_DELETE_SELF)
        if watch is None:
            return False
        before, paths = self._watched.get(watch, (file, set()))
        if before != file:  # the path was replaced between the look at it and the watch
            self._watch_of.pop(before, None)
            paths = set()
        self._watched[watch] = (file, paths | {path})
        self._watch_of[file] = watch
        return True

    def _add_watch(self, path: str, mask: int) -> int | None:
        watch = _LIBC.inotify_add_watch(self._inotify, os.fsencode(path), mask)
        return watch if watch >= 0 else None  # gone, not readable for this user, or no watches left

    def _take_file_event(self, watch: int, mask: int) -> None:
        file, paths = self._watched[watch]
        if mask & (_IN_DELETE_SELF | _IN_UNMOUNT):
            self._gone += [(path, file) for path in paths]
        if mask & (_IN_IGNORED | _IN_DELETE_SELF | _IN_UNMOUNT):
            del self._watched[watch]
            self._watch_of.pop(file, None)

    def _take_directory_event(self, watch: int, mask: int, name: bytes) -> set[str]:
        directory = self._directories[watch]
        if mask & (_IN_DELETE_SELF | _IN_MOVE_SELF | _IN_UNMOUNT | _IN_IGNORED):
            del self._directories[watch]
            self._watch_directory(directory)
            return {path for path in self._files.named_paths if os.path.dirname(path) == directory}
        return {os.path.join(directory, os.fsdecode(name))}

    def _drop_unused(self) -> None:
        """Remove the watches on what no rule names any more."""
        directories = {os.path.dirname(path) for path in self._files.named_paths}
        for watch, directory in list(self._directories.items()):
            if directory not in directories:
                del self._directories[watch]
                _LIBC.inotify_rm_watch(self._inotify, watch)
        for watch, (file, paths) in list(self._watched.items()):
            left = paths & self._files.named_paths
            self._watched[watch] = (file, left)
            if not left:
                del self._watched[watch]
                self._watch_of.pop(file, None)
                _LIBC.inotify_rm_watch(self._inotify, watch)

    def _events(self) -> Iterator[tuple[int, int, bytes]]:
        while True:
            try:
                raw = os.read(self._inotify, _READ_BYTES)
            except BlockingIOError:
                return
            at = 0
            while at < len(raw):
                watch, mask, _cookie, length = _EVENT.unpack_from(raw, at)
                at += _EVENT.size
                yield watch, mask, raw[at : at + length].rstrip(b"\0")
                at += length


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno() or errno.EIO
        raise OSError(number, os.strerror(number))
    return result
