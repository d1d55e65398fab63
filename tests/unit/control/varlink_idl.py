"""Read a Varlink interface, and check values against it: enough of the language for config/io.cnprocd.varlink."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_TOKEN = re.compile(r"#[^\n]*|->|\[\]|\[string\]|[\w.]+|[?(),:]")
_SIMPLE = {"string": str, "int": int, "bool": bool, "float": (int, float), "object": dict}


class Interface(NamedTuple):
    """The types, the methods with their parameters and results, and the errors: each maps fields to types."""

    types: dict[str, dict[str, str]]
    methods: dict[str, tuple[dict[str, str], dict[str, str]]]
    errors: dict[str, dict[str, str]]


def parse(text: str) -> Interface:
    tokens = iter([token for token in _TOKEN.findall(text) if not token.startswith("#")])
    found = Interface({}, {}, {})
    for word in tokens:
        name = next(tokens)
        if word == "type":
            found.types[name] = _struct(tokens)
        elif word == "error":
            found.errors[name] = _struct(tokens)
        elif word == "method":
            takes = _struct(tokens)
            assert next(tokens) == "->"
            found.methods[name] = (takes, _struct(tokens))
        else:
            assert word == "interface", word
    return found


def _struct(tokens: Any) -> dict[str, str]:
    assert next(tokens) == "("
    fields: dict[str, str] = {}
    for token in tokens:
        if token == ")":
            return fields
        if token == ",":
            continue
        assert next(tokens) == ":"
        kind = ""
        while (part := next(tokens)) in ("?", "[]", "[string]"):
            kind += part
        fields[token] = kind + part
    raise AssertionError("no )")


def wrong(interface: Interface, struct: dict[str, str], value: dict[str, Any]) -> list[str]:
    """Return what is wrong with an object: fields that are missing, unknown, or of another type."""
    missing = [f"{name} is missing" for name, kind in struct.items() if name not in value and not kind.startswith("?")]
    unknown = [f"{name} is not in the interface" for name in value if name not in struct]
    return (
        missing
        + unknown
        + [
            f"{name}: {value[name]!r} is not {kind}"
            for name, kind in struct.items()
            if name in value and not _is(interface, kind, value[name])
        ]
    )


def _is(interface: Interface, kind: str, value: Any) -> bool:
    if kind.startswith("?"):
        return value is None or _is(interface, kind[1:], value)
    if kind.startswith("[]"):
        return isinstance(value, list) and all(_is(interface, kind[2:], one) for one in value)
    if kind.startswith("[string]"):
        return isinstance(value, dict) and all(_is(interface, kind[8:], one) for one in value.values())
    if kind in interface.types:
        return isinstance(value, dict) and not wrong(interface, interface.types[kind], value)
    return isinstance(value, _SIMPLE[kind]) and (kind == "bool" or not isinstance(value, bool))
