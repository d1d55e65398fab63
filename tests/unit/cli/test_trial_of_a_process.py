"""`test` and `explain` of a running process, whose program rules name: the answer is that of its exit record."""

import os
import shutil
import subprocess

from unit.ctlkit import ctl, ctl_json

from cnprocd.errors import EX_NO


def copy_of_sleep(path):
    shutil.copy(os.path.realpath(shutil.which("sleep")), path)
    return path


def executed(*argv, **options):
    """A process that executes `argv` when this returns."""
    child = subprocess.Popen(argv, **options)
    assert child.poll() is None
    return child


def test_a_file_without_a_path_is_none_of_the_named_ones(tmp_path):
    """Its exit record names another file than theirs, so a `not` of their paths holds, as when it is killed."""
    named, file = copy_of_sleep(tmp_path / "named"), tmp_path / "rules.yaml"
    match = f"{{signal: KILL, not: {{exe: {named}}}}}"
    file.write_text(f"rules:\n  - {{name: other, events: [exit], match: {match}}}\n")
    memory = os.memfd_create("named", 0)
    os.write(memory, named.read_bytes())
    for argv, matches in (([f"/proc/self/fd/{memory}", "600"], True), ([str(named), "600"], False)):
        child = executed(*argv, pass_fds=[memory])
        try:
            fires = [
                one["rule"] for one in ctl_json("test", "--pid", str(child.pid), "--signal", "KILL", rules=file)[1]
            ]
            why = ctl_json("explain", "--pid", str(child.pid), "--signal", "KILL", rules=file)[1]
        finally:
            child.kill()
            child.wait()
        assert (fires == ["other"], why[0]["fires"]) == (matches, matches), argv
    os.close(memory)


def test_of_a_moved_program_names_what_only_the_daemon_knows(tmp_path):
    named, file = copy_of_sleep(tmp_path / "named"), tmp_path / "rules.yaml"
    file.write_text(f"rules:\n  - {{name: a, events: [exit], match: {{exe: {named}}}}}\n")
    note = "only the daemon knows paths that it had before"
    child = executed(str(named), "600")
    try:
        words = ("test", "--pid", str(child.pid), "--signal", "KILL")
        assert note not in ctl(*words, rules=file)[1]
        named.rename(tmp_path / "moved")
        status, out, _ = ctl(*words, rules=file)
    finally:
        child.kill()
        child.wait()
    assert (status, note in out) == (EX_NO, True)
