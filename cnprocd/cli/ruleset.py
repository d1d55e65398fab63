"""Rule files for commands: load them as the daemon would, with every warning at its line and column."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cnprocd.rules.language import yaml12
from cnprocd.rules.language.disabled import apply, path_beside
from cnprocd.rules.language.lint import Warned, lint
from cnprocd.rules.language.load import load
from cnprocd.rules.problems import LoadedRules, Problem, RulesError
from cnprocd.rules.ruleset import Rule

_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rule stands."""

    file: Path
    root: yaml12.Mapping
    index: int
    lines: list[str]


def loaded_rules(
    rules: Path | None,
    user: Callable[[str], int | None] | None = None,
    group: Callable[[str], int | None] | None = None,
) -> LoadedRules:
    """The rules in force for this --rules. Raises RulesError."""
    return apply(load(rules, user=user, group=group), path_beside(rules))


def rule_of_match(match: str | None, events: Sequence[str]) -> Rule:
    """A rule made on the command line: `match` is YAML or JSON of the rule language. Raises RulesError."""
    text = f"rules:\n  - name: command-line\n    events: [{', '.join(events)}]\n"
    if match is not None:
        text += f"    match: {match}\n"
    # Through the loader as a file: a mistake is then told as in a rule file, with the place and a caret.
    with tempfile.TemporaryDirectory(prefix="cnprocctl-") as directory:
        file = Path(directory) / "--match"
        file.write_text(text)
        try:
            return load(file).rules[0]
        except RulesError as error:
            raise RulesError([replace(problem, file=Path("--match")) for problem in error.problems]) from error


def warnings(loaded: LoadedRules) -> list[tuple[str, Problem]]:
    """The loader's and the linter's warnings, as (kind, problem)."""
    places = _places(loaded.files)
    found = [("advice", problem) for problem in loaded.warnings]
    return found + [(warned.kind, _problem(warned, places)) for warned in lint(loaded.rules)]


def places(loaded: LoadedRules) -> dict[str, Place]:
    """Where each rule stands."""
    return _places(loaded.files)


def _problem(warned: Warned, known: dict[str, Place]) -> Problem:
    place = known[warned.rule]
    mark = yaml12.locate(place.root, ("rules", place.index, *warned.at), False)
    line = place.lines[mark.line - 1] if 0 < mark.line <= len(place.lines) else ""
    message = f'rule "{warned.rule}": {warned.message}'
    return Problem(place.file, mark.line, mark.column, message, hint=warned.hint, source_line=line)


def _places(files: tuple[Path, ...]) -> dict[str, Place]:
    return {name: place for file in files for name, place in _of_file(file)}


def _of_file(file: Path) -> Iterator[tuple[str, Place]]:
    text = file.read_text(encoding="utf-8-sig")
    root = yaml12.read(text).root
    if not isinstance(root, yaml12.Mapping) or "rules" not in root.entries:
        return
    section = root.entries["rules"][1]
    for index, rule in enumerate(section.items if isinstance(section, yaml12.Sequence) else ()):
        if isinstance(rule, yaml12.Mapping) and "name" in rule.entries:
            name = rule.entries["name"][1]
            if isinstance(name, yaml12.Scalar):
                yield str(name.value), Place(file, root, index, _LINE_END.split(text))
