"""Open a hook's program, and refuse it if any user but root (or this process's own) could have changed it.

safe_open.py walks the path by descriptor and checks every component. The checks here use the descriptor that it opened.
The interpreter of a #! script is checked in the same way.

Programs caches a check with the device, inode and change time of every component of the resolved path. The cached check
holds while none of them has changed and the name still leads to the same file: no mode, owner or entry changes without
the change time. Eight lstats take 0.08 ms between death and cleanup; a walk takes 0.3 ms.

An ELF program is executed by descriptor on Linux 6.14 and newer: the checked file runs even if a package manager
replaces it meanwhile. Everything else is executed by its resolved path, with device and inode compared again in the
child right before the exec. That race is not open to attackers: only root can change what the checked path names.
- A script executed by descriptor would get /dev/fd/N as its $0, so `dirname "$0"` would break.
- Before Linux 6.14 the comm of a program executed by descriptor is the descriptor's number ("4" in ps).
Set-user-ID bits and file capabilities of the program are left to the administrator.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cnprocd.errors import CnprocdError
from cnprocd.safe_open import UnsafeFileError, safe_open

SHEBANG_BYTES = 256  # BINPRM_BUF_SIZE
MOST_INTERPRETERS = 5  # as fs/exec.c: a script may be the interpreter of a script
COMM_KEPT_SINCE = (6, 14)
_FOR_NOW = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
CHANGING_NS = 50_000_000  # change times have the resolution of a tick: a second change may be invisible


_MOVE_HOOK = "move the hook to a root-owned directory such as /usr/local/lib/cnprocd"
_OTHER_INTERPRETER = "use an interpreter in a root-owned directory such as /usr/bin"


class HookRefusedError(CnprocdError):
    """The hook was not started: its program, user or arguments cannot be used."""


@dataclass(frozen=True, slots=True)
class Name:
    """Which file a path led to when it was checked."""

    path: str
    resolved: str
    inode: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Program:
    """A checked program. `fd` is open for reading; the caller closes it."""

    fd: int
    path: str  # resolved: it contains no symlink
    inode: tuple[int, int]
    by_fd: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    """A component of a resolved path as it was when it was checked."""

    path: str
    device: int
    inode: int
    changed_ns: int

    @classmethod
    def at(cls, path: str) -> _Seen:
        found = os.lstat(path)
        return cls(path, found.st_dev, found.st_ino, found.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class _Check:
    program: Program
    components: frozenset[_Seen]
    names: tuple[Name, ...]  # of the program and of its interpreters

    def holds(self) -> bool:
        return all(_Seen.at(one.path) == one for one in self.components) and all(
            (found.st_dev, found.st_ino) == name.inode for name in self.names for found in [os.stat(name.path)]
        )


class Programs:
    """A cache of checked programs, by the path that the rule names."""

    def __init__(self) -> None:
        self._checked: dict[str, _Check] = {}

    def open(self, path: str) -> Program:
        """Open and check the program at an absolute path. Raises as open_program does."""
        known = self._checked.pop(path, None)
        if known is not None:
            with contextlib.suppress(OSError):
                if known.holds():
                    fd = os.open(known.program.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                    self._checked[path] = known
                    return replace(known.program, fd=fd)
        began_ns = time.time_ns() - CHANGING_NS
        names: list[Name] = []
        program = open_program(path, names)
        components = _components(name.resolved for name in names)
        if all(one.changed_ns < began_ns for one in components):
            self._checked[path] = _Check(program, components, tuple(names))
        return program


def _components(paths: Iterable[str]) -> frozenset[_Seen]:
    with contextlib.suppress(OSError):
        return frozenset(_Seen.at(str(one)) for path in paths for one in (Path(path), *Path(path).parents))
    return frozenset()


def open_program(path: str, names: list[Name] | None = None, depth: int = MOST_INTERPRETERS) -> Program:
    """Open and check the program at an absolute path, and add its name and those of its interpreters to `names`.

    Raises HookRefusedError if the program must not be run. Raises OSError if descriptors or memory are missing: that
    does not depend on the program, so the job must wait, not fail.
    """
    if not path.startswith("/"):
        raise HookRefusedError(f"{path} is not an absolute path", "name the program with its full path")
    try:
        fd = safe_open(Path(path), _MOVE_HOOK if depth == MOST_INTERPRETERS else _OTHER_INTERPRETER)
    except UnsafeFileError as error:
        raise HookRefusedError(error.what, error.hint) from error
    except OSError as error:
        if error.errno in _FOR_NOW:
            raise
        raise HookRefusedError(f"cannot open {path}: {os.strerror(error.errno or 0)}") from error
    try:
        return _check(fd, path, [] if names is None else names, depth)
    except BaseException:
        os.close(fd)
        raise


def _check(fd: int, path: str, names: list[Name], depth: int) -> Program:
    found = os.fstat(fd)
    if not found.st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH):
        raise HookRefusedError(f"{path} is not executable", f"chmod +x {path}")
    head = os.pread(fd, SHEBANG_BYTES, 0)
    if head.startswith(b"#!"):
        _check_interpreter(path, head, names, depth)
    name = Name(path, os.readlink(f"/proc/self/fd/{fd}"), (found.st_dev, found.st_ino))
    names.append(name)
    return Program(
        fd=fd,
        path=name.resolved,
        inode=name.inode,
        by_fd=head.startswith(b"\x7fELF") and comm_is_kept(os.uname().release),
    )


def _check_interpreter(path: str, head: bytes, names: list[Name], depth: int) -> None:
    words = head[2:].split(b"\n", 1)[0].split()
    if not words:
        raise HookRefusedError(f"{path} has an empty #! line")
    if depth == 0:
        raise HookRefusedError(f"{path} has too many interpreters")
    interpreter = os.fsdecode(words[0])
    try:
        os.close(open_program(interpreter, names, depth - 1).fd)
    except HookRefusedError as error:
        raise HookRefusedError(f"{path} is a script of {interpreter}: {error.what}", error.hint) from error


def comm_is_kept(release: str) -> bool:
    """Whether a kernel sets the comm of a program executed by descriptor to its file name."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= COMM_KEPT_SINCE
