"""Open a hook's program, and refuse it if any user but root (or this process's own) could have changed it.

safe_open.py walks the path by descriptor and checks every component. The checks here use the descriptor that it opened.
The interpreter of a #! script is checked in the same way.

An ELF program is executed by descriptor on Linux 6.14 and newer: the checked file runs even if a package manager
replaces it meanwhile. Everything else is executed by its resolved path, with device and inode compared again in the
child right before the exec. That race is not open to attackers: only root can change what the checked path names.
- A script executed by descriptor would get /dev/fd/N as its $0, so `dirname "$0"` would break.
- Before Linux 6.14 the comm of a program executed by descriptor is the descriptor's number ("4" in ps).
Set-user-ID bits and file capabilities of the program are left to the administrator.

A process that becomes a hook runs this (starter.py), so it loads little: no dataclasses, no pathlib.
"""

from __future__ import annotations

import errno
import os
import stat

from cnprocd.errors import CnprocdError
from cnprocd.safe_open import UnsafeFileError, safe_open

SHEBANG_BYTES = 256  # BINPRM_BUF_SIZE
MOST_INTERPRETERS = 5  # as fs/exec.c: a script may be the interpreter of a script
COMM_KEPT_SINCE = (6, 14)
_FOR_NOW = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

_MOVE_HOOK = "move the hook to a root-owned directory such as /usr/local/lib/cnprocd"
_OTHER_INTERPRETER = "use an interpreter in a root-owned directory such as /usr/bin"


class HookRefusedError(CnprocdError):
    """The hook was not started: its program, user or arguments cannot be used."""


class Program:
    """A checked program. `fd` is open for reading; the caller closes it. `path` contains no symlink."""

    __slots__ = ("by_fd", "fd", "inode", "path")

    def __init__(self, fd: int, path: str, inode: tuple[int, int], by_fd: bool) -> None:
        self.fd = fd
        self.path = path
        self.inode = inode
        self.by_fd = by_fd


def open_program(path: str, depth: int = MOST_INTERPRETERS) -> Program:
    """Open and check the program at an absolute path. Waits for its disk.

    Raises HookRefusedError if the program must not be run. Raises OSError if descriptors or memory are missing: that
    does not depend on the program, so the job must wait, not fail.
    """
    if not path.startswith("/"):
        raise HookRefusedError(f"{path} is not an absolute path", "name the program with its full path")
    try:
        fd = safe_open(path, _MOVE_HOOK if depth == MOST_INTERPRETERS else _OTHER_INTERPRETER)
    except UnsafeFileError as error:
        raise HookRefusedError(error.what, error.hint) from error
    except OSError as error:
        if error.errno in _FOR_NOW:
            raise
        raise HookRefusedError(f"cannot open {path}: {os.strerror(error.errno or 0)}") from error
    try:
        return _check(fd, path, depth)
    except BaseException:
        os.close(fd)
        raise


def _check(fd: int, path: str, depth: int) -> Program:
    found = os.fstat(fd)
    if not found.st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH):
        raise HookRefusedError(f"{path} is not executable", f"chmod +x {path}")
    head = os.pread(fd, SHEBANG_BYTES, 0)
    if head.startswith(b"#!"):
        _check_interpreter(path, head, depth)
    return Program(
        fd=fd,
        path=os.readlink(f"/proc/self/fd/{fd}"),
        inode=(found.st_dev, found.st_ino),
        by_fd=head.startswith(b"\x7fELF") and comm_is_kept(os.uname().release),
    )


def _check_interpreter(path: str, head: bytes, depth: int) -> None:
    words = head[2:].split(b"\n", 1)[0].split()
    if not words:
        raise HookRefusedError(f"{path} has an empty #! line")
    if depth == 0:
        raise HookRefusedError(f"{path} has too many interpreters")
    interpreter = os.fsdecode(words[0])
    try:
        os.close(open_program(interpreter, depth - 1).fd)
    except HookRefusedError as error:
        raise HookRefusedError(f"{path} is a script of {interpreter}: {error.what}", error.hint) from error


def comm_is_kept(release: str) -> bool:
    """Whether a kernel sets the comm of a program executed by descriptor to its file name."""
    major, _, rest = release.partition(".")
    minor = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return major.isdigit() and minor.isdigit() and (int(major), int(minor)) >= COMM_KEPT_SINCE
