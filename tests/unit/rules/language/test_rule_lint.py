"""The linter's facts about the world; what it warns of is tested with `check` (tests/unit/cli/test_rules_verbs.py)."""

import pytest

from cnprocd.process import cgroup_path
from cnprocd.process.cgroup_path import placement_of
from cnprocd.rules.language.lint import UNIT_SUFFIXES, lint
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleModel


def lint_of(rules):
    return list(lint([plain(RuleModel.model_validate({"events": "nonzero_exit", **rule})) for rule in rules]))


@pytest.mark.parametrize("suffix", UNIT_SUFFIXES)
def test_each_unit_suffix_names_a_unit_of_a_cgroup(suffix):
    assert placement_of(f"/system.slice/a{suffix}").unit == f"a{suffix}"


def test_there_are_no_other_unit_suffixes():
    assert {f".{word}" for word in cgroup_path._TYPES.split("|")} == set(UNIT_SUFFIXES)


def test_an_escalation_of_a_rule_is_no_duplicate():
    """One rule restarts at each failure, the other reports the sixth. Without `after` the second is a duplicate."""
    match = {"comm": "worker", "exe": "/usr/bin/worker"}
    both = [{"name": "restart", "match": match}, {"name": "given-up", "match": match}]
    assert [warning.kind for warning in lint_of(both)] == ["duplicate"]
    both[1]["after"] = {"count": 6, "within": "10m", "by": "unit"}
    assert lint_of(both) == []
