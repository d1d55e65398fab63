"""The hash of the rules in force: the same on hosts with the same rules, wherever the files stand; else different."""

import time
from dataclasses import replace

import pytest
from unit.ctlkit import ctl_json

from cnprocd.rules.language.disabled import load_in_force, load_with_snapshot
from cnprocd.rules.language.load import load
from cnprocd.rules.problems import with_expired_enabled

MAIN = "rules:\n  - {name: a, events: [exit], match: {comm: a}}\n  - {name: b, events: [exit], match: {comm: b}}\n"
MORE = "rules:\n  - {name: c, events: [exit], match: {comm: c}}\n"


@pytest.fixture
def file_of(tmp_path):
    """Return a function that writes a rule file into a directory of its own."""

    def make(text, directory="one", name="rules.yaml"):
        file = tmp_path / directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    return make


def test_the_same_files_in_two_places_have_one_hash(file_of):
    one = load(file_of(MAIN), also=[file_of(MORE, name="10.yaml")])
    other = load(file_of(MAIN, "two", "main.yaml"), also=[file_of(MORE, "two", "20.yaml")])
    assert one.rules_hash == other.rules_hash
    assert len(one.rules_hash) == 64


def test_different_rules_have_different_hashes(file_of):
    main, more = file_of(MAIN), file_of(MORE, name="10.yaml")
    comment = file_of(MAIN + "# a comment\n", "two")
    found = [load(main), load(main, also=[more]), load(more, also=[main]), load(comment), load(more)]
    assert len({loaded.rules_hash for loaded in found}) == len(found)


def test_a_disabled_rule_changes_the_hash_until_its_time_is_over(file_of):
    file = file_of(MAIN)
    before = load_in_force(file).rules_hash
    (file.parent / "disabled").write_text("a until 2999-01-01T00:00:00Z\n")
    during = load_in_force(file)
    assert during.rules_hash != before
    ends = replace(during, disabled={"a": time.time_ns() - 1})
    assert with_expired_enabled(ends, time.time_ns()).rules_hash == before
    (file.parent / "disabled").write_text("# nothing\n")
    assert load_with_snapshot(file)[0].rules_hash == before


def test_check_prints_the_hash_that_the_daemon_has(file_of):
    main, more = file_of(MAIN), file_of(MORE, name="10.yaml")
    status, found = ctl_json("check", str(main), str(more))
    assert (status, found["rules_hash"]) == (0, load(main, also=[more]).rules_hash)
    status, found = ctl_json("check", str(file_of("rules: [", "two")))
    assert (status, found["rules_hash"]) == (78, None)
