"""Names of users and groups that had no id when the rules were loaded."""

from __future__ import annotations

import threading

import pytest

from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.language.load import load
from cnprocd.rules.predicate import compile_condition
from cnprocd.rules.unresolved import Name, unresolved_names, with_ids

IDS = {"oracle": 54, "dba": 55}
EVERYWHERE = "{any: [{user: $staff}, {not: {group: ghosts}}], parent: {user: ghost}, all: [{ancestor: {group: g}}]}"


@pytest.fixture
def loaded(tmp_path):
    def load_text(match, **ids):
        file = tmp_path / "rules.yaml"
        file.write_text(f"lists: {{staff: [oracle, larry]}}\nrules:\n  - {{name: a, events: exit, match: {match}}}\n")
        look_up = {**IDS, **ids}.get
        return load(file, user=look_up, group=look_up)

    return load_text


def verdict(condition, uid, gid=0):
    occurrence = Occurrence("exit", Process(1, uid=uid, gid=gid), 1, 256)
    return compile_condition(condition)(occurrence)


def condition_of(loaded, match, **ids):
    return loaded(match, **ids).rules[0].match


def test_a_rule_with_an_unknown_name_loads_with_a_warning(loaded):
    found = loaded("{user: [oracle, larry]}")
    assert unresolved_names(found.rules) == {Name("user", "larry")}
    (warning,) = (one for one in found.warnings if "user" in one.message)  # the list is not used
    assert 'no user named "larry"' in warning.message and "nothing matches through that name" in warning.message
    assert "getent passwd" in warning.hint and warning.line == 3


def test_names_are_found_wherever_a_condition_has_them(loaded):
    found = loaded(
        "{any: [{user: $staff}, {not: {group: ghosts}}], parent: {user: ghost}, all: [{ancestor: {group: g}}]}"
    )
    names = {Name("user", "larry"), Name("group", "ghosts"), Name("user", "ghost"), Name("group", "g")}
    assert unresolved_names(found.rules) == names
    assert len(found.warnings) == 4
    resolved = with_ids(found.rules, dict.fromkeys(names, 77))
    assert unresolved_names(resolved) == frozenset()
    assert resolved == loaded(EVERYWHERE, larry=77, ghosts=77, ghost=77, g=77).rules


@pytest.mark.parametrize(
    ("match", "uid", "wanted"),
    [
        ("{user: [oracle, larry]}", 54, True),
        ("{user: [oracle, larry]}", 99, None),
        ("{user: larry}", 99, None),
        ("{not: {user: larry}}", 99, None),
        ("{not: {user: [oracle, larry]}}", 54, False),
        ("{any: [{user: larry}, {user: oracle}]}", 54, True),
        ("{user: [oracle, dba]}", 99, False),
    ],
)
def test_another_id_is_unknown_while_a_name_is(loaded, match, uid, wanted):
    """It never matches by accident, not even negated."""
    assert verdict(condition_of(loaded, match), uid) is wanted


def test_ids_take_the_place_of_their_names_only(loaded):
    found = loaded("{user: [larry, ghost], group: larry}")
    rules = with_ids(found.rules, {Name("user", "larry"): 7})
    assert rules[0].match.user == (7, "ghost")
    assert rules[0].match.group == ("larry",)
    assert with_ids(found.rules, {}) == found.rules


def test_the_hook_of_an_unknown_user_is_warned_of(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text("rules: [{name: a, events: exit, run: {command: [/bin/true], user: ghost, timeout: 1s}}]\n")
    found = load(file, user=IDS.get, group=IDS.get)
    assert ['no user named "ghost"' in warning.message for warning in found.warnings] == [True]
    assert found.rules[0].run.user == "ghost"
    assert unresolved_names(found.rules) == frozenset()


def test_a_silent_name_service_has_a_bound(tmp_path, monkeypatch):
    """All names together: the first uses the limit up, and each of the others is asked for a moment."""
    monkeypatch.setattr("cnprocd.rules.language.load.NAMES_LIMIT_S", 0.05)
    monkeypatch.setattr("cnprocd.rules.language.load.system_user", lambda name: threading.Event().wait())
    file = tmp_path / "rules.yaml"
    file.write_text("rules: [{name: a, events: exit, match: {user: [a, b, c, d, 7], group: [root]}}]\n")
    found = load(file)
    assert found.rules[0].match.user == ("a", "b", "c", "d", 7)
