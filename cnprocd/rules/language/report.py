"""What pydantic finds itself in a rule file, in our words.

Strategy: most mistakes come from our own parsers and are sentences already. What pydantic finds itself (a missing or
unknown key, a list where a mapping belongs) is put into words here, and the JSON schema says what would be accepted
there, so that the words never differ from what the editor offers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic_core import ErrorDetails

from cnprocd.rules.language.mistakes import Mistake, MistakeError, nearest, shown
from cnprocd.rules.language.schema import json_schema

Path_ = tuple[str | int, ...]


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
