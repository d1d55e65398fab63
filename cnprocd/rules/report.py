"""Problems of rule files as people read them: `file:line:column: what`, the line, a caret, what is accepted.

Strategy: most mistakes come from our own parsers and are sentences already. What pydantic finds itself (a missing or
unknown key, a list where a mapping belongs) is put into words here, and the JSON schema says what would be accepted
there, so that the words never differ from what the editor offers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from cnprocd.errors import ConfigError
from cnprocd.rules.mistakes import Mistake, MistakeError, nearest, shown
from cnprocd.rules.schema import json_schema

Path_ = tuple[str | int, ...]
WIDEST = 160


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

    def render(self) -> str:
        """All problems with their lines and carets, for a terminal."""
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


# --- pydantic's own findings in words


@dataclass(frozen=True, slots=True)
class Found:
    """A mistake and the whole path to it from the top of the file; `on_key` points at the key, not the value."""

    path: Path_
    mistake: Mistake
    on_key: bool = False


def found_in(errors: Iterable[ErrorDetails]) -> Iterator[Found]:
    """Every mistake behind pydantic's report. What the reader refused already (a None) is not reported again."""
    for error in errors:
        if error["input"] is not None:
            yield from _found(error)


def _found(error: ErrorDetails) -> Iterator[Found]:
    path: Path_ = tuple(error["loc"])
    on_key = path[-1:] == ("[key]",)
    path = path[:-1] if on_key else path
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, MistakeError):
        yield from (Found((*path, *m.at), replace(m, at=()), on_key or m.on_key) for m in cause.mistakes)
        return
    value = error["input"]
    schema = _schema_at(path)
    match error["type"]:
        case "missing":
            described = f"{path[-1]}: {schema.get('description', '')}"
            yield Found(path[:-1], Mistake(f'the key "{path[-1]}" is missing', hint=described), on_key=True)
        case "extra_forbidden":
            known = list(_properties(_schema_at(path[:-1])))
            hint = nearest(str(path[-1]), known)
            yield Found(path, Mistake(f'unknown key "{path[-1]}"', ", ".join(known), hint), on_key=True)
        case "too_short":
            if not value:  # else its items are wrong, and each says so
                yield Found(path, Mistake("the list is empty", _accepted(schema)))
        case "model_type" | "model_attributes_type" | "dict_type":
            yield Found(path, Mistake(f"expected a mapping, found {shown(value)}", _accepted(schema)))
        case "tuple_type" | "list_type":
            yield Found(path, Mistake(f"expected a list, found {shown(value)}", _accepted(schema)))
        case _:
            yield Found(path, Mistake(f"{shown(value)}: {error['msg']}", _accepted(schema)))


# --- the JSON schema as the source of what is accepted

_root_schema = cache(json_schema)


def _choices(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema with its reference followed, or the branches of its anyOf (up to pydantic 2.8 a lone allOf)."""
    if "$ref" in schema:
        return _choices(_root_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]])
    branches = schema.get("anyOf") or schema.get("allOf")
    return [choice for branch in branches for choice in _choices(branch)] if branches else [schema]


def _schema_at(path: Path_) -> dict[str, Any]:
    """The schema of the value at a path, or an empty one where the schema has no such place."""
    schema = _root_schema()
    for step in path:
        for choice in _choices(schema):
            below = choice.get("items") if isinstance(step, int) else choice.get("properties", {}).get(step)
            below = below or (choice.get("additionalProperties") if isinstance(step, str) else None)
            if below:
                schema = below
                break
        else:
            if not isinstance(step, int):  # an index the file does not have: a single item read as a list of one
                return {}
    return schema


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: value for choice in _choices(schema) for name, value in choice.get("properties", {}).items()}


def _accepted(schema: dict[str, Any]) -> str:
    """What a schema allows, in words."""
    phrases = []
    for choice in _choices(schema):
        if choice.get("properties"):
            phrases.append("a mapping with " + ", ".join(choice["properties"]))
        elif choice.get("type") == "array":
            phrases.append("a list of at least one" if choice.get("minItems") else "a list")
        else:
            phrases.append({"boolean": "true or false", "object": "a mapping"}.get(str(choice.get("type")), "a value"))
    return ", or ".join(phrases)
