"""The files that rules name, kept up to date: inotify(7) on them and on their directories, a look when one changes.

An upgrade stays exact: inotify reports the rename before a process can run the new file, and IN_DELETE_SELF of the old
file when its last name and the last process that runs it are gone, before the kernel gives its inode number away again
(fs/dcache.c dentry_unlink_inode). So inotify is read after the exit records and before they are used: then every change
that they depend on is known. A file that was let go is kept until the records that were queued before it were used.

Paths on filesystems that another machine or a process serves are not looked at. The look itself is the caller's
function: a disk that does not answer must not stop the loop. A look that is late is repeated with the next tick.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from cnprocd.process.files import ALWAYS, FileId, KnownFiles, Mounts, NamedFile, Removal, parse_mountinfo
from cnprocd.process.former_files import FormerFiles
from cnprocd.process.host_view import sees_host_files

LookUp = Callable[[Sequence[str]], "list[FileId | None] | None"]
"""Return the file of each path, None for a path without one; None if the answer is late."""

IN_IMAGE = "this process is in a container, where the path leads to a file of the image"
LATE = "the look at it is late"

read = os.read
_LIBC = ctypes.CDLL(None, use_errno=True)
_EVENT = struct.Struct("=iIII")  # wd mask cookie len (inotify(7))
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200
_IN_DELETE_SELF, _IN_MOVE_SELF = 0x400, 0x800
_IN_UNMOUNT, _IN_Q_OVERFLOW, _IN_IGNORED = 0x2000, 0x4000, 0x8000
_OF_DIRECTORY = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF
_ABOVE = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_DELETE_SELF | _IN_MOVE_SELF  # of what is above that directory
_IN_MASK_ADD = 0x20000000
_READ_BYTES = 64 * 1024
_TICK_NS = 10_000_000  # the start of a process, which is counted from its exit event, can be late by so much
_MOUNTINFO = "/proc/self/mountinfo"


class Unwatched(NamedTuple):
    """A named path whose file exit records do not identify, and why."""

    path: str
    reason: str


class MountTable:
    """The mounts that this process sees, read again when they change (poll(2) on mountinfo, proc_pid_mountinfo(5))."""

    def __init__(self) -> None:
        self._fd = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLPRI)
        self._mounts = self._read()
        self.changes = 0  # since start, as far as they were seen

    def close(self) -> None:
        os.close(self._fd)

    def now(self) -> Mounts:
        """Return the mounts."""
        if self._poll.poll(0):
            self._mounts = self._read()
            self.changes += 1
        return self._mounts

    def _read(self) -> Mounts:
        with open(_MOUNTINFO, "rb") as file:
            return parse_mountinfo(file.read())


class WatchedFiles:
    """Keeps a KnownFiles true to the paths that rules name."""

    def __init__(self, files: KnownFiles, look_up: LookUp) -> None:
        """Raises OSError if the kernel gives no inotify instance."""
        self._files = files
        self._look_up = look_up
        self._mount_table = MountTable()
        self._mount_changes = 0
        self._sees_host = sees_host_files()
        self._inotify = _checked(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._directories: dict[int, str] = {}  # watch -> directory above named paths
        self._below: dict[str, set[str]] = {}  # each of these directories, and each named path -> named paths
        self._watched: dict[int, tuple[FileId, set[str]]] = {}  # watch -> a file and the paths that it has or had
        self._watch_of: dict[FileId, int] = {}
        self._reasons: dict[str, str] = {}  # path -> why exit records do not identify its file
        self._looked_ns: dict[str, int] = {}  # path -> when it was last known to lead to its current file
        self._unsettled: set[str] = set()  # paths that may have led to a file which is not known
        self._settling: set[str] = set()
        self._in_sight: set[str] = set()  # named paths that were looked at, and every directory above is watched
        self._gone: list[tuple[str, FileId]] = []
        self._leaving: list[tuple[str, FileId]] = []
        self._former = FormerFiles()

    def close(self) -> None:
        self._mount_table.close()
        self._former.let_go()
        os.close(self._inotify)

    def take_over(self, former: FormerFiles) -> None:
        """Know what the last daemon knew. Call it before the first `use`, which is about the paths that matter."""
        self._former = former

    def hand_on(self) -> tuple[tuple[NamedFile, int], ...]:
        """Return the files of the named paths, with the time when a path was last known to lead to its current file."""
        return tuple((one, self._looked_ns.get(one.path, 0)) for one in self._files.all_named())

    @property
    def holds_former(self) -> bool:
        """Whether files of the last daemon are kept open until `let_go`."""
        return bool(self._former.pins)

    def use(self, paths: Iterable[str]) -> None:
        """Watch these paths from now on, and no others."""
        wanted = frozenset(paths)
        for path in self._files.named_paths - wanted:
            self._files.unname(path)
            self._reasons.pop(path, None)
            self._looked_ns.pop(path, None)
            self._in_sight.discard(path)
        for path in wanted - self._files.named_paths:
            self._files.name(path, None)
        self._below = {}
        for path in wanted:
            for one in (path, *directories_above(path)):
                self._below.setdefault(one, set()).add(path)
        self._drop_unused()
        doubtful = list(self._use_former(wanted))
        self.look_again()
        self._gone += [one for one in doubtful if self._files.is_in_doubt(*one)]

    @property
    def unwatched(self) -> list[Unwatched]:
        """The named paths whose files exit records do not identify here."""
        return [Unwatched(path, reason) for path, reason in sorted(self._reasons.items())]

    @property
    def is_settled(self) -> bool:
        """Whether each file that a named path has led to since the last records is known."""
        return not (self._unsettled or self._settling)

    def identifies(self, device: int) -> bool:
        """Whether device and inode number name one file on this device."""
        return self._mount_table.now().identifies(device)

    def is_local(self, path: str) -> bool:
        """Whether looking at a path touches no filesystem that another machine or a process serves."""
        return self._mount_table.now().is_local(path)

    def refresh(self) -> bool:
        """Take what inotify has: call it when the exit records of a batch were read and before they are used.

        Return whether a named path may lead to another file now.
        """
        dirty: set[str] = set()
        appeared: Counter[str] = Counter()
        for watch, mask, name in self._events():
            if mask & _IN_Q_OVERFLOW:
                dirty |= self._files.named_paths
                self._unsettled |= self._files.named_paths
            elif watch in self._watched:
                dirty |= self._take_file_event(watch, mask)
            elif watch in self._directories:
                place = os.path.join(self._directories[watch], os.fsdecode(name))
                changed = self._take_directory_event(watch, mask, place)
                dirty |= changed
                if mask & (_IN_CREATE | _IN_MOVED_TO):
                    appeared.update(changed)
                    # What a directory that appeared had at a path below, before it was watched, is not known.
                    self._unsettled |= changed - {place}
        self._mount_table.now()
        if self._mount_table.changes != self._mount_changes:
            dirty |= self._files.named_paths
        dirty &= self._files.named_paths
        if dirty:
            self._mount_changes = self._mount_table.changes
            self._look(dirty)
            is_followed = self._queued_bytes() > 0  # the look may have shown what a later change has made
            self._unsettled |= {path for path, times in appeared.items() if times > 1 or is_followed}
        return bool(dirty) or not self.is_settled

    def look_again(self) -> None:
        """Look at every named path: finds what inotify did not show, such as a directory without a watch."""
        self._look(self._files.named_paths, is_repeated=True)

    def let_go(self) -> None:
        """The records of a batch were used, and no more are queued: forget the files that were gone before it was read.

        A record that was queued before its file was let go may not have been in the batch after which this was seen.
        """
        self._former.let_go()
        for path, file in self._leaving:
            self._files.release(path, file)
        self._leaving, self._gone = self._gone, []
        self._settling, self._unsettled = self._unsettled, set()

    def keep_old(self, path: str, tgid: int, file: FileId) -> None:
        """A process of the host runs a file that had this named path. Known until the kernel lets go of it."""
        in_doubt = self._files.is_in_doubt(path, file)
        if not self.identifies(file.device) or (file in self._files.old_files(path) and not in_doubt):
            return
        if self._watch_file(f"/proc/{tgid}/exe", path, file):
            self._files.name_old(path, file)
            if in_doubt:
                self._files.confirm(path, file)
                self._do_not_release(path, file)

    def _use_former(self, wanted: frozenset[str]) -> Iterator[tuple[str, FileId]]:
        """Take what the last daemon knew of these paths. Yield the files that may be others by now.

        An open descriptor proves that a file is the same. Without one its number may have been given away.
        """
        for one, looked_ns in self._former.take():
            if one.path not in wanted or not self.identifies(one.file.device):
                continue
            pin = self._former.pins.get(one.file)
            if pin is None:
                self._files.name_old(one.path, one.file, ALWAYS)
                yield one.path, one.file
                continue
            self._watch_file(f"/proc/self/fd/{pin}", one.path, one.file)
            if one.is_current:
                self._files.name(one.path, one.file)
                self._looked_ns[one.path] = looked_ns
            else:
                self._files.name_old(one.path, one.file, one.removal)

    def _look(self, paths: Iterable[str], is_repeated: bool = False) -> None:
        """Look at paths. `is_repeated`: nothing shows a change, so of a watched path a late answer costs nothing."""
        mounts = self._mount_table.now()
        looked_at = []
        for path in sorted(paths):
            if not self._sees_host:
                self._reasons[path] = IN_IMAGE
            elif mounts.is_local(path):
                looked_at.append(path)
            else:
                self._reasons[path] = "another machine or a process serves its filesystem"
        now_ns = time.monotonic_ns()
        found = self._look_up(looked_at)
        if found is None:
            # Each may have a new file that is not known.
            doubtful = (path for path in looked_at if not is_repeated or path not in self._in_sight)
            self._reasons |= dict.fromkeys(doubtful, LATE)
            return
        watches: dict[tuple[str, int], bool] = {}
        for path, file in zip(looked_at, found, strict=True):
            if file is not None and not mounts.identifies(file.device):
                self._reasons[path] = "its filesystem, such as btrfs, can give one device and inode number to two files"
                file = None
            else:
                self._reasons.pop(path, None)
            self._watch_above(path, watches)
            self._take(path, file)
            self._looked_ns[path] = now_ns

    def _take(self, path: str, file: FileId | None) -> None:
        before = self._files.current(path)
        if file == before and (file is None or file in self._watch_of):
            return
        if file is not None:
            self._watch_file(path, path, file)
        self._files.name(path, file, None if before is None else self._removal(path))
        if file == before and file is not None:  # the file before was let go, and a new one here has its number
            self._do_not_release(path, file)
            return
        if before is not None and before not in self._watch_of:
            self._gone.append((path, before))  # nothing will report when it is let go

    def _do_not_release(self, path: str, file: FileId) -> None:
        self._gone = [one for one in self._gone if one != (path, file)]
        self._leaving = [one for one in self._leaving if one != (path, file)]

    def _removal(self, path: str) -> Removal:
        """Return when a path ceased to lead to its file: since the last look, and before its directory last changed.

        The time of the directory can be set, so what started between it and now is in doubt.
        """
        now_ns = time.monotonic_ns()
        try:
            changed_ns = os.stat(os.path.dirname(path)).st_mtime_ns - time.time_ns() + now_ns
        except OSError:
            changed_ns = 0
        return Removal(max(self._looked_ns.get(path, 0), min(changed_ns, now_ns)), now_ns + _TICK_NS)

    def _watch_above(self, path: str, watches: dict[tuple[str, int], bool]) -> None:
        """Watch the directories above a path. A new entry shows in the lowest one that exists.

        `watches`: the watches that were tried before for other paths, and whether they succeeded.
        """
        mask = _OF_DIRECTORY
        self._in_sight.add(path)
        for directory in directories_above(path):
            key = directory, mask
            if key not in watches:
                watches[key] = self._watch_directory(directory, mask)
            if watches[key]:
                mask = _ABOVE
            else:
                self._in_sight.discard(path)

    def _watch_directory(self, directory: str, mask: int) -> bool:
        watch = self._add_watch(directory, mask | _IN_MASK_ADD)
        if watch is None:
            return False
        if self._directories.get(watch) == directory:
            return True
        for former in [one for one, path in self._directories.items() if path == directory]:
            del self._directories[former]  # a directory above was replaced, or a filesystem is mounted here
            _LIBC.inotify_rm_watch(self._inotify, former)
        self._directories[watch] = directory
        return True

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

    def _take_file_event(self, watch: int, mask: int) -> set[str]:
        """Take the end of a file. Return the paths to look at: a new file may have its number already."""
        file, paths = self._watched[watch]
        if mask & (_IN_DELETE_SELF | _IN_UNMOUNT):
            self._gone += [(path, file) for path in paths]
        if mask & (_IN_IGNORED | _IN_DELETE_SELF | _IN_UNMOUNT):
            del self._watched[watch]
            self._watch_of.pop(file, None)
        return paths

    def _take_directory_event(self, watch: int, mask: int, place: str) -> set[str]:
        if not mask & (_IN_DELETE_SELF | _IN_MOVE_SELF | _IN_UNMOUNT | _IN_IGNORED):
            return self._below.get(place, set())
        directory = self._directories.pop(watch)
        if mask & _IN_MOVE_SELF:
            _LIBC.inotify_rm_watch(self._inotify, watch)
        return self._below.get(directory, set())

    def _drop_unused(self) -> None:
        """Remove the watches on what no rule names any more."""
        for watch, directory in list(self._directories.items()):
            if directory not in self._below:
                del self._directories[watch]
                _LIBC.inotify_rm_watch(self._inotify, watch)
        for watch, (file, paths) in list(self._watched.items()):
            left = paths & self._files.named_paths
            self._watched[watch] = (file, left)
            if not left:
                del self._watched[watch]
                self._watch_of.pop(file, None)
                _LIBC.inotify_rm_watch(self._inotify, watch)

    def _queued_bytes(self) -> int:
        (queued,) = struct.unpack("=i", fcntl.ioctl(self._inotify, termios.FIONREAD, bytes(4)))
        return int(queued)

    def _events(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield what is queued now. What comes meanwhile is about later records, and may come without end."""
        left = self._queued_bytes()
        while left > 0:
            try:
                raw = read(self._inotify, min(left, _READ_BYTES))
            except BlockingIOError:
                return
            left -= len(raw)
            at = 0
            while at < len(raw):
                watch, mask, _cookie, length = _EVENT.unpack_from(raw, at)
                at += _EVENT.size
                yield watch, mask, raw[at : at + length].rstrip(b"\0")
                at += length


def directories_above(path: str) -> tuple[str, ...]:
    """Return the directories above an absolute path, the lowest first."""
    found = []
    while (above := os.path.dirname(path)) != path:
        found.append(above)
        path = above
    return tuple(found)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno() or errno.EIO
        raise OSError(number, os.strerror(number))
    return result
