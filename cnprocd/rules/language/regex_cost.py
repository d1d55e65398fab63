"""Estimate what a regular expression can cost: the number of ways in which it can read one text. PURE.

Python's `re` backtracks through one way after another, and any process can choose the text. An expression with 10^9
ways, on a text that matches none of them, would block the daemon for hours. So the ways are counted when the rules are
loaded, for the longest possible text, and an expression with too many is rejected. An accepted expression takes
milliseconds for the worst text. Globs need no bound: fnmatch makes every `*` an atomic group, so the cost of a glob is
at most the length of the text times the number of its stars.

The count is an upper bound. It assumes that every part that can match in more than one way does so independently of
its neighbours. Repetitions multiply and alternatives add up; alternatives that begin with different characters count as
one way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants, _parser  # type: ignore[attr-defined]  # stable since 3.11; there is no public parser
from typing import Any

MOST_WAYS = 1 << 25  # one way takes a few to a hundred nanoseconds: under a second for the worst text
_BEYOND = MOST_WAYS + 1  # counting stops here

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
_ATOMIC = getattr(_constants, "ATOMIC_GROUP", None)
_POSSESSIVE = getattr(_constants, "POSSESSIVE_REPEAT", None)
_AT_START = (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING)


def regex_cost(expression: str, longest: int) -> int:
    """Return an upper bound of the ways to search a text of `longest` characters; at most MOST_WAYS + 1."""
    parsed = _parser.parse(expression)
    items = list(parsed)
    anchored = bool(items) and items[0][0] is _constants.AT and items[0][1] in _AT_START
    anchored = anchored and not parsed.state.flags & re.MULTILINE
    starts = 1 if anchored else longest + 1
    return _capped(starts * _sequence(items, longest))


def _capped(count: int) -> int:
    return min(count, _BEYOND)


def _sequence(items: Iterable[tuple[Any, Any]], longest: int) -> int:
    product = 1
    for item in items:
        product = _capped(product * _item(item, longest))
    return product


def _item(item: tuple[Any, Any], longest: int) -> int:
    kind, detail = item
    if kind in _REPEATS or kind is _POSSESSIVE:
        least, most, body = detail
        # A possessive repetition does not backtrack, but its body is tried in every way before.
        return _repeat(int(least), min(int(most), longest), list(body), longest)
    if kind is _constants.SUBPATTERN:
        return _sequence(detail[-1], longest)
    if kind is _constants.BRANCH:
        return _branch([list(one) for one in detail[1]], longest)
    if kind in (_constants.ASSERT, _constants.ASSERT_NOT):
        return _sequence(detail[1], longest)
    if kind is _ATOMIC:
        return _sequence(detail, longest)
    if kind is _constants.GROUPREF_EXISTS:
        return _capped(sum(_sequence(one or (), longest) for one in detail[1:]))
    return 1  # one character or none: LITERAL, NOT_LITERAL, ANY, IN, AT, GROUPREF


def _repeat(least: int, most: int, body: list[tuple[Any, Any]], longest: int) -> int:
    each = _sequence(body, longest)
    if each == 1:
        return _capped(max(most - least, 0) + 1)
    total, power = 0, 1
    for times in range(most + 1):
        if times >= least:
            total += power
        power = _capped(power * each)
        if total >= _BEYOND or (power >= _BEYOND and most > times):
            return _BEYOND
    return _capped(max(total, 1))


def _branch(branches: list[list[tuple[Any, Any]]], longest: int) -> int:
    counts = [_sequence(one, longest) for one in branches]
    first = [one[0][1] if one and one[0][0] is _constants.LITERAL else None for one in branches]
    folded = [chr(character).casefold() for character in first if character is not None]
    if len(set(folded)) == len(branches):
        return max(counts)
    return _capped(sum(counts))
