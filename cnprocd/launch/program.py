"""Which program a hook runs, and whether anyone but root could have put it there.

Strategy: safe_open.py walks the path by descriptor and judges every component; what it opens is what is judged
here. The interpreter of a #! script is judged the same way: a script is no safer than what reads it.

A judgement is remembered (Programs) with device, inode and change time of every component of the resolved path, and
holds while none of them has changed and the name still leads to the same file: neither a mode nor an owner nor an entry
can change without the change time. Eight lstats instead of a walk: 0.08 ms instead of 0.3 between death and cleanup.

Exec by descriptor or by path? Once every component of the resolved path belongs to root (or to us, when we are not
root) and nobody else can write it, only a trusted owner can change what the path names: exec by that resolved path is
not a race that an attacker can enter. By descriptor is stronger still (what was judged is what runs, even while a
package manager is at work), but it has two warts:

- A script: the kernel hands the interpreter /dev/fd/N, which must then stay open in the hook and becomes its $0, so
  that `dirname "$0"` breaks. Scripts are executed by resolved path.
- Before Linux 6.14 the comm of a program executed by descriptor is the number of the descriptor ("4" in ps). There,
  binaries too are executed by resolved path.

So: ELF on 6.14 and newer by descriptor; all else by resolved path, with device and inode compared once more in the
child right before the exec. Set-user-ID bits and file capabilities of the program are the administrator's business.
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
CHANGING_NS = 50_000_000  # change times are as coarse as a tick: what changed so lately may change again unseen


_MOVE_HOOK = "move the hook to a root-owned directory such as /usr/local/lib/cnprocd"
_OTHER_INTERPRETER = "use an interpreter in a root-owned directory such as /usr/bin"


class HookRefusedError(CnprocdError):
    """The hook was not started: its program, user or arguments cannot be used."""


@dataclass(frozen=True, slots=True)
class Name:
    """Where a name led when it was judged."""

    path: str
    resolved: str
    inode: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Program:
    """A judged program. `fd` is open for reading on it; the caller closes it."""

    fd: int
    path: str  # resolved: no symlink is left in it
    inode: tuple[int, int]
    by_fd: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    """A component of a resolved path as it was when it was judged."""

    path: str
    device: int
    inode: int
    changed_ns: int

    @classmethod
    def at(cls, path: str) -> _Seen:
        found = os.lstat(path)
        return cls(path, found.st_dev, found.st_ino, found.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class _Judgement:
    program: Program
    components: frozenset[_Seen]
    names: tuple[Name, ...]  # of the program and of its interpreters

    def holds(self) -> bool:
        return all(_Seen.at(one.path) == one for one in self.components) and all(
            (found.st_dev, found.st_ino) == name.inode for name in self.names for found in [os.stat(name.path)]
        )


class Programs:
    """Programs that were judged before, by the path that the rule names."""

    def __init__(self) -> None:
        self._judged: dict[str, _Judgement] = {}

    def open(self, path: str) -> Program:
        """Open the program at an absolute path; raises HookRefusedError with the reason."""
        known = self._judged.pop(path, None)
        if known is not None:
            with contextlib.suppress(OSError):
                if known.holds():
                    fd = os.open(known.program.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                    self._judged[path] = known
                    return replace(known.program, fd=fd)
        began_ns = time.time_ns() - CHANGING_NS
        names: list[Name] = []
        program = open_program(path, names)
        components = _components(name.resolved for name in names)
        if all(one.changed_ns < began_ns for one in components):
            self._judged[path] = _Judgement(program, components, tuple(names))
        return program


def _components(paths: Iterable[str]) -> frozenset[_Seen]:
    with contextlib.suppress(OSError):
        return frozenset(_Seen.at(str(one)) for path in paths for one in (Path(path), *Path(path).parents))
    return frozenset()


def open_program(path: str, names: list[Name] | None = None, depth: int = MOST_INTERPRETERS) -> Program:
    """Open and judge the program at an absolute path; raises HookRefusedError with the reason.

    Its name and those of its interpreters are added to `names`. For want of descriptors or memory it is an OSError:
    that says nothing of the program, and the job must wait, not fail.
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
        return _judge(fd, path, [] if names is None else names, depth)
    except BaseException:
        os.close(fd)
        raise


def _judge(fd: int, path: str, names: list[Name], depth: int) -> Program:
    found = os.fstat(fd)
    if not found.st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH):
        raise HookRefusedError(f"{path} is not executable", f"chmod +x {path}")
    head = os.pread(fd, SHEBANG_BYTES, 0)
    if head.startswith(b"#!"):
        _judge_interpreter(path, head, names, depth)
    name = Name(path, os.readlink(f"/proc/self/fd/{fd}"), (found.st_dev, found.st_ino))
    names.append(name)
    return Program(
        fd=fd,
        path=name.resolved,
        inode=name.inode,
        by_fd=head.startswith(b"\x7fELF") and comm_is_kept(os.uname().release),
    )


def _judge_interpreter(path: str, head: bytes, names: list[Name], depth: int) -> None:
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
    """Whether this kernel names a program executed by descriptor after its file."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= COMM_KEPT_SINCE
