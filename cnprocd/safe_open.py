"""Opening a file that nobody but root (or ourselves, when we are not root) could have written or put there.

Strategy: walk the path from "/" one component at a time, each opened by descriptor relative to the one before
(O_PATH|O_NOFOLLOW) and judged by fstat on that descriptor; symlinks are expanded by hand under the same judgement. What
is finally opened for reading is the very inode that was judged (through /proc/self/fd), so nothing can be swapped in
between. A directory that others may write is good only when it is sticky: then a component of a trusted owner
in it cannot be replaced by anyone else.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from contextlib import ExitStack
from pathlib import Path

from cnprocd.errors import ConfigError

MOST_LINKS = 40
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_SORTS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UntrustedError(ConfigError):
    """The file, or a directory on the way to it, could be changed by someone else, or it is not a regular file."""


def open_trusted(path: Path) -> int:
    """Open a regular file for reading; the caller closes the descriptor.

    Raises UntrustedError when someone other than root (or our own user) could write it or anything on the way to it, or
    when it is not a regular file; OSError as open(2) does.
    """
    with ExitStack() as opened:
        target = _walk(Path.cwd().joinpath(path), opened)
        return os.open(f"/proc/self/fd/{target}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _walk(path: Path, opened: ExitStack) -> int:
    """An O_PATH descriptor of the regular file at an absolute path, everything on the way judged."""

    def step(name: str, directory: int | None) -> int:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        opened.callback(os.close, fd)
        return fd

    here = step("/", None)
    _judge(here)
    left = deque(path.parts[1:])
    links = 0
    while left:
        there = step(left.popleft(), here)
        mode = os.fstat(there).st_mode
        if not left and not stat.S_ISLNK(mode):
            return _regular(there)
        _judge(there)
        if stat.S_ISLNK(mode):
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = os.readlink("", dir_fd=there)
            left.extendleft(part for part in reversed(target.split("/")) if part not in ("", "."))
            here = step("/", None) if target.startswith("/") else here
        else:
            here = there
    return _regular(here)


def _regular(fd: int) -> int:
    # The sort comes first: of a device that everyone may write, nobody wants to hear "chmod go-w".
    sort = _SORTS.get(stat.S_IFMT(os.fstat(fd).st_mode))
    if sort is not None:
        raise UntrustedError(f"{_name(fd)} is {sort}, not a regular file", "name a regular file")
    _judge(fd)
    return fd


def _judge(fd: int) -> None:
    found = os.fstat(fd)
    name = _name(fd)
    if found.st_uid not in (0, os.geteuid()):
        raise UntrustedError(
            f"{name} belongs to user {found.st_uid}, who could change it", f"chown -h root:root {name}"
        )
    # A symlink's mode means nothing; in a sticky directory nobody can replace what a trusted owner put there.
    exempt = stat.S_ISLNK(found.st_mode) or (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX)
    if found.st_mode & _WRITABLE_BY_OTHERS and not exempt:
        who = "everyone" if found.st_mode & stat.S_IWOTH else f"the members of group {found.st_gid}"
        raise UntrustedError(
            f"{name} can be written by {who}", f"chmod go-w {name}, or whoever can write it commands this machine"
        )


def _name(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")
