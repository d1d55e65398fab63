"""Programs by `exe`: every short life is matched by its file, over upgrades, and no mount forges it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from kernel.harness import PATIENCE_S, running

from cnprocd.control.client import Client

LITERAL = """
rules:
  - name: literal
    events: [nonzero_exit]
    match: {{exe: {program}}}
    log: {{level: info, message: "{{exe}} of {{comm}}"}}
$MARKER
"""
GLOB = """
rules:
  - {{name: other, events: [nonzero_exit], match: {{comm: "{comm}", not: {{exe: "/opt/*"}}}}}}
  - {{name: glob, events: [nonzero_exit], match: {{exe: "{directory}/*"}}}}
  - {{name: claimed, events: [nonzero_exit], match: {{exe_claimed: {program}}}}}
$MARKER
"""


def failures(program: Path | str, count: int) -> list[int]:
    """Run a failing program so often, as fast as it goes; the PIDs."""
    pids = [os.posix_spawn(program, [str(program)], {}) for _ in range(count)]
    for pid in pids:
        os.waitpid(pid, 0)
    return pids


def matched(daemon, rule: str) -> list[int]:
    daemon.mark()
    return sorted(record["pid"] for record in daemon.matches(rule))


def test_every_short_life_matches_by_its_literal_path(tmp_path):
    """400 failures in a row; beside them a program of the same name elsewhere, which does not match."""
    program = os.path.realpath("/bin/false")
    other = shutil.copy("/bin/false", tmp_path / "false")
    with running(tmp_path, LITERAL.format(program=program)) as daemon:
        assert daemon.wait_for("started")["table"] is False, "neither fork nor exec events are asked for"
        pids = failures(program, 400)
        failures(other, 50)
        assert matched(daemon, "literal") == sorted(pids)
        assert {record["exe"] for record in daemon.matches("literal")} == {program}


def test_every_short_life_of_a_program_below_dev_matches(tmp_path):
    """/dev is a devtmpfs, and /dev/shm a tmpfs on it: both are of this machine."""
    directory = Path(tempfile.mkdtemp(prefix="cnptest-", dir="/dev/shm"))
    try:
        program = shutil.copy("/bin/false", directory / "false")
        with running(tmp_path, LITERAL.format(program=program)) as daemon:
            assert daemon.wait_for("started")["table"] is False, "its file is identified by exit records"
            pids = failures(program, 100)
            assert matched(daemon, "literal") == sorted(pids)
    finally:
        shutil.rmtree(directory)


def test_every_short_life_matches_by_what_its_path_is_not(tmp_path):
    program = Path(os.path.realpath("/bin/false"))
    rules = GLOB.format(comm="false", directory=program.parent, program=program)
    with running(tmp_path, rules) as daemon:
        pids = failures(program, 400)
        for rule in ("other", "glob"):  # other programs of this directory may fail meanwhile
            assert [pid for pid in matched(daemon, rule) if pid in pids] == sorted(pids)


def test_a_program_bound_over_another_does_not_match(tmp_path):
    """A mount namespace of its own: /proc shows the path of the program that was mounted over."""
    program = os.path.realpath(shutil.which("expr"))
    own = shutil.copy("/bin/false", tmp_path / "own")
    rules = LITERAL.format(program=program).replace("$MARKER", "") + GLOB.format(
        comm="expr", directory=os.path.dirname(program), program=program
    ).replace("\nrules:\n", "")
    with running(tmp_path, rules) as daemon:
        forged = []
        for _ in range(20):
            process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", f"mount --bind {own} {program} && exec {program}"]
            )
            process.wait()
            forged.append(process.pid)
        real = failures(program, 5)
        assert matched(daemon, "literal") == sorted(real)
        daemon.mark()
        assert {record["pid"] for record in daemon.matches("glob", exe=program)} <= set(real)
        assert set(matched(daemon, "claimed")) <= {*real, *forged}


@pytest.mark.parametrize(
    "rules",
    [
        LITERAL,
        LITERAL.replace("of {{comm}}", "{{cmdline}}"),
        LITERAL.replace("{program}", '"{program}*"').replace("rules:", "settings: {{record: [exe_deleted]}}\nrules:"),
    ],
    ids=["records", "table", "glob"],
)
def test_after_an_upgrade_old_and_new_processes_match(tmp_path, rules):
    program = Path(shutil.copy("/bin/sleep", tmp_path / "daemond"))
    before = subprocess.Popen([program, "600"])
    os.rename(shutil.copy("/bin/sleep", tmp_path / "new"), program)
    with running(tmp_path, rules.format(program=program)) as daemon:
        first, began_s = subprocess.Popen([program, "600"]), time.monotonic()
        while time.monotonic() < began_s + 0.1:  # in the same moment it is in doubt which file it executed
            daemon.mark()
        os.rename(shutil.copy("/bin/sleep", tmp_path / "new"), program)
        second = subprocess.Popen([program, "600"])
        for process in (before, first, second):
            process.kill()
            process.wait()
        assert matched(daemon, "literal") == sorted([before.pid, first.pid, second.pid])
        fields = {record["pid"]: (record["exe"], record.get("exe_deleted")) for record in daemon.matches("literal")}
        assert fields == {
            before.pid: (str(program), True),
            first.pid: (str(program), True),
            second.pid: (str(program), None),
        }


def test_a_rule_that_comes_with_a_reload_knows_its_program(tmp_path):
    program = Path(shutil.copy("/bin/false", tmp_path / "daemond"))
    with running(tmp_path, "rules:\n$MARKER\n") as daemon:
        daemon.reload(LITERAL.format(program=program))
        pids = failures(program, 100)
        assert matched(daemon, "literal") == sorted(pids)


FAILURES = int(os.environ.get("CNPROCD_EXE_FAILURES", "2500"))
SPAWNS = """
import os, sys
programs = sys.argv[2:]
for i in range(int(sys.argv[1])):
    os.waitpid(os.posix_spawn(programs[i % len(programs)], ["false"], {}), 0)
"""


def test_each_short_failure_of_four_programs_matches_once(tmp_path):
    """Beside two busy loops, and a fifth program of the same name that no rule names."""
    programs = [Path(shutil.copy("/bin/false", make_directory(tmp_path / name) / "false")) for name in "abcde"]
    rules = "".join(
        f"  - {{name: {one.parent.name}, events: [nonzero_exit], match: {{exe: {one}}}}}\n" for one in programs[:4]
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(tmp_path, f"rules:\n{rules}"))
        for _ in range(2):
            busy = subprocess.Popen([sys.executable, "-ISc", "while True: pass"])
            stack.callback(lambda busy=busy: (busy.kill(), busy.wait()))
        assert status(tmp_path / "run")["events"]["asked"] == ["nonzero_exit"]
        subprocess.run([sys.executable, "-ISc", SPAWNS, str(FAILURES), *programs], check=True)
        expected = {one.parent.name: FAILURES // 5 for one in programs[:4]}
        deadline = time.monotonic() + PATIENCE_S
        while (hits := hits_of(tmp_path / "run")) != expected and time.monotonic() < deadline:
            time.sleep(0.1)
        assert hits == expected


def hits_of(runtime_dir: Path) -> dict[str, int]:
    """Return how often each rule matched, reported or not."""
    return {rule["name"]: rule["hits"] for rule in status(runtime_dir)["rules"]}


def status(runtime_dir: Path) -> Any:
    with Client(runtime_dir, PATIENCE_S) as client:
        return client.ask("status")


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path
