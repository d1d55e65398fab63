"""`check` and `doctor` look at the hooks and files of this machine as the runner and the daemon do."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from unit.ctlkit import ctl, ctl_json

from cnprocd.cli import this_machine
from cnprocd.errors import EX_CONFIG, EX_OK

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make files of other users")


@pytest.fixture
def hook(tmp_path):
    file = tmp_path / "hooks" / "clean"
    file.parent.mkdir()
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def written(tmp_path, hook, more=""):
    file = tmp_path / "rules.yaml"
    file.write_text(
        f"rules:\n  - name: a\n    events: [exit]\n    match: {{user: 5}}{more}\n"
        f'    run:\n      command: [{hook}, "{{pid}}"]\n      timeout: 5s\n'
    )
    return file


def hook_warning(rules):
    """Return the only warning of `check`, which is about the hook."""
    status, found = ctl_json("check", rules=rules)
    assert status == EX_OK
    (warning,) = found["warnings"]
    assert (warning["kind"], warning["line"], warning["column"]) == ("hook", 6, 17)
    return f"{warning['message']} -> {warning['hint']}"


def no_interpreter(hook):
    hook.write_text("#!/nowhere/python\n")


def no_first_line(hook):
    hook.write_text("echo done\n")


BROKEN = {
    "missing": (Path.unlink, "No such file or directory -> install the program"),
    "not executable": (lambda hook: hook.chmod(0o644), "is not executable -> chmod +x"),
    "no interpreter": (no_interpreter, "is a script of /nowhere/python: cannot open /nowhere/python"),
    "a script without #!": (no_first_line, "neither a program nor a script with a #! line -> begin a script with"),
    "empty": (lambda hook: hook.write_text(""), "neither a program nor a script with a #! line -> begin a script with"),
    "writable": (lambda hook: hook.chmod(0o777), "can be written by everyone -> remove the permission: chmod go-w"),
    "in a writable directory": (lambda hook: hook.parent.chmod(0o777), "hooks can be written by everyone"),
}


@pytest.mark.parametrize(("damage", "expected"), BROKEN.values(), ids=BROKEN)
def test_check_warns_of_a_hook_that_cannot_run(tmp_path, hook, damage, expected, monkeypatch):
    monkeypatch.setattr(this_machine, "_has_other_formats", lambda: False)  # an emulator may be registered
    rules = written(tmp_path, hook)
    assert ctl_json("check", rules=rules)[1]["warnings"] == []
    damage(hook)
    assert expected in hook_warning(rules)


@as_root
@pytest.mark.parametrize("part", ["hook", "directory"])
def test_check_warns_of_a_hook_of_another_user(tmp_path, hook, part):
    os.chown(hook if part == "hook" else hook.parent, 65534, 65534)
    assert "belongs to user 65534" in hook_warning(written(tmp_path, hook))


def test_strict_check_fails_for_a_hook_that_cannot_run(tmp_path):
    rules = written(tmp_path, tmp_path / "none")
    assert ctl("check", "--strict", rules=rules)[0] == EX_CONFIG
    assert ctl("check", "--strict", "--other-host", rules=rules)[0] == EX_OK


def test_the_hook_of_a_disabled_rule_is_not_checked(tmp_path):
    rules = written(tmp_path, tmp_path / "none", "\n    enabled: false")
    assert ctl_json("check", rules=rules)[1]["warnings"] == []


def test_check_for_another_host_takes_any_user(tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [{name: a, events: exit, match: {user: [no-such-user, other], group: no-such-group}}]\n")
    assert ctl("check", rules=rules)[0] == EX_OK  # with a warning: the name service may know them later
    assert ctl("check", "--strict", rules=rules)[0] == EX_CONFIG
    assert ctl("check", "--strict", "--other-host", rules=rules)[0] == EX_OK
    assert ctl("check", "--other-host", str(rules))[0] == EX_OK


def finding(rules, tmp_path):
    """Return what `doctor` reports about the hook."""
    found = ctl_json("doctor", "--runtime-dir", str(tmp_path), rules=rules)[1]
    (one,) = [one for one in found if one["what"].startswith("hook of a")]
    return one


def test_doctor_reports_a_hook_as_check_does(tmp_path, hook):
    rules = written(tmp_path, hook)
    assert finding(rules, tmp_path)["level"] == "pass"
    hook.chmod(0o644)
    found = finding(rules, tmp_path)
    assert (found["level"], found["fix"]) == ("fail", f"chmod +x {hook}")
    assert found["what"].removeprefix("hook of a: ") in hook_warning(rules)


@as_root
@pytest.mark.parametrize("part", ["home", "directory", "hook"])
def test_doctor_never_changes_the_owner_in_a_home(tmp_path, hook, monkeypatch, part):
    """The hint is to move the hook: chown of a home locks its user out."""
    monkeypatch.setattr("cnprocd.safe_open._HOMES", (f"{tmp_path}/home/",))
    home = tmp_path / "home" / "bob"
    home.parent.mkdir()
    hook.parent.rename(home)
    owned = {"home": home.parent, "directory": home, "hook": home / "clean"}[part]
    os.chown(owned, 65534, 65534)
    found = finding(written(tmp_path, home / "clean"), tmp_path)
    assert f"{owned} belongs to user 65534" in found["what"]
    assert found["fix"] == "move the hook to a root-owned directory such as /usr/local/lib/cnprocd"


@pytest.fixture
def public():
    """A directory that every user can search; pytest's own ones are private."""
    directory = Path(tempfile.mkdtemp(prefix="cnprocd-rules-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def unreadable(rules):
    return [one for one in ctl_json("check", rules=rules)[1]["warnings"] if one["kind"] == "unreadable"]


@as_root
def test_check_warns_of_files_that_the_daemon_cannot_read(public, monkeypatch):
    monkeypatch.setattr(this_machine, "SERVICE_USER", "nobody")
    rules = written(public, "/bin/true")
    rules.chmod(0o644)
    assert unreadable(rules) == []
    rules.chmod(0o640)
    (public / "disabled").write_text("# none\n")
    (public / "disabled").chmod(0o600)
    first, second = unreadable(rules)
    assert (first["file"], second["file"]) == (str(rules), str(public / "disabled"))
    assert first["message"] == f"the user nobody cannot read {rules}"
    assert first["hint"] == f"chgrp nobody {rules} && chmod g+r {rules}"
    found = ctl_json("doctor", "--runtime-dir", str(public), rules=rules)[1]
    assert [one["level"] for one in found if one["what"] == first["message"]] == ["fail"]
    assert unreadable_of_drafts(rules) == []


def unreadable_of_drafts(rules):
    """A file that is named on the command line is a draft, not a file that the daemon reads."""
    return [one for one in ctl_json("check", str(rules))[1]["warnings"] if one["kind"] == "unreadable"]


@as_root
def test_check_names_the_directory_that_denies_access(public, monkeypatch):
    monkeypatch.setattr(this_machine, "SERVICE_USER", "nobody")
    (public / "private" / "below").mkdir(parents=True)
    rules = written(public / "private" / "below", "/bin/true")
    (public / "private").chmod(0o700)
    (warning,) = unreadable(rules)
    assert warning["message"] == f"the user nobody cannot read {rules} because of {public}/private"
    assert warning["hint"] == "move the rule files to /etc/cnprocd"
    monkeypatch.setattr(this_machine, "_SYSTEM", (f"{public}/",))
    (warning,) = unreadable(rules)
    assert warning["hint"] == f"chgrp nobody {public}/private && chmod g+rx {public}/private"


def test_without_the_user_nothing_is_unreadable(public, monkeypatch):
    monkeypatch.setattr(this_machine, "SERVICE_USER", "no-such-user")
    rules = written(public, "/bin/true")
    rules.chmod(0o600)
    assert unreadable(rules) == []


def rules_with(tmp_path, match, more="log: true"):
    file = tmp_path / "rules.yaml"
    file.write_text(f"rules:\n  - name: a\n    events: [exit]\n    match: {match}\n    {more}\n")
    return file


def test_an_exe_over_a_symbolic_link_is_warned_about(tmp_path):
    real = Path(shutil.copy("/bin/true", tmp_path / "real"))
    link = tmp_path / "link"
    link.symlink_to(real)
    status, found = ctl_json("check", rules=rules_with(tmp_path, f"{{any: [{{exe: {real}}}, {{exe: {link}}}]}}"))
    assert status == EX_OK
    (warning,) = found["warnings"]
    assert (warning["kind"], warning["hint"]) == ("symlink", f'write "{real}"')
    assert "never matches" in warning["message"]
    (warning,) = ctl_json("check", rules=rules_with(tmp_path, f"{{exe: {tmp_path}/../{tmp_path.name}/link}}"))[1][
        "warnings"
    ]
    assert (warning["kind"], warning["hint"]) == ("never", f'write "{link}"'), "not the link, but the .."
    for match in (f"{{exe: {real}}}", f"{{exe: {tmp_path}/not-there}}", f'{{exe: "{tmp_path}/lin*"}}'):
        assert ctl_json("check", rules=rules_with(tmp_path, match))[1]["warnings"] == []
    assert ctl_json("check", "--other-host", rules=rules_with(tmp_path, f"{{exe: {link}}}"))[1]["warnings"] == []


def test_an_exe_that_is_a_script_is_warned_about(tmp_path, hook):
    (warning,) = ctl_json("check", rules=rules_with(tmp_path, f"{{exe: {hook}}}"))[1]["warnings"]
    assert warning["kind"] == "script"
    assert ctl_json("check", rules=rules_with(tmp_path, f'{{cmdline: "*{hook}*"}}'))[1]["warnings"] == []


@pytest.mark.parametrize(
    ("match", "more", "lacks"),
    [
        ("{max_rss: '> 1M'}", "log: true", "kernel"),
        ("{oom_killed: true}", "log: true", "/dev/kmsg"),
        ("{comm: x}", "record: [loginuid]", "/proc/self/loginuid"),
    ],
)
def test_an_attribute_that_this_kernel_has_not_is_warned_about(tmp_path, monkeypatch, match, more, lacks):
    rules = rules_with(tmp_path, match, more)
    exists, there = os.path.exists, {"/dev/kmsg", "/proc/self/loginuid"}
    monkeypatch.setattr(os.path, "exists", lambda path: path in there or exists(path))
    assert ctl_json("check", rules=rules)[1]["warnings"] == []
    there.discard(lacks)
    monkeypatch.setattr(os.path, "exists", lambda path: path in there or (path != lacks and exists(path)))
    release = "5.10.0-8-amd64" if lacks == "kernel" else "6.1"
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "h", release, "v", "x86_64")))
    (warning,) = ctl_json("check", rules=rules)[1]["warnings"]
    assert warning["kind"] == "unavailable"
