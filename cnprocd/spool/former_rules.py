"""Find the hooks of former rules that jobs refer to. Their snapshots are on a disk that may not answer.

The spool's file shows which ones are needed. It may become usable long after the start. Until the hooks are found,
jobs of rules that are not in force wait (`Promises.complete`), and all others run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping

from cnprocd.log import Log
from cnprocd.rules.problems import RulesError
from cnprocd.rules.ruleset import Hook
from cnprocd.spool.promises import Promises

RETRY_S = 30.0

LoadFormer = Callable[[Collection[str]], Awaitable[Mapping[str, Mapping[str, Hook]]]]
"""Return the hooks of snapshots by digest, without those that do not exist. Raises RulesError: try again."""


class FormerRules:
    """Looks for hooks of former rules. Without `load` there are none but those in memory."""

    def __init__(self, promises: Promises, log: Log) -> None:
        self.load: LoadFormer | None = None
        self._promises = promises
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, needed: Collection[str], then: Callable[[], None]) -> None:
        """Call `then` when the promises have the hooks of these snapshots, as far as they exist: now, or later."""
        missing = self._promises.missing(needed)
        if self.load is None or not missing:
            then()
            return
        self._promises.sought += 1
        task = asyncio.get_running_loop().create_task(self._find(self.load, missing, then))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _find(self, load: LoadFormer, missing: Collection[str], then: Callable[[], None]) -> None:
        while True:
            try:
                self._promises.remember(await load(missing))
                break
            except RulesError as error:
                message = f"jobs of {len(missing)} former versions of the rules wait: {error.render()}"
                self._log("warning", "former_rules_unread", retry_in_s=RETRY_S, message=message)
                await asyncio.sleep(RETRY_S)
        self._promises.sought -= 1
        then()

    def close(self) -> None:
        """Look no further."""
        for task in self._tasks:
            task.cancel()
