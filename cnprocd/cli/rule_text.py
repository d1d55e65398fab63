"""A rule as YAML for people: blocks for mappings, one line for a list of scalars. PURE.

The daemon's parser takes YAML with the meanings of version 1.2, so quoting is decided here: what is not plainly a word
is quoted. PyYAML's writer follows version 1.1 and would leave `1e3` unquoted, a number in 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from cnprocd.json_value import JsonObject, JsonValue

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*|/[A-Za-z0-9_./-]*|[1-9][0-9]*(?:ms|[smhdKMGT])", re.ASCII)
_NOT_TEXT = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}


def rule_lines(rule: JsonObject) -> list[str]:
    """Return a rule as the lines of an item below `rules:`."""
    first, *rest = _block(rule, "")
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _block(mapping: JsonObject, indent: str) -> Iterator[str]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_scalar(key)}:"
            yield from _block(value, f"{indent}  ")
        else:
            yield f"{indent}{_scalar(key)}: {_flow(value)}"


def _flow(value: JsonValue) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: JsonValue) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return str(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    return '"' + "".join(map(_escaped, value)) + '"'


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    return char if char.isprintable() else f"\\U{ord(char):08X}"
