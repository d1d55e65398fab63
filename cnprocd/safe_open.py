"""Open a file that only root, or the user of this process, can have written, replaced or moved there.

The path is walked from "/", one component at a time. Each component is opened relative to the one before
(O_PATH|O_NOFOLLOW) and its owner and mode are checked by fstat(2) on that descriptor; symbolic links are expanded here,
under the same checks. The file is then opened for reading through /proc/self/fd, which is the inode that was checked,
so no component can be replaced in between. A directory that others can write is accepted only if it is sticky: in it,
only its owner can replace a component (inode(7)).

A process that becomes a hook runs this (launch/starter.py), so it loads little.
"""

from __future__ import annotations

import errno
import os
import stat

from cnprocd.errors import ConfigError

MOST_LINKS = 40
_DESCRIPTORS = "/proc/self/fd"
_HOMES = ("/home/", "/root/")
_SYSTEM = ("/etc/", "/run/", "/usr/")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnsafeFileError(ConfigError):
    """Another user can change the file or a directory of its path, or it is not a regular file."""


def safe_open(path: str | os.PathLike[str], move_hint: str = "move it to a directory that only root can write") -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    `move_hint` is the hint of an error about a user's directory, or about a file in one: its owner must not be changed.
    Raises UnsafeFileError if a user other than root and our own could write the file or a component of its path, or if
    it is not a regular file; OSError as open(2) does.
    """
    whole, opened = os.fspath(path), list[int]()
    try:
        target = _walk(whole if whole.startswith("/") else f"{os.getcwd()}/{whole}", opened, move_hint)
        return os.open(f"{_DESCRIPTORS}/{target}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if os.path.exists(_DESCRIPTORS):
            raise
        what = f"cannot find out which users can write {whole}: /proc is not mounted"
        raise UnsafeFileError(what, "mount it: mount -t proc proc /proc") from None
    finally:
        for fd in opened:
            os.close(fd)


def _walk(path: str, opened: list[int], move_hint: str) -> int:
    """Return an O_PATH descriptor of the regular file at an absolute path, each component checked."""

    def step(name: str, directory: int | None) -> int:
        opened.append(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory))
        return opened[-1]

    here = step("/", None)
    _check(here, os.fstat(here), move_hint)
    left = _components(path)
    links = 0
    while left:
        there = step(left.pop(), here)
        found = os.fstat(there)
        if not left and not stat.S_ISLNK(found.st_mode):
            return _regular(there, found, move_hint)
        _check(there, found, move_hint)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink("", dir_fd=there)
            left += _components(target)
            here = step("/", None) if target.startswith("/") else here
        else:
            here = there
    return _regular(here, os.fstat(here), move_hint)


def _components(path: str) -> list[str]:
    """Return the components of a path, the last one first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _regular(fd: int, found: os.stat_result, move_hint: str) -> int:
    # The type comes first: the hint "chmod go-w" is wrong for a device that all users can write.
    kind = _KINDS.get(stat.S_IFMT(found.st_mode))
    if kind is not None:
        raise UnsafeFileError(f"{_name(fd)} is {kind}, not a regular file", "name a regular file")
    _check(fd, found, move_hint)
    return fd


def _check(fd: int, found: os.stat_result, move_hint: str) -> None:
    if found.st_uid not in (0, os.geteuid()):
        name = _name(fd)
        raise UnsafeFileError(
            f"{name} belongs to user {found.st_uid}; only root may own it",
            move_hint if _is_personal(name, found.st_mode) else f"chown -h root:root {name}",
        )
    # The mode of a symbolic link has no meaning. In a sticky directory only the owner of a file can replace it.
    exempt = stat.S_ISLNK(found.st_mode) or (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX)
    if found.st_mode & _WRITABLE_BY_OTHERS and not exempt:
        name = _name(fd)
        writers = "everyone" if found.st_mode & stat.S_IWOTH else f"the members of group {found.st_gid}"
        raise UnsafeFileError(f"{name} can be written by {writers}", f"remove the permission: chmod go-w {name}")


def _is_personal(name: str, mode: int) -> bool:
    """Return whether a file of another user is a user's own directory, or lies in one.

    A directory that belongs to a user is that user's own, except in the system's directories.
    """
    return name.startswith(_HOMES) or (stat.S_ISDIR(mode) and not name.startswith(_SYSTEM))


def _name(fd: int) -> str:
    return os.readlink(f"{_DESCRIPTORS}/{fd}")
