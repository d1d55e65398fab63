"""Matches of a flood that wait until no events wait: bounded, fair, in order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.deferred import Deferred


def add(deferred, rule, match):
    """Add a match if there is room. Return the rule that lost one."""
    loser = deferred.make_room(rule)
    if loser != rule:
        deferred.add(rule, match)
    return loser


def taken(deferred):
    return [deferred.take() for _ in range(len(deferred))]


def test_matches_of_a_rule_leave_in_order():
    deferred = Deferred(10)
    assert [add(deferred, "a", number) for number in range(10)] == [None] * 10
    assert taken(deferred) == list(range(10))


def test_rules_take_turns():
    deferred = Deferred(10)
    for number in range(4):
        add(deferred, "flood", f"flood {number}")
    add(deferred, "quiet", "quiet 0")
    assert taken(deferred) == ["flood 0", "quiet 0", "flood 1", "flood 2", "flood 3"]


def test_a_full_room_refuses_the_newest_of_a_flood():
    deferred = Deferred(3)
    assert [add(deferred, "a", number) for number in range(5)] == [None, None, None, "a", "a"]
    assert taken(deferred) == [0, 1, 2]


def test_a_flood_takes_no_room_from_another_rule():
    deferred = Deferred(4)
    for number in range(4):
        add(deferred, "flood", number)
    assert [add(deferred, "quiet", "first"), add(deferred, "quiet", "second")] == ["flood", "flood"]
    assert add(deferred, "quiet", "third") == "quiet"
    assert Counter(map(type, taken(deferred))) == {int: 2, str: 2}


@given(st.lists(st.sampled_from("aaaabbc"), max_size=60), st.integers(1, 12), st.sampled_from("abcd"))
def test_room_is_what_can_be_added(rules, most, rule):
    deferred: Deferred = Deferred(most)
    for one in rules:
        add(deferred, one, one)
    for _ in range(deferred.room(rule)):
        assert add(deferred, rule, rule) != rule
    assert deferred.room(rule) == 0 or deferred.make_room(rule) != rule


def test_an_empty_room_has_nothing_to_take():
    with pytest.raises(KeyError):
        Deferred(4).take()


@given(st.lists(st.sampled_from("aaaabbc"), max_size=60), st.integers(1, 12))
def test_each_match_leaves_or_is_lost(rules, most):
    deferred, lost = Deferred(most), Counter()
    for rule in rules:
        loser = add(deferred, rule, rule)
        if loser is not None:
            lost[loser] += 1
        assert len(deferred) <= most
    left = Counter(taken(deferred))
    assert left + lost == Counter(rules)
    for rule, count in lost.items():  # it has lost matches, so it has its share
        assert left[rule] + 1 >= most // len(set(rules)) or count == 0
