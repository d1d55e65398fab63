"""A named program is replaced or moved, and a process of the old file ends while no daemon runs. No table is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from kernel.test_identity_restart import Service

from cnprocd.control.client import Client

RULES = """
rules:
  - {name: named, events: [nonzero_exit], match: {exe: $PROGRAM}}
  - {name: marker, events: [nonzero_exit], match: {comm: cnptest-mark, exit_code: 99}}
"""
MOST_NEW_FILES = 50


@pytest.fixture
def program(tmp_path):
    """A program of this test alone, on a filesystem that gives a number away again at once."""
    return Path(shutil.copy("/bin/sleep", tmp_path / "cnptest-program"))


@pytest.fixture
def service(tmp_path, program):
    service = Service(tmp_path, RULES.replace("$PROGRAM", str(program)))
    assert "fork" not in status(tmp_path)["events"]["asked"], "no table"
    yield service
    service.daemon.kill()
    service.daemon.wait()


def status(directory: Path) -> Any:
    with Client(directory / "run") as client:
        return client.ask("status")


def unknown_programs(directory: Path) -> int:
    unknown = status(directory)["events"]["identity_unknown"]
    return sum(int(one["count"]) for one in unknown if one["attribute"] == "exe")


def matched(service: Service, *pids: int) -> list[int]:
    """Return those that matched the rule on the program: markers of other daemons' tests can have the same PIDs."""
    return [pid for pid in pids if "named" in service.rules_that_matched(pid)]


def replace(program: Path) -> None:
    os.rename(shutil.copy("/bin/sleep", program.with_suffix(".new")), program)


def move(program: Path) -> None:
    program.rename(program.with_suffix(".old"))


def started(program: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([program, "600"])


def killed(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def run_strangers(program: Path, inode: int) -> list[int]:
    """Run other programs until one has the number of the old file, if the kernel gives it away. Return their PIDs."""
    pids = []
    for number in range(MOST_NEW_FILES):
        other = Path(shutil.copy("/bin/false", program.parent / f"stranger{number}"))
        pids.append(os.posix_spawn(other, ["stranger"], {}))
        os.waitpid(pids[-1], 0)
        if other.stat().st_ino == inode:
            break
    return pids


@pytest.mark.parametrize("change", [replace, move, Path.unlink])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_process_of_the_old_file_matches_after_a_restart(service, program, change, when):
    """It ends between two daemons, as an upgrade of the program and of cnprocd at once has it."""
    inode = program.stat().st_ino
    process = started(program)
    service.mark()
    if when == "before":
        change(program)
        service.mark()
    service.end(signal.SIGTERM)
    if when == "meanwhile":
        change(program)
    killed(process)
    strangers = run_strangers(program, inode)
    service.start()
    service.mark()
    assert matched(service, process.pid)
    assert not matched(service, *strangers)
    assert unknown_programs(service.directory) == 0


def test_a_process_of_the_old_file_matches_until_its_end(service, program):
    """Two restarts later, and the number is free afterwards: the daemon keeps no file open."""
    process = started(program)
    service.mark()
    replace(program)
    for _ in range(2):
        service.end(signal.SIGTERM)
        service.start()
        service.mark()
    killed(process)
    service.mark()
    assert matched(service, process.pid)
    links = [os.readlink(one) for one in Path(f"/proc/{service.daemon.pid}/fd").iterdir()]
    assert not [one for one in links if one.startswith(str(program))]


def test_after_a_kill_a_process_of_the_old_file_is_counted(service, program):
    """Nothing holds its number, so neither it nor a stranger with that number matches."""
    inode = program.stat().st_ino
    process = started(program)
    service.mark()
    service.end(signal.SIGKILL)
    replace(program)
    killed(process)
    strangers = run_strangers(program, inode)
    service.start()
    new = started(program)
    killed(new)
    service.mark()
    assert not matched(service, process.pid)
    assert matched(service, new.pid)
    assert not matched(service, *strangers)
    assert 1 <= unknown_programs(service.directory) <= 2, "the process, and a stranger that has its number"


def test_after_a_kill_a_living_process_of_the_old_file_matches(service, program):
    process = started(program)
    service.mark()
    replace(program)
    service.mark()
    service.end(signal.SIGKILL)
    service.start()
    service.mark()
    killed(process)
    service.mark()
    assert matched(service, process.pid)
    assert unknown_programs(service.directory) == 0
