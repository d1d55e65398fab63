"""The locks on the state and runtime directory, between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from cnprocd.errors import EX_TEMPFAIL, StateError
from cnprocd.owner_lock import FILE_NAME, OwnedError, OwnerLock, holder_of

HOLDER = """
import sys
from pathlib import Path
from cnprocd.owner_lock import OwnerLock
lock = OwnerLock()
lock.take(map(Path, sys.argv[1:]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(*directories):
    """Another process that holds the directories."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *map(str, directories)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def directories(tmp_path):
    state, run = tmp_path / "state", tmp_path / "run"
    state.mkdir()
    run.mkdir()
    return state, run


@pytest.mark.parametrize("which", [0, 1])
def test_a_held_directory_is_refused_and_its_pid_named(directories, which):
    """Either of the two is enough."""
    with holder(directories[which]) as other:
        with pytest.raises(OwnedError) as refused:
            OwnerLock().take(directories)
        assert refused.value.pid == other.pid and refused.value.directory == directories[which]
        assert f"PID {other.pid}" in str(refused.value) and refused.value.exit_status == EX_TEMPFAIL
        assert holder_of(directories[which]) == other.pid


@pytest.mark.parametrize("how", [signal.SIGKILL, None])
def test_the_lock_ends_with_its_process(directories, how):
    with holder(*directories) as other:
        if how is None:
            other.stdin.close()
        else:
            other.send_signal(how)
        other.wait()
        lock = OwnerLock()
        lock.take(directories)
        lock.close()
    assert holder_of(directories[0]) is None


def test_a_child_does_not_keep_the_lock(directories):
    """A fork that outlives the daemon, as a loader process may."""
    program = "import os\n" + HOLDER.replace("sys.stdin.read()", "pid = os.fork()\nsys.stdin.read()\n")
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, directories)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    process.kill()
    process.wait()
    lock = OwnerLock()
    lock.take(directories)
    lock.close()
    process.communicate()


def test_a_directory_named_twice_is_locked_once(tmp_path):
    """--state-dir and --runtime-dir may be the same directory, under two names."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").symlink_to("one")
    lock = OwnerLock()
    lock.take([tmp_path / "one", tmp_path / "two"])
    lock.take([tmp_path / "two"])
    pid = os.fork()
    if pid == 0:
        os._exit(7 if holder_of(tmp_path / "one") == os.getppid() else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    lock.close()


def test_a_file_left_by_a_dead_process_means_nothing(directories):
    (directories[0] / FILE_NAME).write_text("4711\n")
    assert holder_of(directories[0]) is None
    lock = OwnerLock()
    lock.take(directories)
    lock.close()


def test_a_directory_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(StateError, match="cannot open"):
        OwnerLock().take([tmp_path / "missing"])
    assert holder_of(tmp_path / "missing") is None


def test_a_symbolic_link_is_not_followed(directories, tmp_path):
    (directories[0] / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="cannot open"):
        OwnerLock().take(directories)
    assert not (tmp_path / "elsewhere").exists()
