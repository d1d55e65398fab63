"""Why a rule can never match: keys that contradict each other, and patterns that no value satisfies. PURE."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from fnmatch import translate
from re import _parser  # type: ignore[attr-defined]  # as in regex_cost.py

from cnprocd.connector.status import NO_STATUS
from cnprocd.rules.compile import compile_rule
from cnprocd.rules.language.names import COMM_BYTES
from cnprocd.rules.language.overlap import PATTERN_KEYS
from cnprocd.rules.predicate import text_test
from cnprocd.rules.ruleset import ID_KEYS, Condition, Rule, given_keys
from cnprocd.rules.values import Pattern

_KEYS_HINT = "all keys of one mapping must hold; use an any: list for alternatives"
_EMPTY_RANGE = "(?!)"  # what fnmatch.translate() makes of [z-a]; it escapes this text itself
_UNTIDY = re.compile(r"//|/\.\.?(?:/|$)")


def contradictions(rule: Rule) -> Iterator[tuple[str | None, str, str]]:
    """Yield the contradictory keys of a match, or None for its whole, with a message and a hint."""
    condition = rule.match
    if condition is None:
        return
    compiled = compile_rule(rule, 0)
    if compiled.kinds == {"exit"} and compiled.statuses == NO_STATUS and not _mentions_unknown(condition):
        yield None, "no exit status satisfies this match: the rule never acts", _KEYS_HINT
        return
    for key in (*PATTERN_KEYS, *ID_KEYS):
        if _impossible_ids(condition, key) if key in ID_KEYS else _impossible_texts(condition, key):
            yield key, f"no {key} satisfies this match: the rule never acts", _KEYS_HINT


def _mentions_unknown(condition: Condition) -> bool:
    return condition.exit_status == "unknown" or any(map(_mentions_unknown, (*condition.any, *condition.all)))


def _impossible_texts(condition: Condition, key: str) -> bool:
    """Return whether a `not` or an `all` beside `key` rejects every literal that `key` accepts."""
    patterns: tuple[Pattern, ...] | None = getattr(condition, key)
    if patterns is None:
        return False
    if set(patterns) <= _refused(condition, key):
        return True
    if any(pattern.kind != "literal" for pattern in patterns):
        return False
    rejected = [text_test(getattr(part, key)) for part in condition.not_ if given_keys(part) == (key,)]
    required = [text_test(getattr(part, key)) for part in condition.all if getattr(part, key) is not None]
    return all(
        any(test(pattern.text) for test in rejected) or not all(test(pattern.text) for test in required)
        for pattern in patterns
    )


def _impossible_ids(condition: Condition, key: str) -> bool:
    """Return whether a `not` or an `all` beside `key` rejects each of its ids. A name without an id may be any."""
    wanted: tuple[int | str, ...] | None = getattr(condition, key)
    if wanted is None:
        return False
    left = set(wanted) - _refused(condition, key)
    for part in condition.all:
        required = getattr(part, key)
        if required is not None and all(isinstance(one, int) for one in (*left, *required)):
            left &= set(required)
    return not left


def _refused(condition: Condition, key: str) -> set[Pattern | int | str]:
    return {one for part in condition.not_ if given_keys(part) == (key,) for one in getattr(part, key)}


def without_values(key: str, pattern: Pattern) -> tuple[str, str] | None:
    """Return why no value of `key` satisfies a pattern, and a hint; None if one may."""
    text = pattern.text
    if pattern.kind == "glob" and _EMPTY_RANGE in translate(text):
        return "a range in it is empty", "write the lower end of a range first: [a-z]"
    if key == "comm" and pattern.kind == "regex" and _parser.parse(text).getwidth()[0] > COMM_BYTES:
        return f"it needs more than {COMM_BYTES} bytes, where the kernel cuts comm", "shorten it, or match on exe"
    if key not in ("exe", "cgroup") or pattern.kind == "regex":
        return None
    if text[0] not in "/*?[":
        return 'it is a path, which begins with "/"', f'write "/{text}" or "*/{text}"'
    if pattern.kind == "literal" and _UNTIDY.search(text):
        return 'the kernel shows paths without "//", "/./" and "/../"', f'write "{_tidy(text)}"'
    return None


def _tidy(path: str) -> str:
    return "/" + posixpath.normpath(path).lstrip("/")
