"""`cnprocctl rules read` and `rules write`: an editor changes what its user has edited, and nothing else."""

import io
import os
import stat
import sys

import pytest
from unit.ctlkit import ctl, ctl_json

from cnprocd.cli import rule_edit
from cnprocd.cli.remote import reads_input
from cnprocd.cli.rule_edit import ABSENT, require_rule_file, text_of
from cnprocd.errors import EX_CONFIG, EX_NO, EX_OK
from cnprocd.rules.rule_files import DROPIN_DIRS, LARGEST, MAIN_FILE

EX_USAGE = 2
OLD, NEW = "rules: []\n", "rules: []  # edited\n"


@pytest.fixture
def rules(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(OLD)
    return file


@pytest.fixture
def write(monkeypatch, rules):
    """Return a function that writes a text as an editor does, and returns the exit status."""

    def written(text=NEW, file=rules, *options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return ctl("rules", "write", str(file), *options, rules=file)[0]

    return written


def hash_of(file):
    return ctl_json("rules", "read", str(file), rules=file)[1]["hash"]


def test_write_keeps_mode_and_owner(rules, write):
    rules.chmod(0o640)
    owner = (0, 12) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(rules, *owner)
    assert write() == EX_OK
    found = rules.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, *owner)
    assert rules.read_text() == NEW


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes security labels and others' access lists")
def test_write_keeps_the_access_list(rules, write):
    group_12_reads = bytes.fromhex(
        "0200000001000600ffffffff04000400ffffffff080004000c00000010000400ffffffff20000000ffffffff"
    )
    try:
        os.setxattr(rules, "system.posix_acl_access", group_12_reads)
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")
    assert write() == EX_OK
    assert os.getxattr(rules, "system.posix_acl_access") == group_12_reads


def test_write_goes_to_the_target_of_a_link(rules, write, tmp_path):
    link = tmp_path / "link.yaml"
    link.symlink_to("rules.yaml")
    assert write(NEW, link) == EX_OK
    assert link.is_symlink() and rules.read_text() == NEW
    assert ctl_json("rules", "read", str(link), rules=link)[1]["target"] == str(rules)


def test_a_link_to_nothing_is_not_written(write, tmp_path):
    link = tmp_path / "link.yaml"
    link.symlink_to("missing")
    assert write(NEW, link) == EX_USAGE
    assert link.is_symlink() and not (tmp_path / "missing").exists()


def test_a_file_that_others_can_write_is_not_written(rules, write):
    rules.chmod(0o666)
    assert write() == EX_CONFIG
    assert rules.read_text() == OLD


def test_a_new_file_in_a_directory_of_others_is_not_written(write, tmp_path):
    tmp_path.chmod(0o777)
    assert write(NEW, tmp_path / "new.yaml") == EX_CONFIG
    assert not (tmp_path / "new.yaml").exists()


def test_write_replaces_only_the_content_that_was_read(rules, write):
    before = hash_of(rules)
    rules.write_text("rules: []  # of another session\n")
    assert write(NEW, rules, "--hash", before) == EX_NO
    assert rules.read_text().endswith("of another session\n")
    assert write(NEW, rules, "--hash", hash_of(rules)) == EX_OK
    assert rules.read_text() == NEW


def test_a_new_file_is_written_once(write, tmp_path):
    file = tmp_path / "new.yaml"
    assert hash_of(file) == ABSENT
    assert write(NEW, file, "--hash", ABSENT) == EX_OK
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert write(OLD, file, "--hash", ABSENT) == EX_NO
    assert file.read_text() == NEW


def test_a_failed_write_leaves_the_file_and_nothing_else(rules, write, monkeypatch, tmp_path):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert write() != EX_OK
    assert rules.read_text() == OLD
    assert list(tmp_path.iterdir()) == [rules]


def test_files_of_packages_are_not_written(rules, write, monkeypatch, tmp_path):
    """Neither by their path nor through a link of the administrator's directory."""
    own, package = tmp_path / "own", tmp_path / "package"
    package.mkdir()
    (package / "a.yaml").write_text(OLD)
    for module in (rule_edit, sys.modules["cnprocd.rules.rule_files"]):
        monkeypatch.setattr(module, "DROPIN_DIRS", (own, tmp_path / "run", package))
    with pytest.raises(rule_edit.RuleFileError):
        rule_edit.write_text(package / "a.yaml", b"", None)
    rule_edit.write_text(own / "b.yaml", NEW.encode(), ABSENT)
    assert (own / "b.yaml").read_text() == NEW
    (own / "a.yaml").symlink_to(package / "a.yaml")
    with pytest.raises(rule_edit.RuleFileError):
        rule_edit.write_text(own / "a.yaml", b"", None)
    assert (package / "a.yaml").read_text() == OLD


def test_only_rule_files_are_read(tmp_path):
    assert require_rule_file(MAIN_FILE, None) == MAIN_FILE
    assert require_rule_file(DROPIN_DIRS[0] / "a.yaml", None) == DROPIN_DIRS[0] / "a.yaml"
    for path in ("/etc/shadow", f"{DROPIN_DIRS[0]}/../../shadow", f"{DROPIN_DIRS[0]}/a.yml", "/etc/cnprocd/disabled"):
        assert ctl("rules", "read", path)[0] == EX_USAGE
    assert ctl("rules", "read", str(MAIN_FILE), rules=tmp_path / "rules.yaml")[0] == EX_USAGE


@pytest.mark.parametrize(
    ("data", "text", "newline", "editable"),
    [
        (b"a\nb\n", "a\nb\n", "\n", True),
        (b"a\r\nb\r\n", "a\nb\n", "\r\n", True),
        (b"a", "a", "\n", True),
        ("\ufeffa\u2028b\n".encode(), "\ufeffa\u2028b\n", "\n", True),
        (b"a\r\nb\n", "a\nb\n", "\n", False),
        (b"a\rb\r", "a\nb\n", "\n", False),
        (b"a\n\xff\n", "a\n\\xff\n", "\n", False),
    ],
)
def test_text_is_editable_only_if_it_can_be_written_back(data, text, newline, editable):
    found = text_of(data)
    assert (found.text, found.newline, found.read_only is None) == (text, newline, editable)
    if editable:
        assert found.text.replace("\n", found.newline).encode() == data


def test_the_reason_names_the_line_that_is_not_utf_8():
    assert text_of(b"a\n\n\xe9\n").read_only == "line 3 is not UTF-8 (byte 0xe9)"


@pytest.mark.parametrize("kind", ["large", "fifo", "directory"])
def test_what_the_daemon_does_not_load_is_not_read(kind, tmp_path):
    file = tmp_path / "rules.yaml"
    if kind == "large":
        file.write_bytes(b"#" * (LARGEST + 1))
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    status, out, err = ctl("rules", "read", str(file), rules=file)
    assert status != EX_OK and out == "" and "cannot read" in err


def test_too_much_is_not_written(rules, write):
    assert write("#" * (LARGEST + 1)) == EX_USAGE
    assert rules.read_text() == OLD


def test_over_ssh_standard_input_reaches_the_verb():
    assert reads_input(["rules", "write", "/etc/cnprocd/rules.yaml"])
    assert reads_input(["record", "--hold"])
    assert not reads_input(["rules", "read", "/etc/cnprocd/rules.yaml"])
