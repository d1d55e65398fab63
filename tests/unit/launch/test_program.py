"""program.py: a program that another user could have changed is refused, with reason and hint."""

import os
import shutil
import time

import pytest

from cnprocd.launch import program
from cnprocd.launch.program import CHANGING_NS, HookRefusedError, Programs, comm_is_kept, open_program
from cnprocd.safe_open import safe_open

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


def wait_out(*paths):
    """Wait until the last change of these and their parents is old enough: no call sets a change time."""
    while max(os.lstat(one).st_ctime_ns for path in paths for one in (path, *path.parents)) >= time.time_ns() - 2 * (
        CHANGING_NS
    ):
        time.sleep(0.01)


@pytest.fixture
def unchanged(script):
    wait_out(script)
    return script


def walks(monkeypatch):
    """Count how often a path is walked."""
    walked = []
    monkeypatch.setattr(program, "safe_open", lambda path, hint: walked.append(str(path)) or safe_open(path, hint))
    return walked


def opened_by(programs, path):
    found = programs.open(str(path))
    os.close(found.fd)
    return found


def test_a_check_is_cached_while_nothing_changes(unchanged, monkeypatch):
    programs, walked = Programs(), walks(monkeypatch)
    first = opened_by(programs, unchanged)
    assert walked == [str(unchanged), "/bin/sh"]
    again = opened_by(programs, unchanged)
    assert walked == [str(unchanged), "/bin/sh"]
    assert (again.path, again.inode, again.by_fd) == (first.path, first.inode, first.by_fd)


CHANGES = {
    "the program is made writable": lambda script: script.chmod(0o757),
    "a directory is made writable": lambda script: script.parent.chmod(0o777),
    "the program is no more executable": lambda script: script.chmod(0o644),
    "the program is gone": lambda script: script.unlink(),
    "another file is in its place": lambda script: (
        script.with_name("new").write_text("#!/no/such\n"),
        script.with_name("new").chmod(0o755),
        script.with_name("new").rename(script),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cached_check_does_not_outlive_a_change(unchanged, change):
    programs = Programs()
    opened_by(programs, unchanged)
    CHANGES[change](unchanged)
    with pytest.raises(HookRefusedError):
        opened_by(programs, unchanged)


def test_a_link_that_now_leads_elsewhere_is_followed(unchanged, tmp_path):
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"  # no component of the resolved path changes
    elsewhere.mkdir()
    far, near, other = elsewhere / "far", elsewhere / "near", elsewhere / "other"
    far.symlink_to(unchanged)
    near.symlink_to(far)
    wait_out(unchanged, near)
    programs = Programs()
    opened_by(programs, near)
    assert programs._checked
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    far.unlink()
    far.symlink_to(other)
    assert opened_by(programs, near).path == os.path.realpath(other)


def test_an_interpreter_that_is_made_writable_is_noticed(unchanged, tmp_path):
    interpreter = tmp_path / "interpreter"
    shutil.copy("/bin/sh", interpreter)
    unchanged.write_text(f"#!{interpreter}\n")
    wait_out(interpreter, unchanged)
    programs = Programs()
    opened_by(programs, unchanged)
    assert programs._checked
    interpreter.chmod(0o757)
    with pytest.raises(HookRefusedError):
        opened_by(programs, unchanged)


def test_a_program_that_has_just_changed_is_checked_again(script, monkeypatch):
    programs, walked = Programs(), walks(monkeypatch)
    monkeypatch.setattr(program, "CHANGING_NS", 3600 * 10**9)
    opened_by(programs, script)
    opened_by(programs, script)
    assert walked.count(str(script)) == 2


def test_odd_first_lines_are_refused_not_followed_for_ever(script):
    script.write_text("#!\n")
    assert "empty #! line" in refusal(script)
    script.write_text("#!relative/sh\n")
    assert "not an absolute path" in refusal(script)
    script.write_text(f"#!{script}\n")
    assert "too many interpreters" in refusal(script)
