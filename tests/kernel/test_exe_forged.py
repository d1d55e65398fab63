"""A program of a user in the host's mount namespace, of which /proc shows the path of another program of the host."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel.harness import running

TARGET = os.path.realpath("/usr/bin/chage" if os.path.exists("/usr/bin/chage") else "/usr/bin/expr")
RULES = f"""
settings: {{record: [exe, exe_claimed, cmdline]}}
rules:
  - {{name: literal, events: [nonzero_exit], match: {{exe: {TARGET}}}}}
  - {{name: exec, events: [exec], match: {{exe: {TARGET}}}}}
  - {{name: glob, events: [nonzero_exit], match: {{exe: "{os.path.dirname(TARGET)}/ch*"}}}}
  - {{name: child, events: [nonzero_exit], match: {{parent: {{exe: {TARGET}}}}}}}
  - {{name: claimed, events: [nonzero_exit], match: {{exe_claimed: {TARGET}}}}}
$MARKER
"""
SHELL = ["-c", "sh -c 'exit 4'; echo; read x; exit 5"]
AS_USER: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}


@contextlib.contextmanager
def private_namespace(script: str) -> Iterator[int]:
    """Run a script in a user and mount namespace of a user. Yield the PID of a process there."""
    arguments = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"{script}; echo $$; read x"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **AS_USER) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


def execute(way: str, path: str) -> subprocess.Popen[bytes]:
    """Execute a path as the user, or the descriptor of an opened one."""
    by_descriptor = lambda: os.execve(os.open(path, os.O_RDONLY), [TARGET, *SHELL], {"PATH": "/usr/bin:/bin"})  # noqa: E731
    return subprocess.Popen(
        [path, *SHELL],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=by_descriptor if way == "descriptor" else None,
        **AS_USER,
    )


@pytest.mark.parametrize("deleted", [False, True], ids=["there", "deleted"])
@pytest.mark.parametrize("way", ["path", "descriptor"])
def test_a_file_of_another_namespace_has_no_exe(tmp_path_factory, tmp_path, way, deleted):
    """A user binds a program over another in a namespace, and executes it from outside. The path is one of there."""
    directory = tmp_path_factory.mktemp("user")
    for one in (directory, directory.parent, directory.parent.parent):
        os.chmod(one, 0o755)
    own = Path(shutil.copy("/bin/sh", directory / "own"))
    os.chown(directory, 65534, 65534)
    with running(tmp_path, RULES) as daemon:
        with private_namespace(f"mount --bind {own} {TARGET}{f'; rm {own}' if deleted else ''}") as pid:
            forged = execute(way, f"/proc/{pid}/root{TARGET}")
            assert forged.stdout is not None
            forged.stdout.readline()
            shown = os.readlink(f"/proc/{forged.pid}/exe")
            daemon.mark()
            forged.communicate(b"\n")
        assert forged.returncode == 5
        assert (shown.removesuffix(" (deleted)"), shown.endswith("(deleted)")) == (TARGET, deleted)
        record = daemon.wait_for("rule_matched", rule="claimed", pid=forged.pid)
        assert (record["exe"], record["exe_claimed"]) == (None, TARGET)
        assert subprocess.run([TARGET, "--no-such-option"], stdin=subprocess.DEVNULL, capture_output=True).returncode
        daemon.mark()
        found = [record for record in daemon.matches() if forged.pid in (record["pid"], record["ppid"])]
        assert {record["rule"] for record in found} == {"claimed"}
        assert daemon.matches("literal", exe=TARGET), "the real program matches"
