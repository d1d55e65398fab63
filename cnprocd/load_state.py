"""The outcome of the last load of the rules, and whether the files on the disk differ from the rules in force.

A failed reload is shown until a reload succeeds. So are files that were changed and not loaded. The files are read by
another process (loader_process.py), because a disk can block.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cnprocd.rules.problems import LoadedRules, RulesError
from cnprocd.rules.rule_files import changed

CHECK_EVERY_S = 60.0  # without a request
PAUSE_S = 0.1  # between two checks, each of which starts a process: later requests wait and share one
WAIT_S = 0.5  # for a check that was requested; a stuck disk must not delay `status` for longer
LONGEST_ERROR = 200  # characters of an error in the status line

FailedStep = Literal["reload", "start", "acceptance"]
_PHRASES: Mapping[FailedStep, str] = {
    "reload": "RELOAD FAILED at {}",
    "start": "STARTED WITH THE RULES ACCEPTED LAST (start at {})",
    "acceptance": "RULES NOT ACCEPTED at {}",
}
ReadDigests = Callable[[], Awaitable[Mapping[Path, str]]]


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """Rules that were rejected, and the time in nanoseconds since 1970.

    reload      a reload failed, and the rules before it are in force
    start       the files were invalid at the start, and the rules that were accepted last are in force
    acceptance  the rules that were loaded at the start are in force, but the runner has no snapshot of them yet
    """

    time_ns: int
    error: RulesError
    step: FailedStep = "reload"


class LoadState:
    """The state of the rule files. Belongs to the event loop."""

    def __init__(self, loaded: LoadedRules, read_digests: ReadDigests, on_change: Callable[[], None]) -> None:
        """`on_change` is called after a check that found another state."""
        self._read_digests = read_digests
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._checked_s = time.monotonic()  # when the last check ended
        self.succeeded(loaded)

    def succeeded(self, loaded: LoadedRules) -> None:
        """Note that `loaded` is in force now."""
        self._digests = loaded.file_digests
        self.loaded_ns = time.time_ns()
        self.failed_load: FailedLoad | None = None
        self.changed_files: tuple[Path, ...] | None = ()  # None: unknown

    def failed(self, error: RulesError, step: FailedStep = "reload") -> None:
        """Note that rules were rejected."""
        self.failed_load = FailedLoad(time.time_ns(), error, step)

    @property
    def time_ns(self) -> int:
        """Return the time of the last load, successful or not, in nanoseconds since 1970."""
        return self.loaded_ns if self.failed_load is None else self.failed_load.time_ns

    def phrase(self) -> str:
        """Return what to add to the status line: nothing if the files are as loaded."""
        if self.failed_load is not None:
            moment = datetime.fromtimestamp(self.failed_load.time_ns / 1e9, UTC)
            error = self.failed_load.error.what
            error = error if len(error) <= LONGEST_ERROR else f"{error[:LONGEST_ERROR]}..."
            phrase = _PHRASES[self.failed_load.step].format(f"{moment:%Y-%m-%dT%H:%M:%SZ}")
            return f"; {phrase}: {error}"
        if self.changed_files:
            return f"; NOT LOADED: {', '.join(map(str, self.changed_files))}"
        return ""

    async def check(self) -> None:
        """Compare the files on the disk with the loaded ones, and wait for the result at most WAIT_S."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._compare())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._task), WAIT_S)

    def check_if_due(self) -> None:
        """Begin a check if the last one is CHECK_EVERY_S ago."""
        if self._task is None and time.monotonic() - self._checked_s >= CHECK_EVERY_S:
            self._task = asyncio.get_running_loop().create_task(self._compare())

    async def _compare(self) -> None:
        pause_s = self._checked_s + PAUSE_S - time.monotonic()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        loaded, before = self._digests, self.phrase()
        try:
            found = changed(loaded, await self._read_digests())
        except RulesError:  # the other process failed
            found = None
        finally:
            self._task = None
            self._checked_s = time.monotonic()
        if loaded is self._digests:
            self.changed_files = found
        if self.phrase() != before:
            self._on_change()
