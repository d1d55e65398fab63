"""pydantic's validation errors as problems with a path.

Most problems come from the parsers of this package and are sentences already. The errors that pydantic finds itself (a
missing or unknown key, a list instead of a mapping) are put into words here. The JSON schema gives the accepted values,
so these words agree with the editor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from pydantic_core import ErrorDetails

from cnprocd.rules.language.schema import json_schema
from cnprocd.rules.language.value_problem import InvalidValueError, ValueProblem, did_you_mean, shown

Path_ = tuple[str | int, ...]


def problems_in(errors: Iterable[ErrorDetails]) -> Iterator[ValueProblem]:
    """Return the problems of pydantic's errors, with their paths from the top of the file.

    A value that the YAML parser rejected is None and is not reported again.
    """
    for error in errors:
        if error["input"] is not None:
            yield from _problems(error)


def _problems(error: ErrorDetails) -> Iterator[ValueProblem]:
    path: Path_ = tuple(error["loc"])
    on_key = path[-1:] == ("[key]",)
    path = path[:-1] if on_key else path
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, InvalidValueError):
        yield from (replace(one, at=(*path, *one.at), on_key=on_key or one.on_key) for one in cause.problems)
        return
    value = error["input"]
    schema = _schema_at(path)
    match error["type"]:
        case "missing":
            described = f"{path[-1]}: {schema.get('description', '')}"
            yield ValueProblem(f'the key "{path[-1]}" is missing', hint=described, at=path[:-1], on_key=True)
        case "extra_forbidden":
            known = list(_properties(_schema_at(path[:-1])))
            hint = did_you_mean(str(path[-1]), known)
            yield ValueProblem(f'unknown key "{path[-1]}"', ", ".join(known), hint, path, on_key=True)
        case "too_short":
            if not value:  # else its items are invalid, and each is reported
                yield ValueProblem("the list is empty", _accepted(schema), at=path)
        case "model_type" | "model_attributes_type" | "dict_type":
            yield ValueProblem(f"expected a mapping, found {shown(value)}", _accepted(schema), at=path)
        case "tuple_type" | "list_type":
            yield ValueProblem(f"expected a list, found {shown(value)}", _accepted(schema), at=path)
        case _:
            yield ValueProblem(f"{shown(value)}: {error['msg']}", _accepted(schema), at=path)


# The JSON schema as the source of the accepted values.

_root_schema = cache(json_schema)


def _choices(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schema with its reference resolved, or the branches of its anyOf (up to pydantic 2.8 a lone allOf)."""
    if "$ref" in schema:
        return _choices(_root_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]])
    branches = schema.get("anyOf") or schema.get("allOf")
    return [choice for branch in branches for choice in _choices(branch)] if branches else [schema]


def _schema_at(path: Path_) -> dict[str, Any]:
    """Return the schema of the value at a path, or an empty schema if the path does not exist."""
    schema = _root_schema()
    for step in path:
        for choice in _choices(schema):
            below = choice.get("items") if isinstance(step, int) else choice.get("properties", {}).get(step)
            below = below or (choice.get("additionalProperties") if isinstance(step, str) else None)
            if below:
                schema = below
                break
        else:
            if not isinstance(step, int):  # a single item is validated as a list of one: the index is not in the file
                return {}
    return schema


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: value for choice in _choices(schema) for name, value in choice.get("properties", {}).items()}


def _accepted(schema: dict[str, Any]) -> str:
    """Return the accepted values of a schema, in words."""
    phrases = []
    for choice in _choices(schema):
        if choice.get("properties"):
            phrases.append("a mapping with " + ", ".join(choice["properties"]))
        elif choice.get("type") == "array":
            phrases.append("a list of at least one" if choice.get("minItems") else "a list")
        else:
            phrases.append({"boolean": "true or false", "object": "a mapping"}.get(str(choice.get("type")), "a value"))
    return ", or ".join(phrases)
