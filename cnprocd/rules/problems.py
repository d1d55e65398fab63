"""What comes of loading rule files: the rules, or every mistake as people read it.

A mistake is shown as `file:line:column: what`, the line, a caret, what would be accepted, and a hint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnprocd.errors import ConfigError
from cnprocd.rules.ruleset import Rule, Settings
from cnprocd.rules.values import Pattern

MAIN_FILE = Path("/etc/cnprocd/rules.yaml")
WIDEST = 160


@dataclass(frozen=True, slots=True)
class LoadedRules:
    """What the files say, all of it valid. `warnings` are things allowed but probably not meant."""

    rules: tuple[Rule, ...]
    settings: Settings
    lists: Mapping[str, tuple[Pattern, ...]]
    files: tuple[Path, ...]
    warnings: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in one file. Line and column count from 1; line 0 means the file as a whole."""

    file: Path
    line: int
    column: int
    message: str
    accepted: str = ""
    hint: str = ""
    source_line: str = ""

    @property
    def position(self) -> str:
        """`file:line:column`, or the file alone."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else str(self.file)

    def render(self) -> str:
        """The problem as several lines of text, without a final newline. What the file holds is shown escaped."""
        lines = [f"{self.position}: {_printable(self.message)}"]
        if self.line:
            lines += [f"    {part}" for part in _pointed(self.source_line, self.column)]
        if self.accepted:
            lines.append(f"    accepted: {_printable(self.accepted)}")
        if self.hint:
            lines.append(f"    hint: {_printable(self.hint)}")
        return "\n".join(lines)


class RulesError(ConfigError):
    """The rule files cannot be used; nothing of them was applied. `problems` has every mistake, in file order."""

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


def _printable(text: str) -> str:
    """Text that cannot drive a terminal: what does not print is shown escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _pointed(line: str, column: int) -> tuple[str, str]:
    """The line and its caret line; a long line is cut to a window around the column."""
    start = max(0, column - WIDEST // 2) if len(line) > WIDEST else 0
    cut = line[start : start + WIDEST]  # first of all: a line of a megabyte may have a hundred thousand mistakes
    window = "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in cut)
    padding = "".join("\t" if c == "\t" else " " for c in window[: column - 1 - start])
    return window, padding + "^"
