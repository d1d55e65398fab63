"""Style and types as tests: ruff and mypy of the environment that runs the tests, with the settings of the project."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "--output-format=concise", "cnprocd", "tests", "packaging"],
        ["ruff", "format", "--no-cache", "--check", "cnprocd", "tests", "packaging"],
        ["mypy", "--no-error-summary"],
    ],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_nothing_is_found_by(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"


def test_no_two_files_of_tests_have_one_name():
    """pytest cannot collect both in one run."""
    names = Counter(path.name for path in (PROJECT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
