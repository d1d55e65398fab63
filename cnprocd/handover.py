"""The files in the runtime directory by which one daemon hands on what it knows (process/handed_on.py).

    processes   written at a stop, if the service manager keeps the sockets: the exits that are queued in them are about
                these processes. Read once. A daemon that is killed writes none; see docs/guarantees.md
    programs    written when a path that a rule names leads to another file, so that a kill loses a second of it. At a
                stop the service manager gets descriptors of these files (process/former_files.py)
    hooks       written about once a second while the processes of hooks change, so that a kill loses a second of it

They have mode 0600 and are replaced by a rename. Only a file that root or the daemon's user alone can have written is
read. A file that cannot be read costs what it has, and that is logged.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from cnprocd.errors import CnprocdError
from cnprocd.json_value import JsonError
from cnprocd.log import Log
from cnprocd.process.family import HookFamily
from cnprocd.process.files import NamedFile
from cnprocd.process.former_files import pin_files
from cnprocd.process.handed_on import (
    MOST_BYTES,
    FormerHooks,
    HandedOn,
    Started,
    decode_files,
    decode_hooks,
    decode_processes,
    encode_files,
    encode_hooks,
    encode_processes,
)
from cnprocd.process.model import ProcScan, Wanted
from cnprocd.process.tracker import Tracker
from cnprocd.safe_open import safe_open

PROGRAM = "program-"  # and a number: the name of a descriptor of a program
T = TypeVar("T")


class Handover:
    """Writes and takes both files."""

    def __init__(self, directory: Path, boot_id: str, procfs: ProcScan, log: Log) -> None:
        self._processes = directory / "processes"
        self._hooks = directory / "hooks"
        self._programs = directory / "programs"
        self._named: tuple[NamedFile, ...] = ()  # as they were written last
        self._boot_id = boot_id
        self._procfs = procfs
        self._log = log
        self._starts: dict[int, Started | None] = {}  # of hooks and runners; None: gone before it was read
        self._written = FormerHooks()

    def take_processes(self) -> HandedOn:
        """Return what the last daemon knew, and remove the file: it holds for one start."""
        found = self._read(self._processes, lambda raw: decode_processes(raw, self._boot_id), HandedOn())
        with contextlib.suppress(OSError):
            self._processes.unlink()
        return found

    def keep(self, family: HookFamily, files: tuple[tuple[NamedFile, int], ...]) -> None:
        """Write what a kill of the daemon must not lose, if it has changed. About once a second."""
        self.keep_hooks(family)
        self.keep_files(files)

    def take_files(self) -> tuple[tuple[NamedFile, int], ...]:
        """Return the files that named paths led to, as the last daemon knew them."""
        return self._read(self._programs, lambda raw: decode_files(raw, self._boot_id), ())

    def keep_files(self, known: tuple[tuple[NamedFile, int], ...]) -> None:
        """Write the files of named paths, if they are others than at the last time."""
        named = tuple(one for one, _ in known)
        if named != self._named:
            self._write(self._programs, encode_files(known, self._boot_id))
            self._named = named

    def hand_on_files(self, known: tuple[tuple[NamedFile, int], ...]) -> list[int]:
        """Write the files of named paths. Return descriptors of them, for the service manager to keep open."""
        self._write(self._programs, encode_files(known, self._boot_id))
        return pin_files([one for one, _ in known], self._procfs)

    def take_hooks(self) -> FormerHooks:
        """Return the processes of the hooks of the last daemon."""
        return self._read(self._hooks, lambda raw: decode_hooks(raw, self._boot_id), FormerHooks())

    def hand_on_processes(self, tracker: Tracker) -> None:
        """Write what is known now."""
        known = HandedOn(leaders=tuple(tracker.deaths.early_leaders()))
        if tracker.tracking.table:  # without one the forks since now are not queued
            known = known._replace(processes=tracker.table.known(), at_ns=time.monotonic_ns())
        raw, left_out = encode_processes(known, self._boot_id)
        self._write(self._processes, raw)
        if left_out:
            message = f"{left_out} of {len(known.processes)} processes have no room in {self._processes}"
            self._log("warning", "handover_incomplete", count=left_out, message=message)

    def keep_hooks(self, family: HookFamily) -> None:
        """Write the processes of hooks, if they are others than at the last time."""
        members = family.hooks | family.roots.keys() - {os.getpid()}
        self._starts = {tgid: started for tgid, started in self._starts.items() if tgid in members}
        for tgid in members - self._starts.keys():
            process = self._procfs.read(tgid, Wanted(), "procfs")
            start_ns = process.start_ns if process is not None else None
            self._starts[tgid] = None if start_ns is None else Started(tgid, start_ns)
        former = FormerHooks(self._started(family.hooks), self._started(family.roots))
        if former != self._written:
            self._write(self._hooks, encode_hooks(former, self._boot_id))
            self._written = former

    def _started(self, tgids: Iterable[int]) -> frozenset[Started]:
        return frozenset(started for tgid in tgids if (started := self._starts.get(tgid)) is not None)

    def _read(self, path: Path, decode: Callable[[bytes], T], nothing: T) -> T:
        try:
            fd = safe_open(path)
        except FileNotFoundError:
            return nothing
        except (CnprocdError, OSError) as error:
            return self._unusable(path, error, nothing)
        try:
            with open(fd, "rb") as file:
                return decode(file.read(MOST_BYTES + 1))
        except (JsonError, OSError) as error:
            return self._unusable(path, error, nothing)

    def _unusable(self, path: Path, error: Exception, nothing: T) -> T:
        message = f"cannot use {path}: {error}; what the last daemon knew of ended processes is lost"
        self._log("warning", "handover_incomplete", path=str(path), message=message)
        return nothing

    def _write(self, path: Path, raw: bytes) -> None:
        temporary = path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(raw)
            os.replace(temporary, path)
        except OSError as error:
            self._log("warning", "handover_incomplete", path=str(path), message=f"cannot write {path}: {error}")
