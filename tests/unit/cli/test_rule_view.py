"""rules list, rules show and rules disable --for, with rule files and without a daemon."""

import time
from datetime import UTC, datetime

import pytest
from unit.ctlkit import ctl, ctl_json

from cnprocd.cli.ruleset import overridden
from cnprocd.errors import EX_CONFIG, EX_NO, EX_OK
from cnprocd.rules.language.disabled import apply, read
from cnprocd.rules.language.load import load
from cnprocd.rules.problems import next_end_ns, with_expired_enabled

RULES = """lists: {oracle: ["ora_*", tnslsnr]}
rules:
  - name: died
    description: Free what it held
    events: [nonzero_exit]
    match: {comm: $oracle, user: 5}
    run: {command: [/bin/true, --pid, "{pid}"], timeout: 90s}
  - {name: any-exec, events: [exec], enabled: false}
"""
HOUR_NS = 3600 * 10**9


@pytest.fixture
def rules(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(RULES)
    return file


def without_daemon(rules, *words):
    return ctl(*words, "--runtime-dir", str(rules.parent), rules=rules)


def test_list_without_a_daemon_is_of_the_files_and_says_so(rules):
    status, out, err = without_daemon(rules, "rules", "list")
    assert status == EX_OK
    head, died, any_exec = out.splitlines()
    assert head.split() == ["RULE", "STATE", "EVENTS", "HOOK", "FILE", "DESCRIPTION"]
    assert died.split()[:5] == ["died", "enabled", "nonzero_exit", "hook", f"{rules}:3"]
    assert any_exec.split()[:2] == ["any-exec", "DISABLED"]
    assert err.startswith("cnprocctl: these are the rules in the files: cnprocd is not running")


def test_show_prints_the_rule_with_defaults_and_its_place(rules):
    status, out, err = without_daemon(rules, "rules", "show", "died")
    assert (status, err) == (EX_OK, "")
    place, compared, *text = out.splitlines()
    assert place == f"# {rules}:3"
    assert compared.startswith("# not compared with what is in force: cnprocd is not running")
    assert text[0] == "- name: died"
    assert '    comm: ["ora_*", tnslsnr]' in text
    assert "    timeout: 90s" in text
    assert "    retries: 0" in text


def test_show_as_json_has_the_same(rules):
    status, found = ctl_json("rules", "show", "any-exec", "--runtime-dir", str(rules.parent), rules=rules)
    assert (status, found["file"], found["line"], found["in_force"]) == (EX_OK, str(rules), 8, None)
    assert (found["rule"]["name"], found["rule"]["enabled"], found["overrides"]) == ("any-exec", False, [])
    assert found["text"].startswith(f"# {rules}:8\n") and "- name: any-exec" in found["text"]
    assert (found["plan"]["cost"], found["plan"]["identity"]) == (3, "procfs")


def test_the_list_as_json_has_prices_of_disabled_rules_also(rules):
    _, found = ctl_json("rules", "list", "--runtime-dir", str(rules.parent), rules=rules)
    _, plan = ctl_json("explain", "--runtime-dir", str(rules.parent), rules=rules)
    assert [(one["name"], one["cost"]) for one in found] == [("died", 1), ("any-exec", 3)]
    assert found[0]["cost_means"] == plan["rules"][0]["cost_means"]


@pytest.mark.parametrize("verb", [["rules", "show"], ["rules", "disable"], ["rules", "enable"], ["explain"]])
def test_an_unknown_rule_is_one_line_and_status_1(rules, verb):
    status, out, err = without_daemon(rules, *verb, "dide")
    assert (status, out, err) == (EX_NO, "", 'cnprocctl: no rule named "dide": did you mean "died"?\n')


def test_a_drop_in_names_those_that_it_overrides(tmp_path):
    directories = [tmp_path / name for name in ("etc", "run", "lib")]
    for directory in directories:
        directory.mkdir()
    for directory in directories[1:]:
        (directory / "10-x.yaml").write_text("rules:\n  - {name: other, events: [exit]}\n")
    (directories[0] / "10-x.yaml").write_text("rules: []\n")
    (directories[2] / "20-y.yaml").write_text("rules: []\n")
    file = directories[0] / "10-x.yaml"
    assert list(overridden(file, "other", directories)) == [(one / "10-x.yaml", 2) for one in directories[1:]]
    assert list(overridden(file, "gone", directories)) == [(one / "10-x.yaml", None) for one in directories[1:]]
    assert list(overridden(directories[2] / "20-y.yaml", "other", directories)) == []
    assert list(overridden(tmp_path / "rules.yaml", "other", directories)) == []


def test_disable_for_a_time_is_written_with_its_end(rules):
    before_ns = time.time_ns()
    status, out, _ = without_daemon(rules, "rules", "disable", "died", "--for", "2h")
    assert (status, out.startswith("died: disabled until 20")) == (EX_OK, True)
    entry = read(rules.parent / "disabled")["died"]
    assert before_ns + 2 * HOUR_NS <= entry.until_ns <= time.time_ns() + 2 * HOUR_NS + 10**9
    assert "DISABLED until 20" in without_daemon(rules, "rules", "list")[1]
    status, found = ctl_json("rules", "list", "--runtime-dir", str(rules.parent), rules=rules)
    assert [one["disabled_until_ns"] for one in found] == [entry.until_ns, None]


def test_disabling_again_replaces_the_end(rules):
    file = rules.parent / "disabled"
    without_daemon(rules, "rules", "disable", "died", "--for", "2h")
    without_daemon(rules, "rules", "disable", "died")
    assert read(file)["died"].until_ns is None
    without_daemon(rules, "rules", "enable", "died")
    assert not file.exists()


def written(rules, text):
    (rules.parent / "disabled").write_text(text)
    return apply(load(rules), rules.parent / "disabled")


def stamp(offset_s):
    return f"{datetime.fromtimestamp(time.time() + offset_s, UTC):%Y-%m-%dT%H:%M:%SZ}"


def test_an_expired_line_has_no_effect_at_load(rules):
    loaded = written(rules, f"died until {stamp(-5)}\n")
    assert loaded.rules[0].enabled
    assert (dict(loaded.disabled), loaded.warnings) == ({}, ())


def test_an_expired_line_is_removed_at_the_next_change(rules):
    (rules.parent / "disabled").write_text(f"died until {stamp(-5)}\n")
    without_daemon(rules, "rules", "disable", "any-exec")
    assert list(read(rules.parent / "disabled")) == ["any-exec"]


def test_a_rule_is_enabled_again_without_reading_files(rules):
    loaded = written(rules, f"died until {stamp(3600)} # maintenance\nany-exec\n")
    assert [rule.enabled for rule in loaded.rules] == [False, False]
    end_ns = next_end_ns(loaded)
    assert with_expired_enabled(loaded, end_ns - 1) == loaded
    again = with_expired_enabled(loaded, end_ns)
    assert [rule.enabled for rule in again.rules] == [True, False], "its own file disables any-exec"
    assert next_end_ns(again) is None


@pytest.mark.parametrize("line", ["died until soon", "died for 2h", "died until", "died 2026-11-25T22:00:00Z"])
def test_a_malformed_end_is_an_error_with_its_place(rules, line):
    (rules.parent / "disabled").write_text(f"# comment\n{line}\n")
    status, _, err = ctl("check", rules=rules)
    assert status == EX_CONFIG
    assert f"{rules.parent}/disabled:2:6: cannot read" in err
