"""Read rules and snapshots in a child process, for the daemon and the runner: neither imports the rule language."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from cnprocd.rules import snapshot_files
from cnprocd.rules.loader_process import LoaderProcess
from cnprocd.rules.problems import LoadedRules, Problem, RulesError
from cnprocd.rules.rule_files import MAIN_FILE
from cnprocd.rules.ruleset import Hook, hooks_of
from cnprocd.rules.snapshot import Snapshot
from cnprocd.rules.snapshot_files import SnapshotMissingError


def start_loader(rules: Path | None, *, stores: bool, observe_only: bool = False) -> LoaderProcess[LoadedRules]:
    """Start to load the rules. `stores`: the daemon stores their snapshot itself, and needs its text."""

    def read() -> LoadedRules:
        from cnprocd.rules.language.disabled import load_with_snapshot

        loaded, snapshot = load_with_snapshot(rules, observe_only=observe_only)
        return replace(loaded, snapshot_text=snapshot.text) if stores else loaded

    return LoaderProcess(read, rules or MAIN_FILE)


def start_accepting(directory: Path, loaded: LoadedRules, keep: Collection[str] | None) -> LoaderProcess[None]:
    """Start to store the snapshot of rules that are put in force. The result raises RulesError if it cannot be."""

    def write() -> None:
        try:
            snapshot_files.store(directory, Snapshot.parse(loaded.snapshot_text))
            snapshot_files.accept(directory, loaded.snapshot, keep)
        except OSError as error:
            raise not_stored(directory, error) from error

    return LoaderProcess(write, directory)


def last_accepted(rules: Path | None, directory: Path, *, observe_only: bool = False) -> LoadedRules | None:
    """Return the rules that were put in force last for this main file, or None. Blocks for as long as the disk does.

    None also if this daemon refuses them: they are of another version, or have hooks and it only observes.
    """

    def read() -> LoadedRules | None:
        from cnprocd.rules.language.disabled import load_snapshot

        digest = snapshot_files.accepted(directory)
        try:
            snapshot = None if digest is None else snapshot_files.read(directory, digest)
        except SnapshotMissingError:
            return None
        if snapshot is None or snapshot.main_file != (rules or MAIN_FILE).absolute():
            return None
        try:
            return load_snapshot(snapshot, observe_only=observe_only)
        except RulesError:
            return None

    return LoaderProcess(read, directory).result()


async def load_former(directory: Path, digests: Collection[str]) -> Mapping[str, Mapping[str, Hook]]:
    """Return the hooks of stored snapshots. Those that cannot be read any more are left out."""
    return await LoaderProcess(lambda: _hooks_of_stored(directory, digests), directory).wait() if digests else {}


def _hooks_of_stored(directory: Path, digests: Collection[str]) -> dict[str, Mapping[str, Hook]]:
    from cnprocd.rules.language.disabled import load_snapshot

    found: dict[str, Mapping[str, Hook]] = {}
    for digest in digests:
        with contextlib.suppress(SnapshotMissingError, RulesError):
            found[digest] = hooks_of(load_snapshot(snapshot_files.read(directory, digest), resolve=False).rules)
    return found


def not_stored(directory: Path, error: OSError) -> RulesError:
    """Return the error that a snapshot cannot be written."""
    cause = os.strerror(error.errno or 0)
    hint = "until it is, a start with invalid rule files fails"
    return RulesError([Problem(directory, 0, 0, f"cannot store the snapshot of the rules: {cause}", hint=hint)])
