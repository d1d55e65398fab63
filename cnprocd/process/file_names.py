"""The path of the program that a process executed, from the file that its exit record names.

Three sources, each verified against the host's file system:

  named    the paths that rules name literally, watched (watched_files.py): exact for the shortest life
  seen     the programs of running processes, as the table learned them. Looked at again before one is used, for an
           inode number returns once a file is gone
  guessed  a program is usually called as its comm, and stands where programs stand or where a rule looks for it

Only the first is needed for rules that compare `exe` with literal paths: of a file that is none of them no path is
sought, for the rule does not match it whatever it is called.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cnprocd.process.files import FileId, FoundFile, KnownFiles, NamedFile
from cnprocd.process.former_files import FormerFiles
from cnprocd.process.lookup_child import file_at
from cnprocd.process.model import Process
from cnprocd.process.watched_files import LookUp, Unwatched, WatchedFiles

PROGRAM_DIRECTORIES = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin")
CHECKED_FOR_S = 1.0  # a seen file is looked at again after so long
MISSED_FOR_S = 10.0  # no path is guessed again for a file for so long
MOST_REMEMBERED = 4096
T = TypeVar("T")
_MOST_COMM = 15  # a comm of 15 bytes may be cut


class FileNames:
    """Answers which path a file has. Its looks are made by `look_up`, which waits for a bounded time."""

    def __init__(self, look_up: LookUp, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError if the kernel gives no inotify instance."""
        self.known = KnownFiles()
        self._watched = WatchedFiles(self.known, look_up)
        self._look_up = look_up
        self._clock = clock
        self._directories: tuple[str, ...] | None = None  # where to guess; None: only named paths are needed
        self._checked_s: dict[FileId, float] = {}
        self._missed_s: dict[FileId, float] = {}
        self._moved_s: dict[tuple[str, FileId], float] = {}

    def close(self) -> None:
        self._watched.close()

    def take_over(self, former: FormerFiles) -> None:
        """Know what the last daemon knew of named paths. Call it before the first `use`."""
        self._watched.take_over(former)

    def hand_on(self) -> tuple[tuple[NamedFile, int], ...]:
        """Return what the next daemon must know: see WatchedFiles."""
        return self._watched.hand_on()

    @property
    def holds_former(self) -> bool:
        """Whether files of the last daemon are kept open until `let_go`."""
        return self._watched.holds_former

    def use(self, paths: Iterable[str], directories: Iterable[str] | None) -> None:
        """Know these paths from now on. `directories`: where rules look for programs; None: no other path is needed."""
        self._watched.use(paths)
        self._directories = None if directories is None else tuple(dict.fromkeys((*PROGRAM_DIRECTORIES, *directories)))
        self._missed_s.clear()

    @property
    def named_paths(self) -> frozenset[str]:
        """The paths that rules name literally."""
        return self.known.named_paths

    @property
    def unwatched(self) -> list[Unwatched]:
        """The named paths whose files exit records do not identify on this machine."""
        return self._watched.unwatched

    def refresh(self) -> bool:
        """Call it when the records of a batch were read and before they are used.

        Return whether what was found of a file before may not hold any more.
        """
        return self._watched.refresh()

    def let_go(self) -> None:
        """Call it when the records of a batch were used."""
        self._watched.let_go()

    def tick(self) -> None:
        """Look at the named paths again, about once a second."""
        self._watched.look_again()

    # process.model.FileLookup

    @property
    def knows_all_named(self) -> bool:
        """Whether a file that is not found as a named one is none of the paths that rules name."""
        return self._watched.is_settled and not self._watched.unwatched

    def find(self, file: FileId, comm: str | None, start_ns: int | None = None) -> FoundFile | None:
        """Return the paths of a file of an exit record, or None."""
        found = self.known.find(file, start_ns)
        if found is not None and found.is_named:
            return found
        if self._directories is None or not self._watched.identifies(file.device):
            return None
        if found is not None and self._is_still(found.paths[0], file):
            return found
        return self._guessed(file, comm)

    def learn(self, process: Process) -> None:
        """Take the verified path of a running process."""
        file, path = process.exe_file, process.exe
        if path is None or file is None:
            return
        if process.exe_deleted:
            if path in self.known.named_paths:
                self._watched.keep_old(path, process.tgid, file)
        elif self._directories is not None and self._watched.identifies(file.device):
            self.known.learn(file, path)

    def is_replaced(self, path: str, file: FileId) -> bool:
        """Return whether a path that led to this file leads to another one by now, or to none. A second old at most."""
        if path in self.known.named_paths and self._watched.identifies(file.device):
            return self.known.current(path) != file
        now_s = self._clock()
        if now_s - self._moved_s.get((path, file), -CHECKED_FOR_S) < CHECKED_FOR_S:
            return True
        if now_s - self._checked_s.get(file, -CHECKED_FOR_S) < CHECKED_FOR_S or not self._watched.is_local(path):
            return False
        found = self._look_up([path])
        if found is None or found == [file]:
            _remember(self._checked_s, file, now_s)  # also if the look is late: not one for each process
            return False
        _remember(self._moved_s, (path, file), now_s)
        return True

    def is_one_program(self, file: FileId) -> bool:
        """Whether all processes whose exit record names this file run a program with the same path."""
        return self._watched.identifies(file.device) and not self.known.varies(file)

    def is_same(self, one: FileId, other: FileId) -> bool | None:
        """Whether two identities are one file; None if an identity does not name one file here."""
        if not (self._watched.identifies(one.device) and self._watched.identifies(other.device)):
            return None
        return one == other

    def _is_still(self, path: str, file: FileId) -> bool:
        now_s = self._clock()
        if now_s - self._checked_s.get(file, -CHECKED_FOR_S) < CHECKED_FOR_S:
            return True
        if self._look_up([path]) != [file]:
            self.known.forget(file)
            return False
        _remember(self._checked_s, file, now_s)
        return True

    def _guessed(self, file: FileId, comm: str | None) -> FoundFile | None:
        now_s = self._clock()
        if self._directories is None or now_s - self._missed_s.get(file, -MISSED_FOR_S) < MISSED_FOR_S:
            return None
        if comm and "/" not in comm and comm not in (".", "..") and len(os.fsencode(comm)) < _MOST_COMM:
            paths = [f"{directory}/{comm}" for directory in self._directories]
            for path, at_path in zip(paths, self._look_up(paths) or (), strict=False):
                if at_path == file:
                    self.known.learn(file, path)
                    _remember(self._checked_s, file, now_s)
                    return FoundFile((path,), False, False)
        _remember(self._missed_s, file, now_s)
        return None


def look_up_here(paths: Sequence[str]) -> list[FileId | None]:
    """Look at paths in this process. Not for the daemon: a disk can make this wait."""
    found = (FileId(*file_at(os.fsencode(path))) for path in paths)
    return [file if file.inode else None for file in found]


def _remember(times_s: dict[T, float], file: T, now_s: float) -> None:
    times_s.pop(file, None)
    while len(times_s) >= MOST_REMEMBERED:
        del times_s[next(iter(times_s))]
    times_s[file] = now_s
