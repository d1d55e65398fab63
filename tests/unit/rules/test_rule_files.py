"""The digests of rule files: every change is seen, and reading them can neither fail nor block."""

import os

import pytest

from cnprocd.rules.language.disabled import load_in_force
from cnprocd.rules.rule_files import changed, disabled_path, file_digests, rule_files

RULES = "rules:\n  - {name: a, events: exit}\n"


@pytest.fixture
def main_file(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(RULES)
    return file


def on_disk(main_file):
    return file_digests(rule_files(main_file))


def test_digests_of_loaded_rules_are_those_on_the_disk(main_file):
    disabled_path(main_file).write_text("a\n")
    loaded = load_in_force(main_file)
    assert set(loaded.file_digests) == {main_file, main_file.with_name("disabled")}
    assert changed(loaded.file_digests, on_disk(main_file)) == ()


def test_each_way_to_change_the_files_is_seen(main_file):
    before = on_disk(main_file)
    times = main_file.stat()
    main_file.write_text(RULES.replace("exit", "exec"))
    os.utime(main_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed(before, on_disk(main_file)) == (main_file,)
    disabled = disabled_path(main_file)
    disabled.write_text("a\n")
    main_file.write_text(RULES)
    assert changed(before, on_disk(main_file)) == (disabled,)
    disabled.unlink()
    assert changed(before, on_disk(main_file)) == ()
    main_file.unlink()
    assert changed(before, on_disk(main_file)) == (main_file,)


def test_what_cannot_be_read_has_a_digest_and_blocks_nothing(tmp_path):
    pipe, loop = tmp_path / "pipe.yaml", tmp_path / "loop.yaml"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    before = os.listdir("/proc/self/fd")
    found = file_digests((pipe, loop, tmp_path, tmp_path / "none"))
    assert set(found) == {pipe, loop, tmp_path}
    assert "symbolic links" in found[loop]
    assert os.listdir("/proc/self/fd") == before
