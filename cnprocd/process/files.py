"""Which program a process runs, by the identity of its file: (device, inode) -> path. PURE.

`exe` is a verified file of the host. The exit record names the file that a task executed by device and inode
(kernel/tsacct.c exe_add_tsk), whatever the task's mount namespace and however short its life, so a bind mount forges
nothing. The text that /proc/PID/exe shows is a claim: in a mount namespace of its own a user decides what stands there.

Facts (measured on 6.18):
- ac_exe_dev is the superblock's device, encoded as stat(2)'s st_dev, and ac_exe_inode the kernel's i_ino. On ext4,
  tmpfs and on overlayfs over one filesystem both equal stat(2).
- On btrfs they do not identify a file: files of two subvolumes share device and inode, and st_dev is the subvolume's.
  On overlayfs over several filesystems st_dev is the layer's. Both show an st_dev that is the device of no mount.
- mountinfo shows the superblock's device (fs/proc_namespace.c), so what can be trusted is known from it alone.
- An inode number is given away again once the last link and the last process that runs the file are gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

DELETED = " (deleted)"  # fs/d_path.c, behind the path of a file whose name was removed
MOST_SEEN = 4096
MOST_OLD = 8  # old files of one named path

UNIQUE_FILESYSTEMS = frozenset(
    "ext2 ext3 ext4 xfs tmpfs ramfs rootfs devtmpfs f2fs jfs reiserfs nilfs2 zfs".split()
    + "squashfs erofs iso9660 udf overlay".split()
)
"""Local filesystems on which device and inode name one file, if stat(2) shows the superblock's device.

Not btrfs and bcachefs (subvolumes share inode numbers), nor vfat and exfat (numbers are given anew after eviction), nor
what another machine or a process serves: looking at a path there can block.
"""
LOCAL_FILESYSTEMS = UNIQUE_FILESYSTEMS | frozenset("btrfs bcachefs vfat exfat msdos".split())


class FileId(NamedTuple):
    """A file by device and inode, as st_dev and st_ino of stat(2) count them."""

    device: int
    inode: int


class FoundFile(NamedTuple):
    """What is known of a file. `paths` has more than one if rules name hard links of it."""

    paths: tuple[str, ...]  # empty: the process started when the path was given to another file, or after it
    is_named: bool  # some rule names it literally
    is_deleted: bool  # its path leads to another file, or to none


class Removal(NamedTuple):
    """When a path ceased to lead to a file, at some time between these two (CLOCK_MONOTONIC)."""

    earliest_ns: int
    latest_ns: int


ALWAYS = Removal(-(1 << 62), 1 << 62)  # of a file of which only the number is known: which file it is, is in doubt


class NamedFile(NamedTuple):
    """A file that a named path leads to, or led to, as one daemon hands it on to the next."""

    path: str
    file: FileId
    is_current: bool
    removal: Removal | None  # of an old file, if it is known


@dataclass(frozen=True, slots=True)
class ExeClaim:
    """What /proc/PID/exe shows: `path` without the kernel's suffix, and which file that is, if it could be asked."""

    path: str
    is_deleted: bool
    file: FileId | None


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo."""

    point: str
    device: int
    filesystem: str


class Mounts:
    """The mount table of the host, as far as identities of files depend on it."""

    def __init__(self, mounts: Iterable[Mount]) -> None:
        self._by_point = {mount.point: mount for mount in mounts}  # a later mount covers an earlier one
        self._unique = {mount.device for mount in self._by_point.values() if mount.filesystem in UNIQUE_FILESYSTEMS}

    def identifies(self, device: int) -> bool:
        """Whether files of this device are told apart by device and inode, in exit records as in stat(2)."""
        return device in self._unique

    def is_local(self, path: str) -> bool:
        """Whether looking at a path touches no filesystem that another machine or a process serves."""
        points = [path[:at] or "/" for at in range(len(path)) if path[at] == "/"] + [path]
        crossed = [self._by_point[point] for point in points if point in self._by_point]
        return bool(crossed) and all(mount.filesystem in LOCAL_FILESYSTEMS for mount in crossed)


class KnownFiles:
    """The map from files to paths: what rules name, and what was seen of running processes. Bounded.

    A named path has one current file and, after an upgrade, old ones that processes may still run: all of them are that
    path. The owner of this map takes an old file away once the kernel has let it go, for its number can then return.
    """

    def __init__(self, most_seen: int = MOST_SEEN) -> None:
        self._most_seen = most_seen
        self._current: dict[str, FileId | None] = {}
        self._named: dict[FileId, tuple[str, ...]] = {}
        self._seen: dict[FileId, str] = {}
        self._removals: dict[tuple[str, FileId], Removal] = {}

    @property
    def named_paths(self) -> frozenset[str]:
        """The paths that rules name literally."""
        return frozenset(self._current)

    def name(self, path: str, file: FileId | None, removal: Removal | None = None) -> None:
        """`path` leads to `file` now; None: to no file. The file before stays known as an old one.

        `removal`: when it ceased to lead to the file before. Processes that started later execute that file by another
        path, or another file that has its number.
        """
        before = self._current.get(path)
        if before is not None and before != file and removal is not None:
            self._removals[path, before] = removal
        self._current[path] = file
        if file is None:
            return
        self._removals.pop((path, file), None)
        self.name_old(path, file)
        self._seen.pop(file, None)

    def name_old(self, path: str, file: FileId, removal: Removal | None = None) -> None:
        """`file` had this path, and processes may run it. Beyond MOST_OLD the oldest is forgotten."""
        self._current.setdefault(path, None)
        if removal is not None:
            self._removals[path, file] = removal
        paths = self._named.get(file, ())
        if path not in paths:
            self._named[file] = (*paths, path)
        old = self.old_files(path)
        for surplus in old[: max(0, len(old) - MOST_OLD)]:
            self.release(path, surplus)

    def current(self, path: str) -> FileId | None:
        """The file that a named path leads to."""
        return self._current.get(path)

    def old_files(self, path: str) -> tuple[FileId, ...]:
        """The files that had this path, oldest first."""
        current = self._current.get(path)
        return tuple(file for file, paths in self._named.items() if path in paths and file != current)

    def all_named(self) -> tuple[NamedFile, ...]:
        """Every file that a named path leads to, or led to."""
        return tuple(
            NamedFile(path, file, self._current.get(path) == file, self._removals.get((path, file)))
            for file, paths in self._named.items()
            for path in paths
        )

    def is_in_doubt(self, path: str, file: FileId) -> bool:
        """Whether no process is said to execute an old file of this path, for it may be another one by now."""
        return self._removals.get((path, file)) == ALWAYS

    def confirm(self, path: str, file: FileId) -> None:
        """An old file of this path is that file still."""
        self._removals.pop((path, file), None)

    def release(self, path: str, file: FileId) -> None:
        """The kernel has let go of an old file of this path."""
        self._removals.pop((path, file), None)
        left = tuple(one for one in self._named.get(file, ()) if one != path)
        if left:
            self._named[file] = left
        else:
            self._named.pop(file, None)

    def unname(self, path: str) -> None:
        """No rule names this path any more."""
        for file in (*self.old_files(path), self._current.pop(path, None)):
            if file is not None:
                self.release(path, file)

    def learn(self, file: FileId, path: str) -> None:
        """A process was seen that runs `file`, verified to have this path. The oldest entry makes room."""
        if file in self._named:
            return
        self._seen.pop(file, None)
        while len(self._seen) >= self._most_seen:
            del self._seen[next(iter(self._seen))]
        self._seen[file] = path

    def forget(self, file: FileId) -> None:
        """What was seen of this file holds no longer."""
        self._seen.pop(file, None)

    def find(self, file: FileId, start_ns: int | None = None) -> FoundFile | None:
        """What is known of a file. What was only seen must still be checked: see `FoundFile.is_named`.

        `start_ns`: when the process that executed it started; None: at a time when it had these paths.
        """
        paths = self._named.get(file)
        if paths is not None and self._removals:
            paths = self._had_at(file, paths, -1 if start_ns is None else start_ns)
        if paths is not None:
            return FoundFile(paths, True, all(self._current.get(path) != file for path in paths))
        seen = self._seen.get(file)
        return None if seen is None else FoundFile((seen,), False, False)

    def varies(self, file: FileId) -> bool:
        """Whether the paths of a file depend on when the process started that executed it."""
        return bool(self._removals) and any((path, file) in self._removals for path in self._named.get(file, ()))

    def _had_at(self, file: FileId, paths: tuple[str, ...], start_ns: int) -> tuple[str, ...] | None:
        """Return the paths that the file had then; none if that is in doubt; None if it had none of them."""
        removals = {path: self._removals.get((path, file)) for path in paths}
        had = tuple(path for path, one in removals.items() if one is None or start_ns < one.earliest_ns)
        is_in_doubt = any(one is not None and start_ns <= one.latest_ns for one in removals.values())
        return had if had or is_in_doubt else None


def claim_of(text: str, file: FileId | None, file_at_text: FileId | None) -> ExeClaim:
    """What /proc/PID/exe claims. `file_at_text`: the file that the host has at exactly this text.

    A file can really be called "x (deleted)": then the host has it there.
    """
    is_deleted = text.endswith(DELETED) and (file is None or file != file_at_text)
    return ExeClaim(text.removesuffix(DELETED) if is_deleted else text, is_deleted, file)


def verified_path(claim: ExeClaim, at_path: FileId | None, is_on_host: bool) -> str | None:
    """The claim's path if it is a file of the host; None if that cannot be said.

    `at_path`: the file that the host has at the claim's path. `is_on_host`: the file is on a mount of the host, which
    only root arranges, so the kernel's text is the host's path even if the file was replaced. The text of a file on
    another mount is a path of another namespace, whatever the namespace of the process is.
    """
    if is_on_host:
        return claim.path
    is_same = claim.file is not None and claim.file == at_path and not claim.is_deleted
    return claim.path if is_same else None


_OCTAL = re.compile(rb"\\([0-7]{3})")


def parse_mountinfo(raw: bytes) -> Mounts:
    """The mounts of /proc/self/mountinfo (proc_pid_mountinfo(5)). A line of another form is skipped."""
    return Mounts(mount for line in raw.split(b"\n") if (mount := _mount(line)) is not None)


def _mount(line: bytes) -> Mount | None:
    fields = line.split(b" ")
    if len(fields) < 9 or b"-" not in fields[6:]:
        return None
    major, _, minor = fields[2].partition(b":")
    separator = fields.index(b"-", 6)
    if not (major.isdigit() and minor.isdigit()) or separator + 1 >= len(fields):
        return None
    point = _OCTAL.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), fields[4])
    return Mount(
        point.decode("utf-8", "surrogateescape"),
        device_number(int(major), int(minor)),
        fields[separator + 1].decode("ascii", "replace"),
    )


def device_number(major: int, minor: int) -> int:
    """st_dev of a device: include/linux/kdev_t.h huge_encode_dev(), which taskstats uses too."""
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12
