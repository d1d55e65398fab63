"""The hooks of the snapshots that jobs name, as the runner keeps them.

A snapshot is made of the root-owned rule files by a child process of the runner, at the daemon's request. The daemon
names the digest that it has loaded itself: if the files have another one by now, nothing is put in force. If the file
of a snapshot has been lost, it is made again, provided that the rule files still have the same digest.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from cnprocd.errors import CnprocdError
from cnprocd.rules.ruleset import Hook

Hooks = Mapping[str, Hook]
MOST_LOADED = 8  # in memory; the others are on the disk


@dataclass(frozen=True, slots=True)
class FilesRead:
    """The rule files as they are now: their digest, and their hooks if it is the one that was wanted."""

    digest: str
    hooks: Hooks | None


class SnapshotReader(Protocol):
    """Reads and writes snapshots in a child process. Each method raises CnprocdError."""

    def stored(self, digest: str) -> Awaitable[Hooks | None]:
        """Return the hooks of a stored snapshot, or None if there is no such snapshot."""

    def files(self, wanted: str) -> Awaitable[FilesRead]:
        """Read the rule files. If their digest is `wanted`, store the snapshot."""

    def accept(self, wanted: str, keep: Collection[str] | None) -> Awaitable[FilesRead]:
        """Do what `files` does, and put the snapshot in force. Delete those that are not in `keep` (None: all are)."""


class RuleSnapshots:
    """Hooks by the digest of their snapshot."""

    def __init__(self, reader: SnapshotReader) -> None:
        self._reader = reader
        self._loaded: OrderedDict[str, Hooks] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Hooks | None]] = {}
        self._turn = asyncio.Lock()  # each read costs a process

    def loaded(self, digest: str) -> Hooks | None:
        """Return the hooks of a snapshot if they are in memory."""
        hooks = self._loaded.get(digest)
        if hooks is not None:
            self._loaded.move_to_end(digest)
        return hooks

    async def find(self, digest: str) -> Hooks | None:
        """Return the hooks of a snapshot, or None if it does not exist any more. Raises CnprocdError."""
        hooks = self.loaded(digest)
        if hooks is not None:
            return hooks
        if digest not in self._loading:
            self._loading[digest] = asyncio.ensure_future(self._find(digest))
            self._loading[digest].add_done_callback(lambda task: self._loading.pop(digest))
        return await asyncio.shield(self._loading[digest])

    async def take(self, wanted: str, keep: Collection[str] | None) -> str:
        """Put the snapshot of the rule files in force if its digest is `wanted`. Return their digest.

        Raises CnprocdError if the files are invalid, or the snapshot cannot be stored.
        """
        async with self._turn:
            read = await self._reader.accept(wanted, keep)
        if read.hooks is not None:
            self._keep(wanted, read.hooks)
        return read.digest

    async def _find(self, digest: str) -> Hooks | None:
        async with self._turn:
            hooks = await self._reader.stored(digest)
            if hooks is None:
                try:
                    hooks = (await self._reader.files(digest)).hooks
                except CnprocdError:  # the files are invalid, so they are not the ones of the snapshot
                    return None
        if hooks is not None:
            self._keep(digest, hooks)
        return hooks

    def _keep(self, digest: str, hooks: Hooks) -> None:
        self._loaded[digest] = hooks
        self._loaded.move_to_end(digest)
        while len(self._loaded) > MOST_LOADED:
            self._loaded.popitem(last=False)
