"""Which rules have the same match, and which matches everything that another one matches. PURE.

Each rule is compared with the few that can have such a relation to it, so thousands of rules take seconds, not minutes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from cnprocd.rules.predicate import text_test
from cnprocd.rules.ruleset import Condition, Rule, given_keys
from cnprocd.rules.values import IntSet, Pattern

PATTERN_KEYS = ("comm", "exe", "cmdline", "cgroup", "unit", "user_unit", "container", "pod_uid")
_ENDING = frozenset(("exit_code", "signal"))


class Overlaps:
    """The relations between rules, all of them enabled."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._first: dict[Hashable, Rule] = {}
        self._tests: dict[tuple[Pattern, ...], Callable[[str], bool]] = {}
        # A rule with patterns for a key covers only rules whose first pattern for that key is one of them, or, if some
        # of them are globs or expressions, a literal that these accept.
        self._with: defaultdict[tuple[str, Pattern], list[int]] = defaultdict(list)
        self._with_globs: defaultdict[str, list[int]] = defaultdict(list)
        self._without: list[int] = []
        self._rules = rules
        for number, rule in enumerate(rules):
            self._first.setdefault(_identity(rule), rule)
            if rule.run is not None:
                self._index(number, rule)

    def twin_of(self, rule: Rule) -> Rule | None:
        """Return the first rule that acts on the same matches, if it is another one."""
        first = self._first[_identity(rule)]
        return None if first is rule else first

    def wider_than(self, rule: Rule) -> Rule | None:
        """Return the first other rule with a hook that matches everything that this one matches, if there is one."""
        candidates = (self._rules[number] for number in sorted({*self._candidates(rule)}))
        return next((one for one in candidates if one is not rule and self._covers(one, rule)), None)

    def _index(self, number: int, rule: Rule) -> None:
        key, patterns = next(_patterns(rule), (None, ()))
        if key is None:
            self._without.append(number)
            return
        for pattern in patterns:
            self._with[key, pattern].append(number)
        if any(pattern.kind != "literal" for pattern in patterns):
            self._with_globs[key].append(number)

    def _candidates(self, rule: Rule) -> Iterator[int]:
        yield from self._without
        for key, patterns in _patterns(rule):
            yield from self._with.get((key, patterns[0]), ())
            if patterns[0].kind == "literal":
                yield from self._with_globs.get(key, ())

    def _covers(self, wide: Rule, narrow: Rule) -> bool:
        if wide.threads is not narrow.threads or not _events(narrow) <= _events(wide):
            return False
        return wide.match is None or (narrow.match is not None and self._covers_condition(wide.match, narrow.match))

    def _covers_condition(self, wide: Condition, narrow: Condition) -> bool:
        """Return whether `narrow` has every key of `wide` and accepts no more in it."""
        keys, narrow_keys = frozenset(given_keys(wide)), frozenset(given_keys(narrow))
        if not keys - _ENDING <= narrow_keys:
            return False
        if not all(self._accepts_no_more(getattr(wide, key), getattr(narrow, key)) for key in keys - _ENDING):
            return False
        if not keys & _ENDING:
            return True
        if not narrow_keys & _ENDING:
            return False
        return _codes(narrow) <= _codes(wide) and (narrow.signal or frozenset()) <= (wide.signal or frozenset())

    def _accepts_no_more(self, wide: Any, narrow: Any) -> bool:  # noqa: ANN401  # values of any key of the rule language
        if wide == narrow:
            return True
        if not (isinstance(wide, tuple) and isinstance(narrow, tuple) and wide and narrow):
            return False
        if not isinstance(wide[0], Pattern):
            return set(narrow) <= set(wide)
        if wide not in self._tests:
            self._tests[wide] = text_test(wide)
        test = self._tests[wide]
        return all(one in wide or (one.kind == "literal" and test(one.text)) for one in narrow)


def _identity(rule: Rule) -> Hashable:
    """Return what is equal for rules that act on the same matches. One may act at the n-th only, as an escalation."""
    return (frozenset(rule.events), rule.threads, rule.match, rule.after, rule.resets_s)


def _patterns(rule: Rule) -> Iterator[tuple[str, tuple[Pattern, ...]]]:
    """Yield the keys of a match that have patterns for a text."""
    for key in PATTERN_KEYS if rule.match is not None else ():
        patterns: tuple[Pattern, ...] | None = getattr(rule.match, key)
        if patterns:
            yield key, patterns


def _events(rule: Rule) -> set[str]:
    return {*rule.events, *(("nonzero_exit",) if "exit" in rule.events else ())}


def _codes(condition: Condition) -> set[int]:
    ranges = condition.exit_code.ranges if isinstance(condition.exit_code, IntSet) else ()
    return {code for low, high in ranges for code in range(low, high + 1)}
