"""The matches of a flood that are reported later, when no events wait. PURE.

To report a match costs ten times what its event costs. So in a flood matches without a hook wait here, and a burst that
ends is reported whole. The room is bounded, and fair: when it is full, the rule with the most matches in it gets no
further one, so a rule that floods takes no room from another. Rules take turns to leave.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

MOST_DEFERRED = 10_000  # about 1.5 KB each

_T = TypeVar("_T")


class Deferred(Generic[_T]):
    """At most MOST_DEFERRED matches, by rule."""

    def __init__(self, most: int = MOST_DEFERRED) -> None:
        self._most = most
        self._count = 0
        self._by_rule: OrderedDict[str, deque[_T]] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def make_room(self, rule: str) -> str | None:
        """Make room for a match of this rule, before it is made. Return the rule that loses a match, or None.

        If it is this rule, there is no room for the new one. Else its newest match is removed.
        """
        loser = self._loser(rule) if self._count >= self._most else None
        if loser is not None and loser != rule:
            self._pop(loser, newest=True)
        return loser

    def room(self, rule: str) -> int:
        """Return for how many more matches of this rule there is room. It may be more if others have to leave."""
        return self._most - self._count if self._count < self._most else int(self._loser(rule) != rule)

    def add(self, rule: str, match: _T) -> None:
        """Keep a match for later. There must be room."""
        self._by_rule.setdefault(rule, deque()).append(match)
        self._count += 1

    def take(self) -> _T:
        """Return the oldest match of the rule whose turn it is. Raise KeyError if there is none."""
        rule = next(iter(self._by_rule), None)
        if rule is None:
            raise KeyError("no match is deferred")
        self._by_rule.move_to_end(rule)
        return self._pop(rule)

    def _loser(self, rule: str) -> str:
        """Return the rule with the most matches. A flood asks 30,000 times a second, and needs no search."""
        has = len(self._by_rule.get(rule, ()))
        if has * len(self._by_rule) >= self._most:
            return rule
        heaviest = max(self._by_rule, key=lambda name: len(self._by_rule[name]))
        return rule if has >= len(self._by_rule[heaviest]) else heaviest

    def _pop(self, rule: str, newest: bool = False) -> _T:
        waiting = self._by_rule[rule]
        match = waiting.pop() if newest else waiting.popleft()
        if not waiting:
            del self._by_rule[rule]
        self._count -= 1
        return match
