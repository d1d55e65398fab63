"""Rules that are disabled without editing their file: names in a file called `disabled`, beside the main rule file.

Each line is `NAME` or `NAME until 2026-11-25T22:00:00Z`; `#` begins a comment. After its time a line has no effect. A
name that no rule has gives a warning, so that a renamed rule does not come back unnoticed.

Why the file is there and not in the state directory: which rules are in force is configuration. The file belongs to
root, as the rules do, so the daemon's own user cannot disable a rule. Administrators and their tools find it beside the
rules, commands read it without a daemon, and it survives the loss of the state directory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cnprocd.rules.language.load import load, read_rule_file
from cnprocd.rules.problems import LoadedRules, Problem, RulesError
from cnprocd.rules.rule_files import disabled_path, file_digests, rule_files
from cnprocd.rules.ruleset import Rule
from cnprocd.rules.snapshot import Snapshot
from cnprocd.safe_open import UnsafeFileError

NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the file: until when, in nanoseconds since 1970 (None: no end), and its number."""

    until_ns: int | None
    line: int = 0


def load_in_force(rules: Path | None, *, observe_only: bool = False) -> LoadedRules:
    """Load the rules, and mark those as not enabled that the file disables. Raises RulesError, as `load` does."""
    return load_with_snapshot(rules, observe_only=observe_only)[0]


def load_with_snapshot(rules: Path | None, *, observe_only: bool = False) -> tuple[LoadedRules, Snapshot]:
    """Return the rules of load_in_force() and the snapshot of exactly the bytes that were parsed for them."""
    before = file_digests(rule_files(rules))
    contents: dict[Path, bytes] = {}

    def read_and_keep(path: Path) -> bytes:
        contents[path] = read_rule_file(path)
        return contents[path]

    path = disabled_path(rules)
    loaded = apply(load(rules, read=read_and_keep, observe_only=observe_only), path, read_and_keep)
    disabled = contents.pop(path, None)
    snapshot = Snapshot.of([(file.absolute(), data) for file, data in contents.items()], disabled)
    return replace(loaded, file_digests=before, snapshot=snapshot.digest), snapshot


def load_snapshot(snapshot: Snapshot, *, resolve: bool = True, observe_only: bool = False) -> LoadedRules:
    """Load the rules of a snapshot. Raises RulesError: this version of the rule language does not accept them.

    Without `resolve` no name service is asked: for the runner, which matches nothing.
    """
    contents = {file.path: file.data for file in snapshot.files}
    main, *dropins = contents
    path = disabled_path(main)
    if snapshot.disabled is not None:
        contents[path] = snapshot.disabled

    def kept(path: Path) -> bytes:
        if path not in contents:
            raise FileNotFoundError(path)
        return contents[path]

    look_up = None if resolve else lambda name: None
    loaded = load(main, also=dropins, read=kept, user=look_up, group=look_up, observe_only=observe_only)
    return replace(apply(loaded, path, kept), snapshot=snapshot.digest)


def apply(loaded: LoadedRules, path: Path, content: Callable[[Path], bytes] = read_rule_file) -> LoadedRules:
    """Return `loaded` with the rules not enabled that `path` disables now. Raises RulesError."""
    entries = read(path, content)
    if not entries:
        return loaded
    known = {rule.name for rule in loaded.rules}
    warnings = tuple(
        Problem(
            path, entry.line, 1, f'there is no rule named "{name}"', hint="it was renamed or removed; remove the line"
        )
        for name, entry in entries.items()
        if name not in known
    )
    in_effect = in_effect_of(entries)
    return replace(
        loaded,
        rules=tuple(replace(rule, enabled=False) if rule.name in in_effect else rule for rule in loaded.rules),
        warnings=loaded.warnings + warnings,
        disabled={rule.name: in_effect[rule.name].until_ns for rule in loaded.rules if _is_disabled(rule, in_effect)},
    )


def in_effect_of(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries whose time is not over."""
    now_ns = time.time_ns()
    return {name: one for name, one in entries.items() if one.until_ns is None or one.until_ns > now_ns}


def _is_disabled(rule: Rule, entries: Mapping[str, Entry]) -> bool:
    """Whether the file disables a rule that its own file does not disable."""
    return rule.enabled and rule.name in entries


def read(path: Path, content: Callable[[Path], bytes] = read_rule_file) -> dict[str, Entry]:
    """Return the entries by name, the expired ones too. Raises RulesError if the file is unsafe or malformed."""
    try:
        lines = content(path).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return {}
    except UnsafeFileError as error:
        raise RulesError([Problem(path, 0, 0, error.what, hint=error.hint)]) from error
    except OSError as error:
        raise RulesError([Problem(path, 0, 0, f"cannot read the file: {error.strerror}")]) from error
    words = ((number, line.partition("#")[0].split()) for number, line in enumerate(lines, start=1))
    return {found[0]: Entry(_end_ns(path, number, lines, found[1:]), number) for number, found in words if found}


def _end_ns(path: Path, number: int, lines: list[str], words: list[str]) -> int | None:
    """Return the time that `until TIME` names."""
    if not words:
        return None
    if len(words) == 2 and words[0] == "until":
        try:
            return int(datetime.fromisoformat(words[1]).timestamp()) * NS
        except (ValueError, OverflowError):
            pass
    line = lines[number - 1]
    message = f'cannot read "{" ".join(words)}" after the name of a rule'
    column = line.index(words[0]) + 1
    raise RulesError([Problem(path, number, column, message, "until 2026-11-25T22:00:00Z", source_line=line)])


def write(path: Path, entries: Mapping[str, int | None]) -> None:
    """Replace the file with these names and their ends (Entry.until_ns). Without names, remove it. Raises OSError."""
    if not entries:
        path.unlink(missing_ok=True)
        return
    lines = ["# Rules disabled by `cnprocctl rules disable`.\n", *(_line(*entry) for entry in sorted(entries.items()))]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(lines))
    temporary.chmod(0o644)
    os.replace(temporary, path)


def _line(name: str, until_ns: int | None) -> str:
    if until_ns is None:
        return f"{name}\n"
    end = datetime.fromtimestamp(-(-until_ns // NS), UTC)  # rounded up: never a shorter time than was asked for
    return f"{name} until {end:%Y-%m-%dT%H:%M:%SZ}\n"
