"""program.py: a program that another user could have changed is refused, with reason and hint."""

import os
import shutil

import pytest

from cnprocd.launch import program
from cnprocd.launch.program import HookRefusedError, comm_is_kept, open_program

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make files of other users")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "hook"
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    return path


def opened(path):
    found = open_program(str(path))
    os.close(found.fd)
    return found


def refusal(path):
    with pytest.raises(HookRefusedError) as caught:
        opened(path)
    return str(caught.value)


def test_a_script_of_ours_is_executed_by_its_resolved_path(script, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(script)
    found = opened(link)
    assert found.path == os.path.realpath(script)
    assert not found.by_fd
    assert found.inode == (script.stat().st_dev, script.stat().st_ino)


def test_a_binary_is_executed_by_descriptor_and_keeps_its_comm(monkeypatch):
    monkeypatch.setattr(program, "comm_is_kept", lambda release: True)
    assert opened("/bin/true").by_fd
    monkeypatch.setattr(program, "comm_is_kept", lambda release: False)
    assert not opened("/bin/true").by_fd


@pytest.mark.parametrize(
    ("release", "kept"),
    [("6.1.0-18-amd64", False), ("6.12.43+deb13-amd64", False), ("6.14.0", True), ("7.0-rc1", True), ("odd", False)],
)
def test_which_kernels_name_a_program_executed_by_descriptor(release, kept):
    assert comm_is_kept(release) is kept


def test_a_missing_file_or_no_program_is_refused(script, tmp_path):
    assert "No such file" in refusal(tmp_path / "missing")
    assert "not an absolute path" in refusal("bin/true")
    assert "a directory" in refusal(tmp_path)
    script.chmod(0o644)
    assert "not executable" in refusal(script)


def test_a_program_that_others_can_write_is_refused(script):
    script.chmod(0o757)
    assert "can be written by everyone" in refusal(script)
    script.chmod(0o775)
    assert "can be written by the members of group" in refusal(script)


def test_a_directory_that_others_can_write_is_refused(script):
    script.parent.chmod(0o777)
    assert "can be written by everyone" in refusal(script)


@root_only
def test_a_program_or_directory_of_another_user_is_refused(script):
    os.chown(script, 65534, 65534)
    assert "belongs to user 65534" in refusal(script)
    os.chown(script, 0, 0)
    os.chown(script.parent, 65534, 65534)
    assert "belongs to user 65534" in refusal(script)


@root_only
def test_the_hint_never_changes_the_owner_of_a_home(tmp_path, monkeypatch):
    """A home that belongs to root locks its user out, so the hint is to move the hook."""
    homes = tmp_path / "home"
    monkeypatch.setattr("cnprocd.safe_open._HOMES", (f"{homes}/",))
    script = homes / "bob" / "clean"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    os.chown(script, 65534, 65534)
    for path in (script, script.parent, homes):
        with pytest.raises(HookRefusedError) as refused:
            open_program(str(script))
        assert f"{path} belongs to user 65534" in refused.value.what
        assert refused.value.hint == "move the hook to a root-owned directory such as /usr/local/lib/cnprocd"
        os.chown(path.parent, 65534, 65534)


@root_only
def test_the_hint_for_an_interpreter_is_another_one(script, tmp_path):
    (tmp_path / "venv").mkdir()
    shutil.copy("/bin/sh", tmp_path / "venv" / "python")
    script.write_text(f"#!{tmp_path}/venv/python\n")
    os.chown(tmp_path / "venv", 65534, 65534)
    with pytest.raises(HookRefusedError) as refused:
        open_program(str(script))
    assert refused.value.hint == "use an interpreter in a root-owned directory such as /usr/bin"


@root_only
def test_a_link_of_another_user_is_refused(script, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(script)
    os.lchown(link, 65534, 65534)
    assert "belongs to user 65534" in refusal(link)


def test_a_script_is_no_safer_than_its_interpreter(script, tmp_path):
    interpreter = tmp_path / "interpreter"
    shutil.copy("/bin/sh", interpreter)
    script.write_text(f"#!{interpreter} -e\n")
    interpreter.chmod(0o755)
    opened(script)
    interpreter.chmod(0o757)
    assert "is a script of" in refusal(script)
    interpreter.unlink()
    assert "No such file" in refusal(script)


def test_odd_first_lines_are_refused_not_followed_for_ever(script):
    script.write_text("#!\n")
    assert "empty #! line" in refusal(script)
    script.write_text("#!relative/sh\n")
    assert "not an absolute path" in refusal(script)
    script.write_text(f"#!{script}\n")
    assert "too many interpreters" in refusal(script)
