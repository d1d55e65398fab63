"""Which regular expressions are refused because an unlucky text could hold the daemon, and that the rest is cheap."""

import re
from fnmatch import translate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.rules.language import names
from cnprocd.rules.language.regex_cost import MOST_WAYS, regex_cost
from cnprocd.rules.language.value_problem import InvalidValueError

REFUSED = [
    "(a+)+$",
    "(a*)*$",
    "(a|a)*$",
    "(a|ab)+$",
    "(.|.)*x",
    "([a-z]+)*!",
    "(/[a-z]+)+$",
    "(a?){30}a{30}",
    "(?:a{1,30}){1,30}b",
    "(?=(a+)+$)",
    "(?>(a+)+)b",
    "(?:(?:a|b|ab){1,99})*c",
    "a.*b.*c",
    ".*.*.*=.*",
    r"\s+$|^(x+x+)+y",
    "(?m)^.*a.*b.*c",
]
ACCEPTED = [
    "^ora_",
    "a.*b",
    "^java.*-Dapp=shop.*server",
    "(foo|bar)+baz",
    r"(\d{1,3}\.){3}\d{1,3}",
    r"nginx(-\d+)?$",
    r"\.(service|scope|mount)$",
    "^/user\\.slice/user-[0-9]+\\.slice/",
    "(?i)oracle",
    "(?!x)abc",
    r"(a)\1",
    "",
]


@pytest.mark.parametrize("expression", REFUSED)
def test_a_regex_with_too_many_ways_is_refused_at_load(expression):
    with pytest.raises(InvalidValueError, match="is too expensive"):
        names.pattern(f"/{expression}/")


@pytest.mark.parametrize("expression", ACCEPTED)
def test_usual_expressions_are_accepted(expression):
    assert regex_cost(expression, names.LONGEST_TEXT) <= MOST_WAYS


def test_a_comm_is_so_short_that_more_is_allowed():
    assert names.pattern("/o.*r.*a.*x/", "comm").kind == "regex"
    with pytest.raises(InvalidValueError, match="a text of 15 characters"):
        names.pattern("/(o+)+x/", "comm")


def longest_texts(alphabet):
    return st.lists(st.sampled_from(alphabet), min_size=1, max_size=3).map(
        lambda unit: ("".join(unit) * names.LONGEST_TEXT)[: names.LONGEST_TEXT]
    )


@given(st.text("ab.*+?|()", max_size=8), longest_texts("ab"))
def test_no_accepted_expression_takes_long(expression, text):
    """Without the bound this test does not end; hypothesis' deadline fails if a text takes half a second."""
    try:
        parsed = names.pattern(f"/{expression}/")
    except InvalidValueError:
        return
    if parsed.kind == "regex":
        re.search(parsed.text, text + "!")


def test_a_glob_of_many_stars_never_backtracks():
    """As an expression this would be 4096 to the 20th; it is the reason why globs need no bound."""
    glob = "*a*b" * 10 + "*c"
    assert "(?>" in translate(glob)
    assert re.match(translate(glob), "ab" * (names.LONGEST_TEXT // 2)) is None
