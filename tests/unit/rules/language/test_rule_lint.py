"""The linter's facts about the world; what it warns of is tested with `check` (tests/unit/cli/test_rules_verbs.py)."""

import pytest

from cnprocd.process import stat
from cnprocd.process.stat import unit_of
from cnprocd.rules.language.lint import UNIT_SUFFIXES


@pytest.mark.parametrize("suffix", UNIT_SUFFIXES)
def test_each_unit_suffix_names_a_unit_of_a_cgroup(suffix):
    assert unit_of(f"/system.slice/a{suffix}") == f"a{suffix}"


def test_there_are_no_other_unit_suffixes():
    assert {f".{word}" for word in stat._UNIT.pattern.strip(r"\.(?:)$").split("|")} == set(UNIT_SUFFIXES)
