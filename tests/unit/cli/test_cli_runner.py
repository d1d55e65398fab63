"""cnprocd-runner's command line, and its reader of rules and snapshots."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cnprocd.cli.runner import Reader
from cnprocd.rules import snapshot_files
from cnprocd.rules.language.disabled import load_with_snapshot
from cnprocd.rules.problems import RulesError
from cnprocd.runner.rule_snapshots import FilesRead

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


def digest(file: Path) -> str:
    return load_with_snapshot(file)[1].digest


def test_the_reader_stores_only_the_wanted_files(file, tmp_path):
    async def main() -> None:
        reader = Reader(file, tmp_path / "kept", None)
        first = digest(file)
        file.write_text(RULE.format(name="second"))
        assert await reader.accept(first, []) == FilesRead(digest(file), None)
        assert await reader.stored(first) is None
        read = await reader.accept(digest(file), [])
        assert read.hooks is not None
        assert list(read.hooks) == ["second"]
        assert snapshot_files.accepted(tmp_path / "kept") == digest(file)
        stored = await reader.stored(digest(file))
        assert stored == read.hooks

    asyncio.run(main())


def test_invalid_files_are_not_stored(file, tmp_path):
    async def main() -> None:
        wanted = digest(file)
        file.write_text(RULE.format(name="x").replace("events", "evnts"))
        with pytest.raises(RulesError):
            await Reader(file, tmp_path / "kept", None).accept(wanted, [])
        assert not (tmp_path / "kept").exists()

    asyncio.run(main())


def test_without_a_passed_socket_it_names_the_unit():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    command = [sys.executable, "-m", "cnprocd.cli.runner"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 71
    assert done.stderr == (
        "cnprocd-runner: no socket was passed: start cnprocd-runner.socket; systemd then starts the runner\n"
    )
