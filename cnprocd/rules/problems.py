"""The result of loading rule files: the rules, or all problems in a form for people.

A problem is shown as `file:line:column: message`, then the line, a caret, the accepted values, and a hint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cnprocd.errors import EX_OSERR, ConfigError
from cnprocd.rules.ruleset import Rule, Settings
from cnprocd.rules.values import Pattern

WIDEST = 160


@dataclass(frozen=True, slots=True)
class LoadedRules:
    """The rules and settings of valid files.

    `warnings` are about valid rules that are probably not intended. `file_digests` are those of all files that
    were read (rule_files.py), from just before they were read: a later change is never missed. `snapshot` is the digest
    of the bytes that were parsed (snapshot.py), `snapshot_text` its form on the disk for a daemon that stores it.
    """

    rules: tuple[Rule, ...]
    settings: Settings
    lists: Mapping[str, tuple[Pattern, ...]]
    files: tuple[Path, ...]
    warnings: tuple[Problem, ...]
    file_digests: Mapping[Path, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)  # of each rule (written.py), for comparing with the files
    # The rules that the file `disabled` disables, with the end in nanoseconds since 1970, or None if there is no end.
    disabled: Mapping[str, int | None] = field(default_factory=dict)
    snapshot: str = ""
    snapshot_text: str = ""
    files_hash: str = ""  # of the contents of the files, in order

    @property
    def runs_hooks(self) -> bool:
        """Whether any enabled rule runs a hook."""
        return any(rule.run is not None and rule.enabled for rule in self.rules)

    @property
    def rules_hash(self) -> str:
        """Return the hash of what is in force: 64 hexadecimal digits that are the same on every host with these rules.

        It is of the contents of the files in order, wherever they stand, and of the names in `disabled`.
        """
        if not self.disabled:
            return self.files_hash
        return hash_of([self.files_hash.encode(), *(name.encode() for name in sorted(self.disabled))])


def hash_of(contents: Iterable[bytes]) -> str:
    """Return one hash of several contents. No content can be taken for the end of another one."""
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


def next_end_ns(loaded: LoadedRules) -> int | None:
    """Return when the first of the disabled rules is to be enabled again, in nanoseconds since 1970."""
    return min((end for end in loaded.disabled.values() if end is not None), default=None)


def with_expired_enabled(loaded: LoadedRules, now_ns: int) -> LoadedRules:
    """Return the rules with those enabled whose time in the file `disabled` is over."""
    over = {name for name, end in loaded.disabled.items() if end is not None and end <= now_ns}
    return replace(
        loaded,
        rules=tuple(replace(rule, enabled=True) if rule.name in over else rule for rule in loaded.rules),
        disabled={name: end for name, end in loaded.disabled.items() if name not in over},
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem in one file. Line and column count from 1; line 0 means the whole file."""

    file: Path
    line: int
    column: int
    message: str
    accepted: str = ""
    hint: str = ""
    source_line: str = ""

    @property
    def position(self) -> str:
        """Return `file:line:column`, or only the file if line is 0."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else str(self.file)

    @property
    def sentence(self) -> str:
        """Return the problem as one line, for a log record. Unprintable characters are escaped."""
        return f"{self.position}: {_printable(self.message)}" + (f" ({_printable(self.hint)})" if self.hint else "")

    def render(self) -> str:
        """Return the problem as lines of text, without a final newline. Unprintable characters are escaped."""
        lines = [f"{self.position}: {_printable(self.message)}"]
        if self.line:
            lines += [f"    {part}" for part in _pointed(self.source_line, self.column)]
        if self.accepted:
            lines.append(f"    accepted: {_printable(self.accepted)}")
        if self.hint:
            lines.append(f"    hint: {_printable(self.hint)}")
        return "\n".join(lines)


class RulesError(ConfigError):
    """The rule files are invalid, and none was loaded. `problems` has every problem, in file order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(
            f"{first.position}: {_printable(first.message)}{more}", _printable(first.hint or first.accepted)
        )
        self.problems = tuple(problems)

    def render(self, prefix: str = "") -> str:
        """Return all problems with their lines and carets. Each begins with its file instead of `prefix`."""
        return "\n".join(problem.render() for problem in self.problems)


class RetryableError(RulesError):
    """The rules were not read or not accepted for a reason that may pass: loading them again may succeed."""

    exit_status = EX_OSERR


def _printable(text: str) -> str:
    """Return text with unprintable characters escaped, so it cannot control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _pointed(line: str, column: int) -> tuple[str, str]:
    """Return the line and its caret line. A long line is cut to a window around the column."""
    start = max(0, column - WIDEST // 2) if len(line) > WIDEST else 0
    cut = line[start : start + WIDEST]  # first: a line of a megabyte may have a hundred thousand problems
    window = "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in cut)
    padding = "".join("\t" if c == "\t" else " " for c in window[: column - 1 - start])
    return window, padding + "^"
