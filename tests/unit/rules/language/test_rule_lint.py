"""The linter's facts about the world; what it warns of is tested with `check` (tests/unit/cli/test_rules_verbs.py)."""

import pytest

from cnprocd.process import cgroup_path
from cnprocd.process.cgroup_path import placement_of
from cnprocd.rules.language.lint import UNIT_SUFFIXES


@pytest.mark.parametrize("suffix", UNIT_SUFFIXES)
def test_each_unit_suffix_names_a_unit_of_a_cgroup(suffix):
    assert placement_of(f"/system.slice/a{suffix}").unit == f"a{suffix}"


def test_there_are_no_other_unit_suffixes():
    assert {f".{word}" for word in cgroup_path._TYPES.split("|")} == set(UNIT_SUFFIXES)
