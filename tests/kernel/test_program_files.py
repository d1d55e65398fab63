"""Programs by the identity of their files: exit records against stat(2), and named paths over upgrades."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cnprocd.connector.taskstats import Taskstats
from cnprocd.process.files import FileId, KnownFiles
from cnprocd.process.lookup_child import file_at
from cnprocd.process.watched_files import MountTable, WatchedFiles


def file_id(path: str) -> FileId | None:
    found = FileId(*file_at(path.encode()))
    return found if found.inode else None


def look_up(paths):
    return [file_id(path) for path in paths]


FAILING = ("false", "test", "expr", "sleep")


@pytest.fixture
def records():
    taskstats = Taskstats(8 << 20)
    yield lambda: {record.pid: FileId(record.exe_device, record.exe_inode) for record in taskstats.drain().records}
    taskstats.close()


@pytest.fixture
def known(tmp_path):
    files = KnownFiles()
    watched = WatchedFiles(files, look_up)
    yield files, watched
    watched.close()


def failing(program: str | Path) -> int:
    process = subprocess.Popen([program], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert process.wait() != 0
    return process.pid


def running(program: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([program, "600"])


@pytest.mark.parametrize("name", FAILING)
def test_a_record_names_the_file_that_stat_shows(name, records):
    program = os.path.realpath(shutil.which(name))
    pids = [failing(program) for _ in range(50)]
    found = records()
    stat = os.stat(program)
    assert {found[pid] for pid in pids} == {FileId(stat.st_dev, stat.st_ino)} == {file_id(program)}


def mounted(tmp_path, *arguments):
    point = tmp_path / "mounted"
    point.mkdir()
    subprocess.run(["mount", *arguments, point], check=True)
    return point


def test_a_record_equals_stat_where_the_device_is_trusted(tmp_path, records):
    """tmpfs, overlayfs on one filesystem, and on two: where the device is trusted the record is stat's file."""
    layers = mounted(tmp_path, "-t", "tmpfs", "tmpfs")
    try:
        for name in ("lower", "upper", "work", "one", "two"):
            (layers / name).mkdir()
        shutil.copy("/bin/false", layers / "lower" / "lower-false")
        writable = f"upperdir={layers}/upper,workdir={layers}/work"
        trusted = {}
        for lower, merged in ((f"{layers}/lower", layers / "one"), (f"{layers}/lower:/usr/bin", layers / "two")):
            options = f"lowerdir={lower},{writable}"
            subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
            try:
                shutil.copy("/bin/false", merged / "upper-false")
                for program in (layers / "lower" / "lower-false", merged / "upper-false", merged / "lower-false"):
                    pid = failing(program)
                    if MountTable().now().identifies(file_id(str(program)).device):
                        trusted[str(program)] = records()[pid] == file_id(str(program))
            finally:
                subprocess.run(["umount", merged], check=True)
        assert set(map(os.path.dirname, trusted)) == {f"{layers}/lower", f"{layers}/one"}
        assert all(trusted.values())
    finally:
        subprocess.run(["umount", layers], check=True)


@pytest.mark.skipif(shutil.which("mkfs.btrfs") is None, reason="needs btrfs-progs")
def test_btrfs_is_not_trusted_and_says_why(tmp_path, known):
    """Two subvolumes give one device and inode number to two files."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    point = mounted(tmp_path, "-o", "loop", image)
    try:
        program = shutil.copy("/bin/false", point / "false")
        files, watched = known
        watched.use([str(program)])
        assert files.current(str(program)) is None
        assert [one.path for one in watched.unwatched] == [str(program)]
    finally:
        subprocess.run(["umount", point], check=True)


def test_a_replaced_file_is_known_before_its_first_death(tmp_path, known, records):
    files, watched = known
    program = Path(shutil.copy("/bin/false", tmp_path / "d"))
    watched.use([str(program)])
    for _ in range(50):
        new = shutil.copy("/bin/false", tmp_path / "d.new")
        os.rename(new, program)
        pid = failing(program)
        found = records()
        watched.refresh()
        assert files.find(found[pid]).paths == (str(program),)
        watched.let_go()


def test_an_upgraded_file_is_known_until_its_last_death(tmp_path, known, records):
    files, watched = known
    program = Path(shutil.copy("/bin/sleep", tmp_path / "d"))
    watched.use([str(program)])
    old = file_id(str(program))
    process = running(program)
    os.rename(shutil.copy("/bin/sleep", tmp_path / "d.new"), program)
    for _ in range(3):
        watched.refresh()
        watched.let_go()
    assert files.find(old).is_deleted
    process.kill()
    process.wait()
    assert records()[process.pid] == old
    watched.refresh()
    assert files.find(old).paths == (str(program),)  # its own record is of this batch
    watched.let_go()
    assert files.find(old).paths == (str(program),)  # or it came while this was read, and is of the next
    watched.let_go()
    assert files.find(old) is None
    assert files.find(file_id(str(program))).paths == (str(program),)


def test_a_file_replaced_before_start_is_taken_from_a_process(tmp_path, known):
    files, watched = known
    program = Path(shutil.copy("/bin/sleep", tmp_path / "d"))
    old = file_id(str(program))
    process = running(program)
    os.rename(shutil.copy("/bin/sleep", tmp_path / "d.new"), program)
    watched.use([str(program)])
    assert files.find(old) is None
    watched.keep_old(str(program), process.pid, old)
    assert files.find(old).is_deleted
    process.kill()
    process.wait()
    watched.refresh()
    watched.let_go()
    watched.let_go()
    assert files.find(old) is None


def test_a_deleted_and_a_new_file_and_a_new_directory_are_seen(tmp_path, known):
    files, watched = known
    directory = tmp_path / "opt"
    program = directory / "d"
    watched.use([str(program)])
    assert files.current(str(program)) is None
    directory.mkdir()
    shutil.copy("/bin/false", program)
    watched.look_again()
    first = files.current(str(program))
    assert first == file_id(str(program))
    program.unlink()
    watched.look_again()
    watched.refresh()
    watched.let_go()
    watched.let_go()
    assert (files.current(str(program)), files.find(first)) == (None, None)


def test_a_path_that_no_rule_names_is_watched_no_longer(tmp_path, known):
    files, watched = known
    one, two = (Path(shutil.copy("/bin/false", tmp_path / name)) for name in ("one", "two"))
    watched.use([str(one), str(two)])
    watched.use([str(two)])
    assert files.find(file_id(str(one))) is None
    assert files.find(file_id(str(two))).paths == (str(two),)
    watched.use([])
    os.rename(one, two)
    watched.refresh()
    assert files.named_paths == frozenset()
