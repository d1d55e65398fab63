"""Compile a condition into a function of an occurrence, in three-valued logic. PURE.

A predicate returns True, False, or None for unknown. None is not False: `not` of unknown is unknown, so an unknown
attribute never matches by accident, not even negated (Kleene's strong logic). A rule matches only on True.

All patterns are compiled before. A predicate reads attributes and computes; it does no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import translate

from cnprocd.connector.status import core_dumped, exit_code, term_signal
from cnprocd.process.cgroup_path import Placement
from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.ruleset import Condition, ProcessCondition
from cnprocd.rules.values import Comparison, Pattern

Verdict = bool | None
Test = Callable[[Occurrence], Verdict]
ProcessTest = Callable[[Process, "tuple[Process, ...] | None"], Verdict]


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Return True if all are True, False if one is False, else None."""
    result: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            result = None
    return result


def any_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Return True if one is True, False if all are False, else None."""
    result: Verdict = False
    for verdict in verdicts:
        if verdict:
            return True
        if verdict is None:
            result = None
    return result


def negate(verdict: Verdict) -> Verdict:
    return None if verdict is None else not verdict


def text_test(patterns: tuple[Pattern, ...]) -> Callable[[str], bool]:
    """Return the test whether a text matches any of the patterns. Globs match whole, regular expressions anywhere."""
    literals = frozenset(p.text for p in patterns if p.kind == "literal")
    expressions = [translate(p.text) if p.kind == "glob" else p.text for p in patterns if p.kind != "literal"]
    searches = [
        re.compile(e).match if p.kind == "glob" else re.compile(e).search
        for p, e in zip([p for p in patterns if p.kind != "literal"], expressions, strict=True)
    ]
    if not searches:
        return literals.__contains__
    return lambda text: text in literals or any(search(text) is not None for search in searches)


def compile_condition(condition: Condition | None, assume_status: bool = False) -> Test:
    """Return the predicate of a rule's condition; None matches everything.

    With `assume_status`, an unknown exit status counts as a match: for `on_unknown_exit: match`, only the identity of
    the process decides.
    """
    return _compile(condition, True if assume_status else None)


def _compile(condition: Condition | None, unknown: Verdict) -> Test:
    """`unknown` is the result of a key about the exit status if the status is unknown; `not` inverts it."""
    if condition is None:
        return lambda occurrence: True
    tests = [*_identity_tests(condition), *_ending_tests(condition, unknown)]
    tests += [_negated(_compile(part, negate(unknown))) for part in condition.not_]
    tests += [_compile(part, unknown) for part in condition.all]
    if condition.any:
        branches = [_compile(part, unknown) for part in condition.any]
        tests.append(lambda occurrence: any_of(test(occurrence) for test in branches))
    if len(tests) == 1:
        return tests[0]
    return lambda occurrence: all_of(test(occurrence) for test in tests)


def _negated(test: Test) -> Test:
    return lambda occurrence: negate(test(occurrence))


def _identity_tests(condition: Condition) -> list[Test]:
    return [
        lambda occurrence, test=test: test(occurrence.process, occurrence.ancestors)  # type: ignore[misc]
        for test in _process_tests(condition)
    ]


def compile_process(condition: ProcessCondition) -> ProcessTest:
    """Return the predicate of `parent:` and `ancestor:`, for a process and its ancestors, nearest first."""
    tests = _process_tests(condition)
    tests += [_negated_process(compile_process(part)) for part in condition.not_]
    tests += [compile_process(part) for part in condition.all]
    if condition.any:
        branches = [compile_process(part) for part in condition.any]
        tests.append(lambda process, above: any_of(test(process, above) for test in branches))
    return lambda process, above: all_of(test(process, above) for test in tests)


def _negated_process(test: ProcessTest) -> ProcessTest:
    return lambda process, above: negate(test(process, above))


def _process_tests(condition: Condition | ProcessCondition) -> list[ProcessTest]:
    tests: list[ProcessTest] = []
    if condition.exe is not None:
        tests.append(_exe_test(condition.exe))
    if condition.cmdline is not None:
        tests.append(_cmdline_test(condition.cmdline))
    for name in ("comm", "exe_claimed", "cgroup"):
        patterns: tuple[Pattern, ...] | None = getattr(condition, name)
        if patterns is not None:
            tests.append(_attribute_test(name, text_test(patterns)))
    for name, names in _PLACEMENT_KEYS.items():
        patterns = getattr(condition, name)
        if patterns is not None:
            tests.append(_placement_test(text_test(patterns), names))
    if condition.user is not None:
        tests.append(_id_test("uid", condition.user))
    if condition.group is not None:
        tests.append(_id_test("gid", condition.group))
    for name in ("euid", "loginuid"):
        wanted: tuple[int | str, ...] | None = getattr(condition, name)
        if wanted is not None:
            tests.append(_id_test(name, wanted))
    if condition.parent is not None:
        tests.append(_parent_test(compile_process(condition.parent)))
    if condition.ancestor is not None:
        tests.append(_ancestor_test(compile_process(condition.ancestor)))
    return tests


def _id_test(name: str, wanted: tuple[int | str, ...]) -> ProcessTest:
    """Return the test of a user or group. With a name that is not resolved, another id is unknown, not different."""
    ids = frozenset(one for one in wanted if isinstance(one, int))
    otherwise: Verdict = False if len(ids) == len(set(wanted)) else None

    def verdict(process: Process, above: tuple[Process, ...] | None) -> Verdict:
        value = getattr(process, name)
        return None if value is None else value in ids or otherwise

    return verdict


def _attribute_test(name: str, test: Callable[..., bool]) -> ProcessTest:
    def verdict(process: Process, above: tuple[Process, ...] | None) -> Verdict:
        value = getattr(process, name)
        return None if value is None else test(value)

    return verdict


def _exe_test(patterns: tuple[Pattern, ...]) -> ProcessTest:
    """A file that is none of those that rules name is none of these either, whatever its path is."""
    test, only_named = text_test(patterns), all(pattern.kind == "literal" for pattern in patterns)

    def verdict(process: Process, above: tuple[Process, ...] | None) -> Verdict:
        if process.exe is None:
            return False if only_named and process.exe_is_unnamed else None
        return test(process.exe) or (process.image is not None and any(map(test, process.image.links)))

    return verdict


def _cmdline_test(patterns: tuple[Pattern, ...]) -> ProcessTest:
    """Of arguments that are cut only a glob that ends in * is known to hold: whatever follows fits it."""
    test = text_test(patterns)
    open_globs = tuple(pattern for pattern in patterns if pattern.kind == "glob" and pattern.text.endswith("*"))
    holds_anyway = text_test(open_globs)

    def verdict(process: Process, above: tuple[Process, ...] | None) -> Verdict:
        if process.cmdline is None:
            return None
        if process.cmdline_is_cut:
            return True if holds_anyway(process.cmdline) else None
        return test(process.cmdline)

    return verdict


def _placement_test(test: Callable[[str], bool], names: Callable[[Placement], Iterable[str]]) -> ProcessTest:
    """`names`: the texts of a placement any of which may fit; none of them if the process is in no such thing."""

    def verdict(process: Process, above: tuple[Process, ...] | None) -> Verdict:
        placement = process.placement
        return None if placement is None else any(map(test, names(placement)))

    return verdict


_PLACEMENT_KEYS: Mapping[str, Callable[[Placement], Iterable[str]]] = {
    "unit": lambda placement: (placement.unit,) if placement.unit is not None else (),
    "user_unit": lambda placement: (placement.user_unit,) if placement.user_unit is not None else (),
    "pod_uid": lambda placement: (placement.pod_uid,) if placement.pod_uid is not None else (),
    "container": lambda placement: placement.container.names if placement.container is not None else (),
}


def _parent_test(test: ProcessTest) -> ProcessTest:
    def verdict(process: Process, above: tuple[Process, ...] | None) -> Verdict:
        return test(above[0], above[1:]) if above else None

    return verdict


def _ancestor_test(test: ProcessTest) -> ProcessTest:
    def verdict(process: Process, above: tuple[Process, ...] | None) -> Verdict:
        if above is None:
            return None
        known = any_of(test(ancestor, above[i + 1 :]) for i, ancestor in enumerate(above))
        complete = bool(above) and above[-1].ppid == 0  # only PID 1 and kthreadd have parent 0
        return known if known or complete else None

    return verdict


def _ending_tests(condition: Condition, unknown: Verdict) -> list[Test]:
    tests: list[Test] = []
    if condition.exit_code is not None or condition.signal is not None:
        tests.append(_status_test(condition, unknown))
    if condition.core_dumped is not None:
        tests.append(_core_test(condition.core_dumped, unknown))
    if condition.exit_status is not None:
        wants_unknown = condition.exit_status == "unknown"
        tests.append(lambda occurrence: (occurrence.status is None) == wants_unknown)
    if condition.lifetime is not None:
        tests.append(_number_test(condition.lifetime, lambda o: o.lifetime_s))
    if condition.max_rss is not None:
        tests.append(_number_test(condition.max_rss, lambda o: o.usage.max_rss_kib * 1024 if o.usage else None))
    if condition.cpu_time is not None:
        tests.append(_number_test(condition.cpu_time, lambda o: o.usage.cpu_time_us / 1e6 if o.usage else None))
    if condition.oom_killed is not None:
        tests.append(_oom_test(condition.oom_killed))
    # A key about the end of a process does not hold for other events.
    return [lambda o, test=test: test(o) if o.kind == "exit" else False for test in tests]  # type: ignore[misc]


def _status_test(condition: Condition, unknown: Verdict) -> Test:
    codes, signals = condition.exit_code, condition.signal

    def verdict(occurrence: Occurrence) -> Verdict:
        if occurrence.status is None:
            return unknown
        number = term_signal(occurrence.status)
        if number is not None:
            return signals is not None and number in signals
        code = exit_code(occurrence.status)
        return codes is not None and code is not None and code in codes

    return verdict


def _core_test(wanted: bool, unknown: Verdict) -> Test:
    def verdict(occurrence: Occurrence) -> Verdict:
        return unknown if occurrence.status is None else core_dumped(occurrence.status) == wanted

    return verdict


def _oom_test(wanted: bool) -> Test:
    return lambda occurrence: None if occurrence.oom_killed is None else occurrence.oom_killed is wanted


def _number_test(comparison: Comparison, measure: Callable[[Occurrence], float | None]) -> Test:
    def verdict(occurrence: Occurrence) -> Verdict:
        value = measure(occurrence)
        return None if value is None else comparison.holds(value)

    return verdict
