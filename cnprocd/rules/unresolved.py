"""Names of users and groups that the name service did not resolve when the rules were loaded. PURE.

A rule with such a name loads and matches nothing through it: the test of that key is unknown, so neither the key nor
its negation holds. The daemon asks again, and puts the ids in place of the names when it has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

from cnprocd.rules.ruleset import ID_KEYS, Rule

Kind = Literal["user", "group"]


class Name(NamedTuple):
    """A name that a condition of a rule has."""

    kind: Kind
    name: str


def unresolved_names(rules: Iterable[Rule]) -> frozenset[Name]:
    """Return the names in the conditions of the rules that have no id."""
    return frozenset(name for rule in rules if rule.match is not None for name in _names(rule.match))


def with_ids(rules: Iterable[Rule], ids: Mapping[Name, int]) -> tuple[Rule, ...]:
    """Return the rules with these ids in place of their names."""
    return tuple(rule if rule.match is None else replace(rule, match=_with_ids(rule.match, ids)) for rule in rules)


def _names(condition: object) -> Iterator[Name]:
    for key, kind in ID_KEYS.items():
        for entry in getattr(condition, key) or ():
            if isinstance(entry, str):
                yield Name(kind, entry)
    for part in _parts(condition):
        yield from _names(part)


def _parts(condition: Any) -> Iterator[object]:  # noqa: ANN401  # Condition or ProcessCondition
    for one in fields(condition):
        held = getattr(condition, one.name)
        yield from (part for part in (held if isinstance(held, tuple) else (held,)) if _is_condition(part))


def _is_condition(value: object) -> bool:
    return is_dataclass(value) and hasattr(value, "user")


def _with_ids(condition: Any, ids: Mapping[Name, int]) -> Any:  # noqa: ANN401  # as above
    changed: dict[str, object] = {}
    for one in fields(condition):
        held = getattr(condition, one.name)
        if one.name in ID_KEYS and held is not None:
            changed[one.name] = tuple(_id(ID_KEYS[one.name], entry, ids) for entry in held)
        elif isinstance(held, tuple) and any(map(_is_condition, held)):
            changed[one.name] = tuple(_with_ids(part, ids) for part in held)
        elif _is_condition(held):
            changed[one.name] = _with_ids(held, ids)
    return replace(condition, **changed)


def _id(kind: Kind, entry: int | str, ids: Mapping[Name, int]) -> int | str:
    return ids.get(Name(kind, entry), entry) if isinstance(entry, str) else entry
