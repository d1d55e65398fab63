"""`cnprocctl check FILE...` and `-`: files of any directory, checked together, with places that a user can find."""

import io
import os
import subprocess
import sys

import pytest
from unit.ctlkit import ctl, ctl_json

from cnprocd.errors import EX_CONFIG, EX_OK

GOOD = "rules:\n  - {name: a, events: [exit], match: {user: 5}}\n"
BAD = "rules:\n  - name: a\n    events: [died]\n"


def checked(*words, text):
    """`check` as a process that reads `text` from its standard input: (status, stdout, stderr)."""
    command = [sys.executable, "-m", "cnprocd.cli.cnprocctl", "check", *words]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_check_of_standard_input_names_it_with_a_dash():
    assert checked("-", text=GOOD) == (EX_OK, "-: 1 rule, no errors\n", "")
    status, out, err = checked("-", text=BAD)
    assert (status, out) == (EX_CONFIG, "")
    assert err.splitlines()[0].startswith("-:3:14: ")
    assert "standard-input" not in err


@pytest.mark.parametrize("words", ["check -", "test --event -"])
def test_a_closed_standard_input_is_reported(tmp_path, words):
    (tmp_path / "rules.yaml").write_text(GOOD)
    command = f"{sys.executable} -m cnprocd.cli.cnprocctl --rules {tmp_path}/rules.yaml {words} <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stderr == "cnprocctl: cannot read standard input: it is closed: give the name of a file\n"


def test_warnings_of_standard_input_have_their_place(monkeypatch):
    hooked = "rules:\n  - {name: a, events: [exit], run: {command: [/bin/true], user: 5}}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(hooked.encode())))
    status, found = ctl_json("check", "-")
    assert (status, found["files"], found["rules"]) == (EX_OK, ["-"], 1)
    (warning,) = found["warnings"]
    assert (warning["file"], warning["line"], warning["kind"]) == ("-", 2, "timeout")


def test_a_clash_with_standard_input_names_it_with_a_dash(tmp_path):
    main = tmp_path / "rules.yaml"
    main.write_text(GOOD)
    status, _, err = checked("-", str(main), text=GOOD)
    assert status == EX_CONFIG
    assert f'{main}:2:12: duplicate rule name "a": also at -:2:12' in err


def test_check_reads_the_pipe_of_a_process_substitution(tmp_path):
    """As in `cnprocctl check <(make-rules)`: /dev/fd/N is a link to a pipe, which has no path."""
    inside, outside = os.pipe()
    with os.fdopen(inside), os.fdopen(outside, "w") as writing:
        writing.write(BAD)
        writing.close()
        status, _, err = ctl("check", f"/dev/fd/{inside}")
    assert status == EX_CONFIG
    assert err.splitlines()[0].startswith(f"/dev/fd/{inside}:3:14: ")
    assert "cnprocctl-" not in err


def test_a_named_pipe_is_refused_at_once(tmp_path):
    """As by the daemon. Nothing writes to it, so an open for reading would wait for ever."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "link").symlink_to("pipe")
    command = [sys.executable, "-m", "cnprocd.cli.cnprocctl", "check"]
    for name in ("pipe", "link"):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, "is a named pipe" in done.stderr) == (EX_CONFIG, True), done.stderr


def test_a_file_that_is_named_twice_is_checked_once(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(GOOD)
    assert ctl("check", str(file), str(file)) == (EX_OK, f"{file}: 1 rule, no errors\n", "")
    assert checked("-", "-", text=GOOD) == (EX_OK, "-: 1 rule, no errors\n", "")


def test_check_of_a_file_needs_no_rules_option(tmp_path):
    file = tmp_path / "new.yaml"
    file.write_text(GOOD)
    assert ctl("check", str(file)) == (EX_OK, f"{file}: 1 rule, no errors\n", "")


def test_files_are_checked_together_as_main_file_and_drop_ins(tmp_path):
    """A list of the main file is known in a drop-in; settings belong in the first file only."""
    main, dropin = tmp_path / "rules.yaml", tmp_path / "10-oracle.yaml"
    main.write_text("lists: {oracle: ['ora_*']}\nrules: []\n")
    dropin.write_text("rules:\n  - {name: a, events: [exec], match: {comm: $oracle, user: 5}}\n")
    assert ctl("check", str(main), str(dropin)) == (EX_OK, f"{main}, {dropin}: 1 rule, no errors\n", "")
    assert ctl("check", str(dropin))[0] == EX_CONFIG
    dropin.write_text("settings: {hook_slots: 2}\n")
    status, _, err = ctl("check", str(main), str(dropin))
    assert (status, "settings are allowed only in the main file" in err) == (EX_CONFIG, True)


def test_every_error_of_every_file_is_shown(tmp_path):
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text(BAD.replace("name: a", f"name: {file.stem}"))
    status, _, err = ctl("check", *map(str, files))
    assert status == EX_CONFIG
    assert all(f"{file}:3:14: " in err for file in files)
    assert "2 errors" in err


@pytest.mark.parametrize("strict", [[], ["--strict"]])
def test_a_file_that_does_not_exist_is_an_error(tmp_path, strict):
    status, out, err = ctl("check", *strict, str(tmp_path / "none.yaml"))
    assert (status, out) == (EX_CONFIG, "")
    assert "the file does not exist" in err
