"""Rules that are disabled without a change of their file: their names are in the file `disabled` beside the main file.

The file is not in the state directory because which rules are in force is configuration. It belongs to root, as the
rules do, so the daemon's own user cannot disable a rule. Configuration management sees it, every command that reads
rules applies it, and it survives the loss of the state directory. One name per line; `#` begins a comment. A name
without a rule is a warning: a renamed rule does not become enabled silently.
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
    """Return the path of the file for a main file (None: the default one)."""
    return (rules or MAIN_FILE).absolute().with_name(NAME)


def load_in_force(rules: Path | None) -> LoadedRules:
    """Return the rules of the files, with `enabled` false for the disabled ones. Raises RulesError, as `load` does."""
    return apply(load(rules), path_beside(rules))


def apply(loaded: LoadedRules, path: Path) -> LoadedRules:
    """Return `loaded` with `enabled` false for the rules that `path` names."""
    names = read(path)
    if not names:
        return loaded
    known = {rule.name for rule in loaded.rules}
    warnings = tuple(
        Problem(path, line, 1, f'there is no rule named "{name}"', hint="it was renamed or removed; remove the line")
        for name, line in names.items()
        if name not in known
    )
    return replace(
        loaded,
        rules=tuple(replace(rule, enabled=False) if rule.name in names else rule for rule in loaded.rules),
        warnings=loaded.warnings + warnings,
    )


def read(path: Path) -> dict[str, int]:
    """Return the names and their lines, none without a file. Raises RulesError if it is unsafe or unreadable."""
    try:
        with os.fdopen(safe_open(path), encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 20).splitlines()
    except FileNotFoundError:
        return {}
    except UnsafeFileError as error:
        raise RulesError([Problem(path, 0, 0, error.what, hint=error.hint)]) from error
    except OSError as error:
        raise RulesError([Problem(path, 0, 0, f"cannot read the file: {error.strerror}")]) from error
    found = ((line.partition("#")[0].strip(), number) for number, line in enumerate(lines, start=1))
    return {name: number for name, number in found if name}


def write(path: Path, names: Iterable[str]) -> None:
    """Replace the file, or remove it if there are no names. Raises OSError."""
    names = sorted(names)
    if not names:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{NAME}.{os.getpid()}")
    temporary.write_text("# Rules disabled by `cnprocctl rules disable`.\n" + "".join(f"{n}\n" for n in names))
    temporary.chmod(0o644)
    os.replace(temporary, path)
