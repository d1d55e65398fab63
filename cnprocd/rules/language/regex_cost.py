"""How many ways a regular expression may have to read one text: what it can cost before it says no. PURE.

Python's `re` tries one way after the other, and the texts are chosen by whoever runs a process: an expression with
thousands of millions of ways, met by the text that fails last, would hold the daemon for hours. So the ways are counted
when the rules are loaded, for the longest text there can be, and an expression with too many is refused. What is left
costs milliseconds for the worst text. Globs need no such bound: fnmatch gives every `*` in them one try (an atomic
group), so their cost grows with the text and no faster than that text's length times the number of their stars.

The count is an upper bound: everything that can match in more than one way is taken to be free to do so, everywhere,
independently of what stands beside it. Repeats multiply, alternatives add up; only alternatives that begin with
different characters cannot be two ways for one text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants, _parser  # type: ignore[attr-defined]  # stable since 3.11; there is no public parser
from typing import Any

MOST_WAYS = 1 << 25  # one way is a few nanoseconds to a hundred: under a second in all for the worst of texts
_BEYOND = MOST_WAYS + 1  # counts end here: what is too much need not be told how much

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
_ATOMIC = getattr(_constants, "ATOMIC_GROUP", None)
_POSSESSIVE = getattr(_constants, "POSSESSIVE_REPEAT", None)
_AT_START = (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING)


def ways(expression: str, longest: int) -> int:
    """An upper bound of the ways in which a search may try a text of `longest` characters; at most MOST_WAYS + 1."""
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
    sort, detail = item
    if sort in _REPEATS or sort is _POSSESSIVE:
        least, most, body = detail
        # A possessive repeat is not taken up again, but its body is tried in every way on the way there.
        return _repeat(int(least), min(int(most), longest), list(body), longest)
    if sort is _constants.SUBPATTERN:
        return _sequence(detail[-1], longest)
    if sort is _constants.BRANCH:
        return _branch([list(one) for one in detail[1]], longest)
    if sort in (_constants.ASSERT, _constants.ASSERT_NOT):
        return _sequence(detail[1], longest)
    if sort is _ATOMIC:
        return _sequence(detail, longest)
    if sort is _constants.GROUPREF_EXISTS:
        return _capped(sum(_sequence(one or (), longest) for one in detail[1:]))
    return 1  # one character, or none: LITERAL, NOT_LITERAL, ANY, IN, AT, GROUPREF


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
