"""Nothing outside stops the loop: what rules name is on a disk that does not answer, or in a restless directory.

What must hold is that of test_edges.py; CNPTEST_BLOCKED_S sets for how long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from kernel.blocking import NOBODY, Endurance
from kernel.harness import child, wait_status
from kernel.test_edges import collected, started
from kernel.test_edges_hooks import silent_disk

from cnprocd.control.protocol import Call, method_of, pack

NAMED = """
  - {{name: named, events: [nonzero_exit, exec], match: {{exe: {program}}}}}
"""
HALVES = 200


def naming(tmp_path: Path, program: Path) -> Endurance:
    os.chmod(tmp_path, 0o755)
    return Endurance(tmp_path, NAMED.format(program=program))


def lives_through(endurance, daemon, tmp_path):
    endurance.live(tmp_path / "run")
    endurance.assert_answered()
    endurance.assert_reported(collected(daemon))
    endurance.assert_hooks_ran()
    endurance.assert_nothing_doubled()
    endurance.assert_stops(daemon.process)


def test_a_named_program_on_a_silent_disk_delays_nothing(tmp_path):
    """Neither while the daemon runs nor when it starts."""
    (disk := tmp_path / "disk").mkdir()
    (disk / "program").write_text("#!/bin/sh\n")
    endurance = naming(tmp_path, disk / "program")
    with started(tmp_path, endurance) as daemon, silent_disk(disk):
        lives_through(endurance, daemon, tmp_path)
    (tmp_path / "fuse").unlink()
    endurance.died_at.clear()
    with silent_disk(disk):
        began = time.monotonic()
        with started(tmp_path, endurance) as daemon:
            assert time.monotonic() - began < 15.0
            lives_through(endurance, daemon, tmp_path)


def test_rule_files_on_a_silent_disk_delay_nothing_but_a_reload(tmp_path):
    (disk := tmp_path / "disk").mkdir()
    endurance = naming(tmp_path, tmp_path / "program")
    rules = tmp_path / "rules.yaml"
    with started(tmp_path, endurance) as daemon:
        (disk / "rules.yaml").write_text(rules.read_text())
        rules.unlink()
        rules.symlink_to(disk / "rules.yaml")
        with silent_disk(disk):
            daemon.process.send_signal(signal.SIGHUP)
            lives_through(endurance, daemon, tmp_path)


@contextlib.contextmanager
def restless(directory: Path) -> Iterator[None]:
    """A user's process that renames a directory in this one all the time."""

    def rename_for_ever() -> None:
        os.chdir(directory)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        os.mkdir("a")
        while True:
            os.rename("a", "b")
            os.rename("b", "a")

    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    pid = child(rename_for_ever)
    try:
        yield
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it has renamed to the end"
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_status(pid)


def test_a_directory_that_never_rests_delays_nothing(tmp_path):
    """A rule names a program in a directory of a user, and inotify(7) reports thousands of changes a second."""
    endurance = naming(tmp_path, tmp_path / "theirs" / "program")
    with restless(tmp_path / "theirs"), started(tmp_path, endurance) as daemon:
        lives_through(endurance, daemon, tmp_path)


def test_clients_that_send_half_a_call_delay_nothing(tmp_path):
    endurance = naming(tmp_path, tmp_path / "program")
    half = pack(Call(method_of("history"), {"limit": 1000}))[:-20]
    with started(tmp_path, endurance) as daemon, contextlib.ExitStack() as clients:
        for _ in range(HALVES):
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(tmp_path / "run/control.sock"))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.send(half)
        endurance.live(tmp_path / "run")
        endurance.assert_reported(collected(daemon))
        endurance.assert_hooks_ran()
        clients.close()
        endurance.slowest_status_s = 0.0
        lives_through(endurance, daemon, tmp_path)
