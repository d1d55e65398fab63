"""cnprocd-runner's command line, and when it reads the rules again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnprocd.cli.runner import Rules
from cnprocd.rules.language.load import load
from cnprocd.rules.problems import RulesError

RULE = """
rules:
  - name: {name}
    events: [nonzero_exit]
    run: {{command: [/bin/true]}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(RULE.format(name="first"))
    return path


def test_rules_are_read_again_when_they_changed_and_only_then(file):
    reads = []

    def read():
        reads.append(1)
        return load(file)

    rules = Rules(read)
    assert list(rules()) == ["first"]
    assert list(rules()) == ["first"]
    assert len(reads) == 1
    replacement = file.with_suffix(".new")
    replacement.write_text(RULE.format(name="second"))
    replacement.rename(file)
    assert list(rules()) == ["second"]
    assert list(rules()) == ["second"]
    assert len(reads) == 2


def test_wrong_rules_run_nothing_until_they_are_right_again(file):
    rules = Rules(lambda: load(file))
    rules()
    file.write_text(RULE.format(name="x").replace("events", "evnts"))
    for _ in range(2):
        with pytest.raises(RulesError):
            rules()
    file.write_text(RULE.format(name="third"))
    assert list(rules()) == ["third"]


def test_without_a_passed_socket_it_names_the_unit():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    command = [sys.executable, "-m", "cnprocd.cli.runner"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 71
    assert done.stderr == (
        "cnprocd-runner: no socket was passed: start cnprocd-runner.socket; systemd then starts the runner\n"
    )
