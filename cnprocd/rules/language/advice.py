"""Warnings about one rule: valid, but probably not intended. load.py adds the positions. PURE."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from cnprocd.rules.language.schema import RuleModel
from cnprocd.rules.language.value_problem import ValueProblem
from cnprocd.rules.ruleset import ID_KEYS

Path = tuple[str | int, ...]
_KINDS = ("user", "group")


def advise(rule: RuleModel, missing: Collection[tuple[str, str]] = ()) -> Iterator[ValueProblem]:
    """Return the warnings about one rule, with their paths from the rule.

    `missing`: kind and name of the users and groups that have no id now.
    """
    if rule.match is not None:
        yield from _missing_names(rule.match, ("match",))
    if rule.log is None and rule.run is None and rule.enabled:
        yield ValueProblem("this rule does nothing: log is false and it has no run", at=("log",))
    if rule.run is None:
        return
    for kind in _KINDS:
        name = getattr(rule.run, kind)
        if (kind, name) in missing:
            yield _no_name(kind, name, "hooks of this rule do not start until there is one", ("run", kind))


def _missing_names(condition: Any, path: Path) -> Iterator[ValueProblem]:  # noqa: ANN401  # either model
    for key, kind in ID_KEYS.items():
        for entry in getattr(condition, key) or ():
            if isinstance(entry, str):
                yield _no_name(kind, entry, "nothing matches through that name until there is one", (*path, key))
    for key in ("parent", "ancestor"):
        part = getattr(condition, key)
        if part is not None:
            yield from _missing_names(part, (*path, key))
    for key, parts in (("not", condition.not_), ("any", condition.any), ("all", condition.all)):
        for index, part in enumerate(parts):
            yield from _missing_names(part, (*path, key, index))


def _no_name(kind: str, name: str, effect: str, path: Path) -> ValueProblem:
    table = "passwd" if kind == "user" else "group"
    hint = f'create it, or give its number; "getent {table}" lists those that exist'
    return ValueProblem(f'there is no {kind} named "{name}" on this machine now: {effect}', hint=hint, at=path)
