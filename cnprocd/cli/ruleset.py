"""Load rule files for commands, as the daemon does, with every warning at its line and column."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cnprocd.cli.drafts import Draft, dropins_with
from cnprocd.cli.observing import observes_only
from cnprocd.cli.standard_files import read_input
from cnprocd.cli.this_machine import BadHook, bad_hooks, unavailable_here, unreadable_rule_files
from cnprocd.errors import CnprocdError
from cnprocd.rules.language import yaml12
from cnprocd.rules.language.disabled import apply
from cnprocd.rules.language.lint import LintWarning, lint
from cnprocd.rules.language.load import DROPIN_DIRS, LARGEST, load
from cnprocd.rules.language.names import HIGHEST_ID
from cnprocd.rules.problems import LoadedRules, Problem, RulesError
from cnprocd.rules.rule_files import disabled_path
from cnprocd.rules.ruleset import Rule

STANDARD_INPUT = Path("-")
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Checked:
    """The outcome of checking rule files. `warnings` are (kind, problem); with problems there are none."""

    files: tuple[Path, ...]
    rules: int
    problems: tuple[Problem, ...]
    warnings: tuple[tuple[str, Problem], ...]
    rules_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a rule."""

    file: Path
    root: yaml12.Mapping
    index: int
    lines: list[str]

    @property
    def line(self) -> int:
        """Return the line of the first key of the rule, from 1."""
        return yaml12.locate(self.root, ("rules", self.index), False).line

    @property
    def text(self) -> str:
        """Return `file:line`."""
        return f"{self.file}:{self.line}"


def loaded_rules(
    rules: Path | None,
    user: Callable[[str], int | None] | None = None,
    group: Callable[[str], int | None] | None = None,
    observe_only: bool = False,
    draft: Draft | None = None,
) -> LoadedRules:
    """Return the rules of this --rules, with the disabled ones marked. Raises RulesError.

    With a draft, return them as they would be if its file had that content.
    """
    observe_only = observes_only(observe_only, os.environ)
    disabled = disabled_path(rules)
    if draft is None:
        return apply(load(rules, user=user, group=group, observe_only=observe_only), disabled)
    main, *also = dropins_with(rules, draft)
    return apply(load(main, also=also, read=draft.read, user=user, group=group, observe_only=observe_only), disabled)


def check(
    rules: Path | None,
    files: Sequence[Path],
    *,
    other_host: bool = False,
    observe_only: bool = False,
    draft: Draft | None = None,
) -> Checked:
    """Check `files` together, the first as the main file and the others as drop-ins; without any, those of --rules.

    `-` is standard input, and a pipe such as that of `<(...)` in a shell is read as well. A file that is named twice is
    read once. With `other_host`, the users, groups and hooks of this machine do not matter. With `observe_only`, a rule
    with a hook is an error.
    """
    observe_only = observes_only(observe_only, os.environ)
    files = list(dict.fromkeys(files))
    look_up = _any_name() if other_host else None

    def read(paths: Sequence[Path]) -> LoadedRules:
        return load(paths[0], also=paths[1:], user=look_up, group=look_up, observe_only=observe_only)

    if not files:
        found = _check(lambda: loaded_rules(rules, look_up, look_up, observe_only, draft), other_host, draft)
        return found if other_host or found.problems else replace(found, warnings=found.warnings + _unreadable(rules))
    with tempfile.TemporaryDirectory(prefix="cnprocctl-") as directory:
        copies = {Path(directory) / str(i): file for i, file in enumerate(files) if _is_stream(file)}
        for copy, file in copies.items():
            copy.write_bytes(_content(file))
        copy_of = {file: copy for copy, file in copies.items()}
        found = _check(lambda: read([copy_of.get(file, file) for file in files]), other_host)
    return replace(
        found,
        files=tuple(copies.get(file, file) for file in found.files),
        problems=tuple(_renamed(problem, copies) for problem in found.problems),
        warnings=tuple((kind, _renamed(problem, copies)) for kind, problem in found.warnings),
    )


def _is_stream(file: Path) -> bool:
    """Whether a file can be read only once, and is not opened by its path.

    A pipe of a shell (/dev/fd/N) has no path. A named pipe is refused as the daemon refuses it: without a writer, the
    open would wait for ever.
    """
    return file == STANDARD_INPUT or (file.is_fifo() and not os.path.exists(os.path.realpath(file)))


def _content(file: Path) -> bytes:
    if file == STANDARD_INPUT:
        return read_input(LARGEST + 1)
    with file.open("rb") as pipe:
        return pipe.read(LARGEST + 1)


def _check(read: Callable[[], LoadedRules], other_host: bool, draft: Draft | None = None) -> Checked:
    try:
        loaded = read()
    except RulesError as error:
        return Checked((), 0, error.problems, ())
    found = tuple(warnings(loaded, other_host=other_host, draft=draft))
    return Checked(loaded.files, len(loaded.rules), (), found, loaded.rules_hash)


def _any_name() -> Callable[[str], int | None]:
    """Return a look-up by which every user and group exists, each with an id of its own."""
    ids: dict[str, int] = {}
    return lambda name: ids.setdefault(name, HIGHEST_ID - len(ids))


def _unreadable(rules: Path | None) -> tuple[tuple[str, Problem], ...]:
    try:
        found = unreadable_rule_files(rules)
    except CnprocdError:
        return ()  # `cnprocctl doctor` reports that
    return tuple(("unreadable", Problem(one.path, 0, 0, one.message, hint=one.hint)) for one in found)


def _renamed(problem: Problem, copies: Mapping[Path, Path]) -> Problem:
    """Return the problem with the file itself for its copy, which no longer exists when the text is read."""
    for copy, file in copies.items():
        problem = replace(
            problem,
            file=file if problem.file == copy else problem.file,
            message=problem.message.replace(str(copy), str(file)),
            hint=problem.hint.replace(str(copy), str(file)),
        )
    return problem


def rule_of_match(match: str | None, events: Sequence[str]) -> Rule:
    """Return a rule of the command line: `match` is YAML or JSON of the rule language. Raises RulesError."""
    text = f"rules:\n  - name: command-line\n    events: [{', '.join(events)}]\n"
    if match is not None:
        text += f"    match: {match}\n"
    # Load it as a file: its problems then have a position and a caret.
    with tempfile.TemporaryDirectory(prefix="cnprocctl-") as directory:
        file = Path(directory) / "--match"
        file.write_text(text)
        try:
            return load(file).rules[0]
        except RulesError as error:
            raise RulesError([replace(problem, file=Path("--match")) for problem in error.problems]) from error


def warnings_of_files(files: Sequence[Path]) -> list[tuple[str, Problem]]:
    """Return the warnings about files that a daemon loaded, the main file first. Raises RulesError or OSError."""
    return warnings(apply(load(files[0], also=files[1:]), disabled_path(files[0])))


def warnings(loaded: LoadedRules, *, other_host: bool = False, draft: Draft | None = None) -> list[tuple[str, Problem]]:
    """Return the warnings of the loader and of lint, and about hooks that cannot run here, as (kind, problem)."""
    known = places(loaded, draft)
    found = list(lint(loaded.rules))
    if not other_host:
        found += [*map(_of_hook, bad_hooks(loaded.rules)), *unavailable_here(loaded.rules)]
    return [
        *(("advice", problem) for problem in loaded.warnings),
        *((warning.kind, _problem(warning, known)) for warning in found),
    ]


def _of_hook(bad: BadHook) -> LintWarning:
    at = ("run", "command", 0)
    return LintWarning(bad.rule.name, at, "hook", f"the hook cannot run: {bad.error.what}", bad.error.hint)


def places(loaded: LoadedRules, draft: Draft | None = None) -> dict[str, Place]:
    """Return the position of each rule."""
    return {name: place for file in loaded.files for name, place in _of_file(file, draft)}


def overridden(file: Path, name: str, directories: Sequence[Path] = DROPIN_DIRS) -> Iterator[tuple[Path, int | None]]:
    """Return the drop-ins that `file` takes precedence over, each with the line of its rule `name`, if it has one.

    `directories` are given with the highest precedence first, as for load().
    """
    lower = directories[directories.index(file.parent) + 1 :] if file.parent in directories else ()
    for directory in lower:
        other = directory / file.name
        if other.is_file():
            yield other, _line_of(other, name)


def _line_of(file: Path, name: str) -> int | None:
    try:
        return next((place.line for found, place in _of_file(file) if found == name), None)
    except (OSError, UnicodeDecodeError):
        return None


def _problem(warning: LintWarning, known: dict[str, Place]) -> Problem:
    place = known[warning.rule]
    mark = yaml12.locate(place.root, ("rules", place.index, *warning.at), False)
    line = place.lines[mark.line - 1] if 0 < mark.line <= len(place.lines) else ""
    message = f'rule "{warning.rule}": {warning.message}'
    return Problem(place.file, mark.line, mark.column, message, hint=warning.hint, source_line=line)


def _of_file(file: Path, draft: Draft | None = None) -> Iterator[tuple[str, Place]]:
    data = draft.content if draft is not None and file == draft.file else file.read_bytes()
    text = data.decode("utf-8-sig")
    root = yaml12.read(text).root
    if not isinstance(root, yaml12.Mapping) or "rules" not in root.entries:
        return
    section, lines = root.entries["rules"][1], _LINE_END.split(text)
    for index, rule in enumerate(section.items if isinstance(section, yaml12.Sequence) else ()):
        if isinstance(rule, yaml12.Mapping) and "name" in rule.entries:
            name = rule.entries["name"][1]
            if isinstance(name, yaml12.Scalar):
                yield str(name.value), Place(file, root, index, lines)
