"""A written rule gives the same rule when it is loaded again, for every rule."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.rules.trees import match_data

from cnprocd.cli.rule_text import rule_lines
from cnprocd.rules.language.load import load
from cnprocd.rules.written import digest, duration, size, written_rule

HOOK = """
    run:
      command: [/usr/lib/x, "--name={comm}", "{{literal}}", '""', "$HOME", "# no comment", "1e3"]
      user: root
      group: 0
      timeout: 90s
      deadline: 1.5h
      retries: 3
      backoff: {initial: 250ms, max: 1d}
      env: {NAME: "{comm}[{pid}]", EMPTY: "", "TRUE": "yes"}
      working_directory: /var/tmp
      umask: "0027"
      nice: -5
      limits: {open_files: 100, address_space: 1G, cpu_time: 10s, core: 0, file_size: 1500}
      slots: 2
      serialize: comm
      output_limit: 8K
      on_failure: {level: critical, message: "{comm} failed"}
"""
RULE = """
rules:
  - name: everything
    description: "a: b # c"
    enabled: false
    events: [nonzero_exit, exec]
    threads: true
    include_hooks: true
    on_unknown_exit: ignore
    rate_limit: {count: 3, per: 1m, by: user}
    cooldown: {for: 10s, by: unit}
    coalesce: {window: 2500ms, max: 10, by: ppid}
    after: {count: 3, within: 1h, by: container}
    resets: 2h
    log: {level: warning, message: "{comm} {{}} \\u00e9\\u0007"}
"""


def loaded(tmp_path, text):
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    return load(file).rules


def again(tmp_path, rule):
    """Load a file that contains only the written `rule`, and return its rule."""
    return loaded(tmp_path, "\n".join(["rules:", *(f"  {line}" for line in rule_lines(written_rule(rule)))]) + "\n")[0]


def test_a_rule_with_every_key_is_read_back(tmp_path):
    (rule,) = loaded(tmp_path, RULE + HOOK)
    assert again(tmp_path, rule) == rule


@pytest.mark.parametrize("log", ["true", "false", "{level: debug}"])
def test_a_rule_of_defaults_is_read_back(tmp_path, log):
    (rule,) = loaded(tmp_path, f"rules: [{{name: a, events: [exit], log: {log}}}]")
    assert again(tmp_path, rule) == rule


@settings(max_examples=150, deadline=None)
@given(match_data)
def test_a_rule_with_any_match_is_read_back(tmp_path_factory, data):
    import yaml

    directory = tmp_path_factory.mktemp("rules")
    text = yaml.safe_dump({"rules": [{"name": "a", "events": ["exit"], "match": data}]})
    (rule,) = loaded(directory, text)
    assert again(directory, rule) == rule


@given(st.text(min_size=1, max_size=20).filter(lambda text: "\0" not in text))
def test_any_text_survives_being_written(tmp_path_factory, text):
    """The parser follows YAML 1.2: text that looks like a number or a flag must be quoted and stay text."""
    directory = tmp_path_factory.mktemp("rules")
    (rule,) = loaded(directory, "rules: [{name: a, description: x, events: [exit]}]")
    rule = replace(rule, description=text)
    assert again(directory, rule) == rule


@pytest.mark.parametrize(
    ("value", "text"),
    [(30, "30s"), (60, "1m"), (86400, "1d"), (90, "90s"), (0.5, "500ms"), (1.5, "1500ms"), (0, "0ms")],
)
def test_durations_have_the_largest_whole_unit(value, text):
    assert duration(value) == text


def test_sizes_have_the_largest_whole_unit():
    assert [size(1 << 20), size(1500), size(64 << 10), size(0)] == ["1M", 1500, "64K", 0]


def test_a_digest_is_of_all_but_enabled(tmp_path):
    (rule,) = loaded(tmp_path, RULE + HOOK)
    assert digest(rule) == digest(replace(rule, enabled=True))
    assert digest(rule) != digest(replace(rule, threads=False))
    assert digest(rule) != digest(replace(rule, run=replace(rule.run, retries=4)))
