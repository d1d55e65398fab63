"""Ask again for the names of users and groups that the rules in force have and that had no id when they were loaded.

A directory service may come up after the daemon, or a user may be created later. No file is read for it: edits that
have not been reloaded do not come into force.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from cnprocd.log import Log
from cnprocd.reload import RulesInForce
from cnprocd.rules.problems import LoadedRules
from cnprocd.rules.unresolved import Kind, Name, unresolved_names, with_ids
from cnprocd.rules.written import digest

FIRST_S = 10.0
MOST_S = 300.0


class NameResolution:
    """Resolves the names of rules in the background. `id_of` returns None for none, or raises OSError: no answer."""

    def __init__(self, rules: RulesInForce, id_of: Callable[[Kind, str], int | None], log: Log) -> None:
        self._rules = rules
        self._id_of = id_of
        self._log = log
        self._timer: asyncio.TimerHandle | None = None
        self._pause_s = FIRST_S
        rules.on_swap.append(self.start)

    def start(self) -> None:
        """Ask soon, if there is a name without an id: after a start or a reload."""
        self._pause_s = FIRST_S
        self._arm()

    def stop(self) -> None:
        """Ask no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self.stop()
        if unresolved_names(self._rules.loaded.rules):
            self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._ask)

    def _ask(self) -> None:
        self._timer = None
        self._pause_s = min(2 * self._pause_s, MOST_S)
        loaded = self._rules.loaded
        found: dict[Name, int] = {}
        for name in unresolved_names(loaded.rules):
            with contextlib.suppress(OSError):
                number = self._id_of(name.kind, name.name)
                if number is not None:
                    found[name] = number
        if found:
            self._rules.change(lambda loaded: _with_ids(loaded, found))  # which asks again for the names that are left
            names = sorted(f"{kind} {name}" for kind, name in found)
            self._log("notice", "names_resolved", names=names, message=f"resolved: {', '.join(names)}")
        else:
            self._arm()


def _with_ids(loaded: LoadedRules, found: Mapping[Name, int]) -> LoadedRules:
    rules = with_ids(loaded.rules, found)
    return replace(loaded, rules=rules, digests={rule.name: digest(rule) for rule in rules})
