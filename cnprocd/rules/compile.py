"""Compile rules into a matcher: an index by event and comm, and a predicate per rule. No rule text is parsed per event.
PURE.

The index returns the candidate rules by the kind of an event and the comm of its process. A literal comm is a
dictionary entry. A glob is filed under the literal text before its first wildcard, so an unseen comm costs at most 16
look-ups for any number of rules. Regular expressions and rules without comm are always candidates. The candidates of a
comm are cached, because a machine runs few programs many times: then ten thousand rules cost as much as one. The cache
is bounded, because a process can rename itself in a loop.

A rule matches either processes or, with `threads: true`, threads; never both, so one exit is one match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from cnprocd.connector.status import ALL_SIGNALS, EVERY_STATUS, FAILURES, NO_STATUS, StatusSet
from cnprocd.process.model import Kind, Occurrence
from cnprocd.process.oom import SIGKILL
from cnprocd.rules.needs import Need, Needs, exe_directories, literal_exe_paths, needs_of
from cnprocd.rules.predicate import Test, compile_condition, text_test
from cnprocd.rules.ruleset import EXIT_EVENTS, Condition, EventName, Rule
from cnprocd.rules.values import Pattern

_REMEMBERED_COMMS = 4096


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule with its predicates. `statuses` is a superset of the wait statuses that it can match."""

    rule: Rule
    order: int
    kinds: frozenset[Kind]
    any_exit: bool  # its events include `exit`, so it can match a success
    test: Test
    test_unknown: Test  # the same, but an unknown status counts as a match
    comm: tuple[Pattern, ...] | None  # the patterns of comm, if every match of the rule needs one of them
    needs: Needs
    statuses: StatusSet
    name: str
    match_needs: frozenset[Need]  # those that decide whether the rule matches
    record_needs: tuple[Need, ...]  # those that a match may lack: without comm if the rule asks for it

    @property
    def exe_paths(self) -> frozenset[str]:
        """The paths that the rule compares `exe` with."""
        return literal_exe_paths(self.rule.match)


class Match(NamedTuple):
    """A rule and an occurrence that satisfy each other. `event` is the event's name in the rule language.

    `log_only`: the exit status is unknown and the rule says `on_unknown_exit: log`, so its hook does not run.
    """

    rule: CompiledRule
    occurrence: Occurrence
    event: EventName
    log_only: bool = False

    @property
    def runs_hook(self) -> bool:
        """Whether this match runs a hook."""
        return self.rule.rule.run is not None and not self.log_only


def compile_rule(rule: Rule, order: int) -> CompiledRule:
    """Return a compiled rule. `order` is its position among the rules."""
    exits = not EXIT_EVENTS.isdisjoint(rule.events)
    needs = needs_of(rule)
    match_needs = frozenset(need for need, lines in needs.items() if any(line.startswith("match.") for line in lines))
    kinds: set[Kind] = {event for event in rule.events if event != "nonzero_exit"}
    base = EVERY_STATUS if "exit" in rule.events else FAILURES
    return CompiledRule(
        rule=rule,
        order=order,
        kinds=frozenset(kinds | {"exit"} if exits else kinds),
        any_exit="exit" in rule.events,
        test=compile_condition(rule.match),
        test_unknown=compile_condition(rule.match, assume_status=True),
        comm=_required_comm(rule.match),
        needs=needs,
        statuses=base & possible_statuses(rule.match) if exits else NO_STATUS,
        name=rule.name,
        match_needs=match_needs,
        record_needs=tuple(need for need in needs if need != "comm" or need not in match_needs),
    )


def possible_statuses(condition: Condition | None) -> StatusSet:
    """Return a superset of the wait statuses for which `condition` can hold. The kernel may filter out all others."""
    if condition is None:
        return EVERY_STATUS
    result = EVERY_STATUS
    if condition.exit_code is not None or condition.signal is not None:
        codes = condition.exit_code.ranges if condition.exit_code is not None else ()
        result = StatusSet.of(codes, condition.signal or ())
    if condition.core_dumped:
        result &= StatusSet((), ALL_SIGNALS)
    if condition.oom_killed:
        result &= StatusSet((), frozenset({SIGKILL}))
    if condition.exit_status == "unknown":
        result = NO_STATUS
    for part in condition.all:
        result &= possible_statuses(part)
    if condition.any:
        branches = NO_STATUS
        for part in condition.any:
            branches |= possible_statuses(part)
        result &= branches
    return result


def _required_comm(condition: Condition | None) -> tuple[Pattern, ...] | None:
    if condition is None:
        return None
    if condition.comm is not None:
        return condition.comm
    return next((comm for comm in map(_required_comm, condition.all) if comm is not None), None)


class Matcher:
    """An index of all enabled rules. Immutable except for its cache of comms: a reload makes a new one."""

    def __init__(self, rules: Iterable[Rule | CompiledRule]) -> None:
        """`rules`, in file order; those that are compiled already have their place in it."""
        compiled = (one if isinstance(one, CompiledRule) else compile_rule(one, at) for at, one in enumerate(rules))
        self.rules = tuple(one for one in compiled if one.rule.enabled)
        self.undecided: list[CompiledRule] = []  # rules that an unknown attribute decided; the caller takes them
        asking = [rule for rule in self.rules if "comm" in rule.match_needs and not rule.rule.threads]
        self.asks_for_comm: frozenset[Kind] = frozenset().union(*(rule.kinds for rule in asking))
        self.asks_for_oom = any("oom" in rule.match_needs for rule in self.rules)
        self._indices = {
            (kind, threads): _CommIndex([r for r in self.rules if kind in r.kinds and r.rule.threads is threads])
            for kind in {kind for rule in self.rules for kind in rule.kinds}
            for threads in (False, True)
        }

    def and_other(self, other: Matcher) -> Matcher:
        """Return a matcher of the rules of both: its plan serves either."""
        return Matcher(replace(one, order=at) for at, one in enumerate((*self.rules, *other.rules)))

    @property
    def exe_paths(self) -> frozenset[str]:
        """The paths that rules compare `exe` with."""
        return frozenset().union(*(rule.exe_paths for rule in self.rules))

    @property
    def exe_directories(self) -> frozenset[str] | None:
        """Where rules look for programs; None if none of them needs the path of any other program."""
        if not any("exe" in rule.needs for rule in self.rules):
            return None
        return frozenset().union(*(exe_directories(rule.rule.match) for rule in self.rules))

    def wants(self, kind: Kind, threads: bool) -> bool:
        """Return whether any rule has this kind of event, of processes or of threads."""
        index = self._indices.get((kind, threads))
        return index is not None and index.used

    def cares(self, kind: Kind, of_thread: bool, comm: str | None, status: int | None = None) -> bool:
        """Return whether any rule could match such an event. An unknown comm always could.

        `status`: the wait status of an exit, if it is known.
        """
        index = self._indices.get((kind, of_thread))
        if index is None or comm is None:
            return index is not None
        found = index.remembered.get(comm)
        if found is None:
            found = index.find(comm)
        return any(rule.any_exit for rule in found) if status == 0 else bool(found)

    def candidates(self, occurrence: Occurrence) -> tuple[CompiledRule, ...]:
        """Return the rules whose events and comm fit, in file order."""
        return self.asking(occurrence.kind, occurrence.process.comm, occurrence.of_thread)

    def asking(self, kind: Kind, comm: str | None, of_thread: bool = False) -> tuple[CompiledRule, ...]:
        """Return the rules that ask for events of this kind and comm, in file order."""
        index = self._indices.get((kind, of_thread))
        return index.find(comm) if index is not None else ()

    def match(self, occurrence: Occurrence) -> list[Match]:
        """Return the matches of all rules, in file order."""
        matches = []
        for compiled in self.candidates(occurrence):
            if occurrence.from_hook and not compiled.rule.include_hooks:
                continue
            match = evaluate(compiled, occurrence)
            if match:
                matches.append(match)
            elif match is None:
                self.undecided.append(compiled)
        return matches


def evaluate(compiled: CompiledRule, occurrence: Occurrence) -> Match | Literal[False] | None:
    """Return the match of one rule with one occurrence of its kind; None if an unknown attribute decides."""
    status = occurrence.status
    if occurrence.kind != "exit":
        event: EventName = occurrence.kind
    elif status is not None:
        if status == 0 and not compiled.any_exit:
            return False
        event = "nonzero_exit" if status != 0 and "nonzero_exit" in compiled.rule.events else "exit"
    else:
        return _evaluate_unknown_exit(compiled, occurrence)
    verdict = compiled.test(occurrence)
    return Match(compiled, occurrence, event) if verdict else verdict


def _evaluate_unknown_exit(compiled: CompiledRule, occurrence: Occurrence) -> Match | Literal[False] | None:
    if compiled.any_exit and compiled.test(occurrence):
        return Match(compiled, occurrence, "exit")  # an exit of unknown status is an exit all the same
    policy = compiled.rule.on_unknown_exit
    if policy == "ignore":
        return False
    verdict = compiled.test_unknown(occurrence)
    if not verdict:
        return verdict
    return Match(compiled, occurrence, "exit" if compiled.any_exit else "nonzero_exit", log_only=policy == "log")


class _CommIndex:
    """The rules of one kind of event, by comm."""

    def __init__(self, rules: list[CompiledRule]) -> None:
        self.used = bool(rules)
        self._literal: dict[str, list[CompiledRule]] = {}
        self._prefix: dict[str, list[tuple[CompiledRule, Callable[[str], bool]]]] = {}
        self._always: list[tuple[CompiledRule, Callable[[str], bool] | None]] = []
        self._without_comm = tuple(rule for rule in rules if rule.comm is None)
        self.remembered: dict[str, tuple[CompiledRule, ...]] = {}
        for rule in rules:
            self._file(rule)
        self._lengths = sorted(map(len, self._prefix))

    def _file(self, rule: CompiledRule) -> None:
        if rule.comm is None:
            self._always.append((rule, None))
            return
        for pattern in rule.comm:
            if pattern.kind == "literal":
                self._literal.setdefault(pattern.text, []).append(rule)
            elif pattern.kind == "glob":
                prefix = re.split(r"[*?\[]", pattern.text, maxsplit=1)[0]
                self._prefix.setdefault(prefix, []).append((rule, text_test((pattern,))))
            else:
                self._always.append((rule, text_test((pattern,))))

    def find(self, comm: str | None) -> tuple[CompiledRule, ...]:
        """Return the rules that could match a process of this comm. An unknown comm fits only rules without comm."""
        if comm is None:
            return self._without_comm
        found = self.remembered.get(comm)
        if found is None:
            found = self._look_up(comm)
            if len(self.remembered) >= _REMEMBERED_COMMS:
                self.remembered.clear()
            self.remembered[comm] = found
        return found

    def _look_up(self, comm: str) -> tuple[CompiledRule, ...]:
        found = {rule.order: rule for rule in self._literal.get(comm, ())}
        for length in self._lengths:
            if length > len(comm):
                break
            for rule, test in self._prefix.get(comm[:length], ()):
                if test(comm):
                    found[rule.order] = rule
        for rule, always in self._always:
            if always is None or always(comm):
                found[rule.order] = rule
        return tuple(found[order] for order in sorted(found))
