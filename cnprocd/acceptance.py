"""How rules that the daemon has loaded become the accepted ones: a snapshot that root alone can write names them.

With the runner, the runner makes the snapshot of the rule files, and both must have read the same bytes. Without it, a
child process of the daemon stores the bytes that were parsed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

from cnprocd.log import Log
from cnprocd.rules.problems import LoadedRules, Problem, RetryableError, RulesError
from cnprocd.rules.ruleset import hooks_of
from cnprocd.runner.client import RunnerClient, SnapshotRefusedError

ANSWER_S = 10.0  # for the runner to read the rule files, or for the disk

Accept = Callable[[LoadedRules, Collection[str] | None], Awaitable[None]]
"""Accept rules, and keep the snapshots with these digests, too (None: all). Raises RulesError: they must not be put in
force."""


class FilesChangedError(RetryableError):
    """The rule files changed while they were loaded. Load them again."""


class RunnerUnreachableError(RetryableError):
    """The runner has no snapshot of the rules, because it did not answer or is not there."""


def accepted_by_runner(client: RunnerClient, log: Log) -> Accept:
    """Return the function that lets the runner take a snapshot of the same files."""

    async def accept(loaded: LoadedRules, keep: Collection[str] | None) -> None:
        try:
            digest = await asyncio.wait_for(client.take_snapshot(loaded.snapshot, keep), ANSWER_S)
        except SnapshotRefusedError as error:
            raise RulesError([_problem(loaded, f"the runner refused the rules: {error.what}")]) from error
        except (OSError, TimeoutError) as error:
            cause = str(error) or f"no answer within {ANSWER_S:g} s"
            if hooks_of(loaded.rules):
                what = f"the runner has no snapshot of the rules: {cause}"
                hint = "see `systemctl status cnprocd-runner.socket`; the rules are loaded again when it answers"
                raise RunnerUnreachableError([_problem(loaded, what, hint)]) from error
            log("warning", "snapshot_not_stored", message=f"the runner has no snapshot of the rules: {cause}")
            return
        if digest != loaded.snapshot:
            raise FilesChangedError([_problem(loaded, "the rule files changed while they were loaded")])

    return accept


def accepted_here(store: Accept, log: Log) -> Accept:
    """Return the function that stores the snapshot with `store`. If the disk fails, it only logs that."""

    async def accept(loaded: LoadedRules, keep: Collection[str] | None) -> None:
        try:
            await asyncio.wait_for(store(loaded, keep), ANSWER_S)
        except RulesError as error:
            log("warning", "snapshot_not_stored", message=error.render())
        except TimeoutError:
            message = f"the snapshot of the rules was not stored within {ANSWER_S:g} s"
            log("warning", "snapshot_not_stored", message=message)

    return accept


def _problem(loaded: LoadedRules, message: str, hint: str = "run `cnprocctl reload` again") -> Problem:
    return Problem(loaded.files[0], 0, 0, message, hint=hint)
