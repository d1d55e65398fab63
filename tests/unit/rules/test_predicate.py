"""Three-valued logic, compared with another form of the same logic (trees.py), over random trees and partial
occurrences.

Then the property behind it, without an oracle: an unknown attribute can only turn an answer into "unknown", never into
the other answer, so nothing matches by accident.
"""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.rules.trees import (
    COMMS,
    ENDING_KEYS,
    IDENTITY_KEYS,
    STATUSES,
    hide,
    hidings,
    match_data,
    model,
    occurrences,
    verdict,
)

from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.predicate import all_of, any_of, compile_condition, negate, text_test
from cnprocd.rules.values import Pattern

VERDICTS = (True, None, False)


def without_status_key(data) -> bool:
    """Return whether `exit_status` occurs nowhere: that key knows an unknown status, and nothing is assumed."""
    branches = [*data.get("all", []), *data.get("any", []), *data.get("not", [])]
    return "exit_status" not in data and all(map(without_status_key, branches))


def test_the_connectives_are_kleene_s():
    rank = {True: 1, None: 0.5, False: 0}
    for pair in product(VERDICTS, VERDICTS):
        assert rank[all_of(pair)] == min(map(rank.get, pair))
        assert rank[any_of(pair)] == max(map(rank.get, pair))
    for one in VERDICTS:
        assert rank[negate(one)] == 1 - rank[one]
    assert all_of([]) is True
    assert any_of([]) is False


@pytest.mark.parametrize("key", sorted(IDENTITY_KEYS | ENDING_KEYS))
@given(data=st.data(), happened=st.lists(occurrences, min_size=4, max_size=8))
@settings(max_examples=25)
def test_each_key_alone_means_what_it_says(key, data, happened):
    tree = {key: data.draw((IDENTITY_KEYS | ENDING_KEYS)[key])}
    test = compile_condition(model(tree))
    for occurrence in happened:
        assert test(occurrence) is verdict(tree, occurrence), occurrence


@given(match_data, st.lists(occurrences, min_size=1, max_size=4))
@settings(max_examples=150)
def test_a_tree_means_what_it_says(data, happened):
    test = compile_condition(model(data))
    for occurrence in happened:
        assert test(occurrence) is verdict(data, occurrence), occurrence


@given(match_data, st.lists(st.tuples(occurrences, hidings), min_size=1, max_size=4))
@settings(max_examples=150)
def test_an_unknown_attribute_never_inverts_an_answer(data, happened):
    """True or False with few attributes stays so with more: under not, any and all, of parents and of itself."""
    test = compile_condition(model(data))
    keep = frozenset() if without_status_key(data) else {"status"}
    for occurrence, (hidden, in_parents) in happened:
        poorer = test(hide(occurrence, (hidden - keep, in_parents)))
        assert poorer is None or poorer is test(occurrence)


@pytest.mark.parametrize("key", ["comm", "exe", "cmdline", "cgroup", "unit"])
@pytest.mark.parametrize("wrap", [dict, lambda m: {"not": m}, lambda m: {"any": [m]}, lambda m: {"all": [m, m]}])
def test_an_unknown_text_never_matches_not_even_anything(key, wrap):
    test = compile_condition(model(wrap({key: "*"})))
    assert test(Occurrence("exit", Process(100), 100, 0)) is None


def test_without_a_match_everything_matches():
    assert compile_condition(None)(Occurrence("fork", Process(1), 1)) is True


def test_a_key_about_an_exit_does_not_hold_for_other_events():
    exec_ = Occurrence("exec", Process(100, comm="sh"), 100)
    assert compile_condition(model({"comm": "sh", "exit_code": "0-255"}))(exec_) is False
    assert compile_condition(model({"exit_status": "unknown"}))(exec_) is False
    assert compile_condition(model({"comm": "sh", "not": {"signal": "any"}}))(exec_) is True


def test_a_process_without_a_unit_has_none_of_that_name():
    in_a_slice = Occurrence("exec", Process(100, cgroup="/user.slice"), 100)
    assert compile_condition(model({"unit": "*"}))(in_a_slice) is False
    assert compile_condition(model({"not": {"unit": "*"}}))(in_a_slice) is True


def test_the_chain_of_ancestors_ends_where_a_parent_is_0():
    """Only then is it known that there are no more ancestors."""
    up = (Process(60, ppid=1, comm="sh"), Process(1, ppid=0, comm="systemd"))
    test = compile_condition(model({"ancestor": {"comm": "java"}}))
    assert test(Occurrence("exec", Process(100, 60), 100, ancestors=up)) is False
    assert test(Occurrence("exec", Process(100, 60), 100, ancestors=up[:1])) is None
    assert test(Occurrence("exec", Process(100, 60), 100, ancestors=None)) is None


def test_relations_can_be_nested():
    up = (Process(70, 60, comm="c"), Process(60, 1, comm="b"), Process(1, 0, comm="a"))
    of = Occurrence("exec", Process(100, 70), 100, ancestors=up)
    for tree, holds in (
        ({"parent": {"comm": "c", "parent": {"comm": "b", "parent": {"comm": "a"}}}}, True),
        ({"parent": {"parent": {"comm": "c"}}}, False),
        ({"ancestor": {"comm": "b", "parent": {"comm": "a"}}}, True),
        ({"ancestor": {"comm": "b", "parent": {"comm": "c"}}}, False),
        ({"ancestor": {"comm": "b", "ancestor": {"comm": "b"}}}, False),
        ({"parent": {"comm": "c", "ancestor": {"comm": "a"}}}, True),
    ):
        assert compile_condition(model(tree))(of) is holds, tree


# --- a status that is unknown, taken for whatever a rule wants


@given(match_data.filter(without_status_key), occurrences)
@settings(max_examples=150)
def test_an_unknown_status_is_assumed_to_be_one_that_matches(data, occurrence):
    """If any status would match, the unknown one does, also under `not`. Identity keys decide as usual."""
    assumed = compile_condition(model(data), assume_status=True)
    test = compile_condition(model(data))
    vanished = replace(occurrence, kind="exit", status=None)
    if any(test(replace(vanished, status=status)) for status in STATUSES):
        assert assumed(vanished) is True
    assert assumed(replace(vanished, status=256)) is test(replace(vanished, status=256))


@pytest.mark.parametrize(
    ("match", "fires"),
    [
        ({"exit_code": 3}, True),
        ({"not": {"exit_code": 3}}, True),
        ({"comm": "sh", "not": {"signal": "SIGTERM"}}, True),
        ({"not": {"not": {"signal": "SIGTERM"}}}, True),
        ({"any": [{"core_dumped": True}, {"comm": "java"}]}, True),
        ({"comm": "java", "exit_code": 3}, False),
        ({"not": {"comm": "sh"}, "exit_code": 3}, False),
        ({"not": {"any": [{"comm": "sh"}, {"exit_code": 3}]}}, False),
        ({"exit_code": 3, "exit_status": "known"}, False),
        ({"exe": "/bin/sh", "exit_code": 3}, None),
    ],
)
def test_a_vanished_process_and_on_unknown_exit_match(match, fires):
    vanished = Occurrence("exit", Process(100, comm="sh"), 100, recovered=True)
    assert compile_condition(model(match), assume_status=True)(vanished) is fires


# --- text


@given(st.lists(st.sampled_from([("literal", "sh"), ("glob", "o*A"), ("regex", "mon"), ("glob", "*")]), max_size=4))
def test_a_list_of_patterns_means_any_of_them(kinds):
    test = text_test(tuple(Pattern(*kind) for kind in kinds))
    alone = [text_test((Pattern(*kind),)) for kind in kinds]
    for comm in COMMS:
        assert test(comm) == any(one(comm) for one in alone)


@pytest.mark.parametrize(
    ("pattern", "value", "same"),
    [
        (Pattern("literal", "a*"), "ab", False),
        (Pattern("literal", "sh"), "sh\n", False),
        (Pattern("glob", "sh*"), "sh\nx", True),
        (Pattern("glob", "a?c"), "a\nc", True),
        (Pattern("glob", "S*"), "sh", False),
        (Pattern("glob", "s"), "sh", False),
        (Pattern("regex", "h"), "sh", True),
        (Pattern("regex", "^h"), "sh", False),
        (Pattern("glob", "[!a-z]*"), "\udcff", True),
    ],
)
def test_texts_and_patterns(pattern, value, same):
    assert text_test((pattern,))(value) is same
