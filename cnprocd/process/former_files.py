"""The files that the named paths of the last daemon led to, while no daemon watched them.

A process that runs such a file can end between two daemons, when the path leads to another file already. Its exit
record has the number of the file, and the kernel may have given that number away since. So the last daemon leaves open
descriptors (O_PATH) with the service manager: an open file keeps its number. They are closed when the records of that
time were used. Of a file without a descriptor, as after a kill, it is in doubt whether a record is about it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from cnprocd.process.files import FileId, NamedFile
from cnprocd.process.model import ProcScan, Wanted

MOST_PINS = 100  # FileDescriptorStoreMax= of the unit is larger


class FormerFiles:
    """What the last daemon knew, and its descriptors, which are closed by `let_go`."""

    def __init__(self, known: Iterable[tuple[NamedFile, int]] = (), pins: Iterable[int] = ()) -> None:
        self._known = tuple(known)
        self.pins: dict[FileId, int] = {}
        for fd in pins:
            found = os.fstat(fd)
            file = FileId(found.st_dev, found.st_ino)
            if file in self.pins:
                os.close(fd)
            else:
                self.pins[file] = fd

    def take(self) -> Iterator[tuple[NamedFile, int]]:
        """Yield what was known, once: rules that are loaded later name paths that nobody watched."""
        known, self._known = self._known, ()
        yield from known

    def let_go(self) -> None:
        """Close the descriptors."""
        for fd in self.pins.values():
            os.close(fd)
        self.pins.clear()


def pin_files(known: Iterable[NamedFile], procfs: ProcScan) -> list[int]:
    """Open the files of named paths: current ones by their path, old ones by a process that runs them.

    Only paths that were looked at before are opened, so no filesystem of another machine makes this wait.
    """
    current: dict[FileId, str] = {}
    old: set[FileId] = set()
    for one in known:
        if one.is_current:
            current[one.file] = one.path
        else:
            old.add(one.file)
    pins = [_opened(path, file, os.O_NOFOLLOW) for file, path in current.items()]
    old -= current.keys()
    if old:
        for process in procfs.scan(Wanted(exe=True)):
            if process.exe_file in old:
                old.discard(process.exe_file)
                pins.append(_opened(f"/proc/{process.tgid}/exe", process.exe_file))
    found = [fd for fd in pins if fd is not None]
    for fd in found[MOST_PINS:]:
        os.close(fd)
    return found[:MOST_PINS]


def _opened(path: str, file: FileId, flags: int = 0) -> int | None:
    """Return a descriptor of a file, or None if the path leads to another one by now."""
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(os.fsencode(path), os.O_PATH | os.O_CLOEXEC | flags)
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) == file:
            return fd
        os.close(fd)
    return None
