"""Rules switched off without editing their file: names in a file called `disabled`, beside the main rule file.

Why there and not in the state directory: which rules are in force is configuration. The file is root's, like the rules
(the daemon's own user must not be able to switch a rule off); it is seen by whoever looks at the configuration, by
the tools that manage it and by every command that reads rules, daemon or not; and it survives the loss of the state
directory. One name a line; `#` begins a comment. A name that no rule has is warned of, so that a renamed rule does not
come back by itself unnoticed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cnprocd.rules.language.load import load
from cnprocd.rules.problems import MAIN_FILE, LoadedRules, Problem, RulesError
from cnprocd.safe_open import UnsafeFileError, safe_open

NAME = "disabled"


def path_beside(rules: Path | None) -> Path:
    """Where the names are, for a main file (None: the default one)."""
    return (rules or MAIN_FILE).absolute().with_name(NAME)


def load_in_force(rules: Path | None) -> LoadedRules:
    """The rules of the files, those switched off marked as not enabled. Raises RulesError, as `load` does."""
    return apply(load(rules), path_beside(rules))


def apply(loaded: LoadedRules, path: Path) -> LoadedRules:
    """`loaded` without what `path` switches off."""
    names = read(path)
    if not names:
        return loaded
    known = {rule.name for rule in loaded.rules}
    warnings = tuple(
        Problem(path, line, 1, f'there is no rule named "{name}"', hint="it was renamed or removed; take the line out")
        for name, line in names.items()
        if name not in known
    )
    return replace(
        loaded,
        rules=tuple(replace(rule, enabled=False) if rule.name in names else rule for rule in loaded.rules),
        warnings=loaded.warnings + warnings,
    )


def read(path: Path) -> dict[str, int]:
    """The names and their lines; nothing if there is no file. Raises RulesError if it cannot be trusted or read."""
    try:
        with os.fdopen(safe_open(path), encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 20).splitlines()
    except FileNotFoundError:
        return {}
    except UnsafeFileError as error:
        raise RulesError([Problem(path, 0, 0, error.what, hint=error.hint)]) from error
    except OSError as error:
        raise RulesError([Problem(path, 0, 0, f"cannot be read: {error.strerror}")]) from error
    found = ((line.partition("#")[0].strip(), number) for number, line in enumerate(lines, start=1))
    return {name: number for name, number in found if name}


def write(path: Path, names: Iterable[str]) -> None:
    """Replace the file; without names it is removed. Raises OSError."""
    names = sorted(names)
    if not names:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{NAME}.{os.getpid()}")
    temporary.write_text("# Rules switched off by `cnprocctl rules disable`.\n" + "".join(f"{n}\n" for n in names))
    temporary.chmod(0o644)
    os.replace(temporary, path)
