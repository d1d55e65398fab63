"""Count words that the writing rules replace: `python tests/prose.py`.

Read the prose of README, docs, manual pages and docstrings (of cnprocd and tests). Count two groups of words per
thousand words: words for persons, and forms of one verb. Print the files with the most of them first. The limit is
enforced by tests/unit/test_prose.py.

Code is not prose: fenced and indented blocks of Markdown, examples in manual pages, and backquoted text are left out.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PERSONS = re.compile(r"\b(who|whoever|whom|nobody|somebody)\b", re.IGNORECASE)
TELL = re.compile(r"\b(tell|tells|told|telling)\b", re.IGNORECASE)
MOST_PER_THOUSAND = 0.5
_DOCUMENTS = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")
_MANUAL = ("packaging/man/*.in", "packaging/man/cnprocd-runner.8")
_SOURCES = ("cnprocd/**/*.py", "tests/**/*.py")


class Count(NamedTuple):
    """The words of one file: all of them, and those of either group."""

    path: str
    words: int
    persons: int
    tell: int


def markdown(text: str) -> str:
    """Return the prose of a Markdown text."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^    .*$", "", text, flags=re.M)
    return _without_code(text)


def roff(text: str) -> str:
    """Return the prose of a manual page."""
    text = re.sub(r"^\.nf$.*?^\.fi$", "", text, flags=re.M | re.S)
    text = re.sub(r"^\.[A-Z]{1,2} ?", "", text, flags=re.M)
    return re.sub(r"\\f[A-Z]|\\&", "", text)


def docstrings(source: str) -> str:
    """Return the docstrings of a Python module."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts.append(node.value.value)  # the docstring of a variable
    return _without_code("\n".join(dict.fromkeys(texts)))


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`|https?://\S+", " ", text)


def prose() -> Iterator[tuple[str, str]]:
    """Yield (path below the project, prose) of every file."""
    for patterns, read in ((_DOCUMENTS, markdown), (_MANUAL, roff), (_SOURCES, docstrings)):
        for pattern in patterns:
            for path in sorted(ROOT.glob(pattern)):
                yield path.relative_to(ROOT).as_posix(), read(path.read_text(encoding="utf-8"))


def counts() -> list[Count]:
    """Return the counts of every file."""
    return [
        Count(path, len(text.split()), len(PERSONS.findall(text)), len(TELL.findall(text))) for path, text in prose()
    ]


def per_thousand(found: list[Count]) -> tuple[float, float]:
    """Return the words of either group per thousand words of all files together."""
    words = sum(one.words for one in found)
    return 1000 * sum(one.persons for one in found) / words, 1000 * sum(one.tell for one in found) / words


def report(found: list[Count]) -> str:
    """Return the totals, and the files that have such words, most first."""
    persons, tell = per_thousand(found)
    lines = [f"{persons:.2f} words for persons and {tell:.2f} forms of 'tell' per thousand words"]
    listed = sorted((one for one in found if one.persons + one.tell), key=lambda one: -one.persons - one.tell)
    lines += [f"{one.persons:5} {one.tell:5} of {one.words:5} words  {one.path}" for one in listed]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report(counts()) + "\n")
