"""Load rule files: return the typed rules, or every problem in every file.

Each file is opened with its whole path checked (safe_open.py), parsed with positions (yaml12.py), and validated
(schema.py) with the lists of all files. All files are read before a decision: one run reports all problems, and if any
file is invalid, no file is loaded. Drop-ins follow systemd: of several files with one name, the one in the directory of
highest precedence counts; an empty file or a link to /dev/null masks it; the files apply in the order of their names.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from cnprocd.rules.language import yaml12
from cnprocd.rules.language.advice import advise
from cnprocd.rules.language.fields import parse_list
from cnprocd.rules.language.names import Context
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.report import problems_in
from cnprocd.rules.language.schema import RuleFileModel
from cnprocd.rules.language.value_problem import InvalidValueError, ValueProblem
from cnprocd.rules.language.yaml12 import Mark
from cnprocd.rules.problems import LoadedRules, Problem, RulesError, hash_of
from cnprocd.rules.rule_files import DROPIN_DIRS, LARGEST, MAIN_FILE, find_dropins
from cnprocd.rules.ruleset import Rule, Settings
from cnprocd.rules.written import digest
from cnprocd.safe_open import UnsafeFileError, safe_open

__all__ = ["DROPIN_DIRS", "LARGEST", "MAIN_FILE", "LoadedRules", "Problem", "RulesError", "load"]

_LINE_END = re.compile(r"\r\n|\r|\n")  # not splitlines(): a stray form feed must not shift the lines that are shown

NAMES_LIMIT_S = 5.0  # for all users and groups of the rules together
HOOKS_REFUSED = ValueProblem(
    "hooks are refused: --observe-only is in effect",
    "rules without run",
    "a hook in a container has the files and users of its image, not those of the host: give this rule to a cnprocd "
    "that runs on the host",
)
_MINIMAL_HINT = 'a minimal file is "rules: []", or with one rule "rules: [{name: failed, events: [nonzero_exit]}]"'


@dataclass(slots=True)
class _Source:
    """One file: its lines once read, its tree once parsed, and its problems so far."""

    file: Path
    is_dropin: bool
    lines: list[str] = field(default_factory=list)
    root: yaml12.Mapping | None = None
    broken: bool = False
    problems: list[Problem] = field(default_factory=list)

    def problem(self, mark: Mark, found: ValueProblem) -> Problem:
        line = self.lines[mark.line - 1] if 0 < mark.line <= len(self.lines) else ""
        return Problem(self.file, mark.line, mark.column, found.message, found.accepted, found.hint, line)

    def reject(self, mark: Mark, found: ValueProblem) -> None:
        self.problems.append(self.problem(mark, found))


def read_rule_file(path: Path) -> bytes:
    """Return the content of a file that only root can change, at most LARGEST + 1 bytes. Raises as safe_open does."""
    with os.fdopen(safe_open(path), "rb") as file:
        return file.read(LARGEST + 1)


def load(
    path: Path | None,
    *,
    also: Sequence[Path] = (),
    main_file: Path = MAIN_FILE,
    dropin_dirs: Sequence[Path] = DROPIN_DIRS,
    user: Callable[[str], int | None] | None = None,
    group: Callable[[str], int | None] | None = None,
    read: Callable[[Path], bytes] = read_rule_file,
    observe_only: bool = False,
) -> LoadedRules:
    """Load only the file `path`, with the files `also` as drop-ins; or with None the main file and its drop-ins.

    `dropin_dirs` begin with the highest precedence. `user` and `group` return the id of a name or None; by default they
    use the system's databases. `read` returns the content of a file. With `observe_only`, a rule with a hook is an
    error, also if it is disabled: `rules enable` and the end of a time enable it without a look at its file. Raises
    RulesError with every problem in every file.
    """
    warnings: list[Problem] = []
    sources = [_Source(path or main_file, is_dropin=False), *(_Source(one, is_dropin=True) for one in also)]
    if path is None:
        sources += _dropins(dropin_dirs, warnings)
    contents: dict[Path, bytes] = {}

    def read_and_keep(file: Path) -> bytes:
        contents[file] = read(file)
        return contents[file]

    for source in sources:
        _read(source, read_and_keep)
    sources = [source for source in sources if source.root is not None or source.problems]
    names = _BoundedLookups()
    context = Context(
        _list_texts(sources), user or cache(names.of(system_user)), group or cache(names.of(system_group))
    )
    files = [(source, _validate(source, context)) for source in sources]
    _check_across_files(sources)
    if observe_only:
        _refuse_hooks(sources)
    problems = [problem for source in sources for problem in sorted(source.problems, key=_place)]
    if problems:
        raise RulesError(problems)
    valid = [(source, rule_file) for source, rule_file in files if rule_file is not None]
    settings: Settings = plain(valid[0][1].settings)
    rules: tuple[Rule, ...] = tuple(
        replace(plain(rule), record_by_settings=settings.record) for _, rule_file in valid for rule in rule_file.rules
    )
    return LoadedRules(
        rules=rules,
        settings=settings,
        lists={name: entries for _, rule_file in valid for name, entries in rule_file.lists.items()},
        files=tuple(source.file for source in sources),
        warnings=(*warnings, *_warnings(valid, context.missing)),
        digests={rule.name: digest(rule) for rule in rules},
        files_hash=hash_of(contents.get(source.file, b"") for source in sources),
    )


def _place(problem: Problem) -> tuple[int, int]:
    return problem.line, problem.column


class _BoundedLookups:
    """Look-ups of names that take NAMES_LIMIT_S in all at most. A name without an answer by then has no id."""

    def __init__(self) -> None:
        self._deadline_s: float | None = None

    def of(self, look_up: Callable[[str], int | None]) -> Callable[[str], int | None]:
        """Return the bounded form of a look-up. It runs in a thread: nothing interrupts a name service."""

        def bounded(name: str) -> int | None:
            if self._deadline_s is None:
                self._deadline_s = time.monotonic() + NAMES_LIMIT_S
            answers: list[int | None] = []
            thread = threading.Thread(target=lambda: answers.append(look_up(name)), daemon=True)
            thread.start()
            thread.join(max(0.0, self._deadline_s - time.monotonic()))
            return answers[0] if answers else None

        return bounded


def system_user(name: str) -> int | None:
    """Return the uid of a name in the system's database, or None. May take as long as the name service likes."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def system_group(name: str) -> int | None:
    """Return the gid of a name in the system's database, or None."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


# Which files.


def _dropins(directories: Sequence[Path], warnings: list[Problem]) -> list[_Source]:
    """Return the drop-in files that apply, in the order of their names. Masked files are skipped when they are read."""
    found = find_dropins(directories)
    message = "ignored: only files whose names end in .yaml are read"
    warnings += [Problem(file, 0, 0, message) for file in found.ignored]
    unreadable = []
    for directory, error in found.unreadable:
        source = _Source(directory, is_dropin=True)
        source.reject(Mark(), ValueProblem(f"cannot read the directory: {error.strerror}"))
        unreadable.append(source)
    return unreadable + [_Source(file, is_dropin=True) for file in found.files]


# From file to tree.


def _read(source: _Source, read: Callable[[Path], bytes]) -> None:
    """Fill in the lines and root of a source, or its problems. A masked drop-in gets neither."""
    if source.problems or (source.is_dropin and os.path.realpath(source.file) == "/dev/null"):
        return
    data = _content(source, read)
    text = None if data is None else _decoded(source, data.removeprefix(b"\xef\xbb\xbf"))
    if text is None:
        return
    source.lines = _LINE_END.split(text)
    document = yaml12.read(text)
    source.broken = document.broken
    for problem in document.problems:
        source.reject(problem.mark, problem.problem)
    _take_root(source, document.root)


def _content(source: _Source, read: Callable[[Path], bytes]) -> bytes | None:
    try:
        data = read(source.file)
    except UnsafeFileError as error:
        source.reject(Mark(), ValueProblem(error.what, hint=error.hint))
        return None
    except FileNotFoundError:
        hint = "create it, or name another file (as with --rules FILE); " + _MINIMAL_HINT
        source.reject(Mark(), ValueProblem("the file does not exist", hint=hint))
        return None
    except OSError as error:
        source.reject(Mark(), ValueProblem(f"cannot read the file: {error.strerror}", hint=_hint_of(error)))
        return None
    if len(data) > LARGEST:
        source.reject(Mark(), ValueProblem("the file is too large", "at most 1 MiB", "split it into files in rules.d"))
        return None
    return data


def _hint_of(error: OSError) -> str:
    hints = {
        errno.EACCES: "check its permissions",
        errno.EPERM: "check its permissions",
        errno.ELOOP: "name the file itself: its symbolic links lead in a circle",
        errno.EIO: "check the disk: the kernel's log names it (dmesg)",
    }
    return hints.get(error.errno or 0, "check the path: ls -l shows each part of it")


def _decoded(source: _Source, data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        source.lines = _LINE_END.split(data.decode(errors="replace"))
        mark = Mark(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
        message = f"the byte 0x{data[error.start]:02x} is not UTF-8"
        source.reject(mark, ValueProblem(message, "UTF-8 text", "convert the file: iconv -f latin1 -t utf-8"))
        return None


def _take_root(source: _Source, root: yaml12.Node | None) -> None:
    if isinstance(root, yaml12.Mapping) and (root.entries or source.problems):
        source.root = root
    elif source.problems:
        return
    elif root is None or (isinstance(root, yaml12.Scalar) and root.value is None) or isinstance(root, yaml12.Mapping):
        if not source.is_dropin:  # a drop-in that has only comments is empty: it masks
            source.reject(Mark(), ValueProblem("the file is empty", hint=_MINIMAL_HINT))
    else:
        hint = "put the rules under a key: rules:" if isinstance(root, yaml12.Sequence) else _MINIMAL_HINT
        source.reject(root.mark, ValueProblem("the file is not a mapping", "the keys settings, lists and rules", hint))


# From trees to rules.


def _section(source: _Source, key: str) -> yaml12.Node | None:
    return source.root.entries[key][1] if source.root is not None and key in source.root.entries else None


def _list_texts(sources: Sequence[_Source]) -> dict[str, tuple[str, ...]]:
    """Return the valid entries of all lists. An invalid entry is reported in its list, not again where it is used."""
    texts: dict[str, tuple[str, ...]] = {}
    for source in sources:
        section = _section(source, "lists")
        if not isinstance(section, yaml12.Mapping):
            continue
        for name, (_, node) in section.entries.items():
            entries = yaml12.plain_data(node)
            texts.setdefault(name, tuple(filter(_is_valid, entries)) if isinstance(entries, list) else ())
    return texts


def _is_valid(entry: object) -> bool:
    try:
        parse_list([entry])
    except InvalidValueError:
        return False
    return True


def _validate(source: _Source, context: Context) -> RuleFileModel | None:
    if source.root is None or source.broken:  # the problems of a partial file are misleading
        return None
    refused = {(problem.line, problem.column) for problem in source.problems}
    try:
        return RuleFileModel.model_validate(yaml12.plain_data(source.root), context=context)
    except ValidationError as error:
        for problem in problems_in(error.errors(include_url=False)):
            mark = yaml12.locate(source.root, problem.at, problem.on_key)
            # A value that the parser rejected is None: what a model reports about it is a consequence.
            if (mark.line, mark.column) not in refused:
                source.reject(mark, problem)
    return None


def _check_across_files(sources: Sequence[_Source]) -> None:
    """Report the problems of all files together: settings outside the main file, and duplicate names."""
    rules: dict[str, tuple[_Source, Mark]] = {}
    lists: dict[str, tuple[_Source, Mark]] = {}
    for source in sources:
        if source.root is not None and source.is_dropin and "settings" in source.root.entries:
            problem = ValueProblem(
                "settings are allowed only in the main file", "lists and rules", f"move them to {sources[0].file}"
            )
            source.reject(source.root.entries["settings"][0], problem)
        for name, mark in _rule_names(source):
            _check_duplicate("rule", name, source, mark, rules)
        for name, mark in _list_names(source):
            _check_duplicate("list", name, source, mark, lists)


def _refuse_hooks(sources: Sequence[_Source]) -> None:
    for source in sources:
        section = _section(source, "rules")
        for rule in section.items if isinstance(section, yaml12.Sequence) else ():
            if isinstance(rule, yaml12.Mapping) and "run" in rule.entries:
                source.reject(rule.entries["run"][0], HOOKS_REFUSED)


def _check_duplicate(what: str, name: str, source: _Source, mark: Mark, taken: dict[str, tuple[_Source, Mark]]) -> None:
    first, where = taken.setdefault(name, (source, mark))
    if (first, where) != (source, mark):
        message = f'duplicate {what} name "{name}": also at {first.file}:{where.line}:{where.column}'
        source.reject(mark, ValueProblem(message, "a unique name"))


def _rule_names(source: _Source) -> Iterator[tuple[str, Mark]]:
    section = _section(source, "rules")
    for rule in section.items if isinstance(section, yaml12.Sequence) else ():
        name = rule.entries["name"][1] if isinstance(rule, yaml12.Mapping) and "name" in rule.entries else None
        if isinstance(name, yaml12.Scalar) and isinstance(name.value, str):
            yield name.value, name.mark


def _list_names(source: _Source) -> Iterator[tuple[str, Mark]]:
    section = _section(source, "lists")
    if isinstance(section, yaml12.Mapping):
        yield from ((name, mark) for name, (mark, _) in section.entries.items())


# Warnings.


def _warnings(
    valid: Sequence[tuple[_Source, RuleFileModel]], missing: Collection[tuple[str, str]]
) -> Iterator[Problem]:
    used = {text[1:] for source, _ in valid if source.root is not None for text in _references(source.root)}
    for source, rule_file in valid:
        assert source.root is not None
        for name, mark in _list_names(source):
            if name not in used:
                yield source.problem(
                    mark, ValueProblem(f'the list "{name}" is not used', hint=f'use it as "${name}", or remove it')
                )
        for index, rule in enumerate(rule_file.rules):
            for advice in advise(rule, missing):
                mark = yaml12.locate(source.root, ("rules", index, *advice.at), advice.on_key)
                yield source.problem(mark, advice)


def _references(node: yaml12.Node) -> Iterator[str]:
    """Return every text that begins with $."""
    if isinstance(node, yaml12.Mapping):
        for _, value in node.entries.values():
            yield from _references(value)
    elif isinstance(node, yaml12.Sequence):
        for item in node.items:
            yield from _references(item)
    elif isinstance(node.value, str) and node.value.startswith("$"):
        yield node.value
