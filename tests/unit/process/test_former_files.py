"""Files of the last daemon: exact with an open descriptor, in doubt without, and no descriptor is left open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cnprocd.process.file_names import FileNames, look_up_here
from cnprocd.process.files import FileId, FoundFile, NamedFile, Removal
from cnprocd.process.former_files import MOST_PINS, FormerFiles, pin_files
from cnprocd.process.model import Image, Process


class Proc:
    """/proc with these processes."""

    def __init__(self, *processes: Process) -> None:
        self.processes, self.scans = processes, 0

    def scan(self, wanted):
        assert wanted.exe
        self.scans += 1
        return self.processes


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def file_of(path: Path | int) -> FileId:
    found = os.stat(path)
    return FileId(found.st_dev, found.st_ino)


def made(path: Path) -> FileId:
    path.write_text("x")
    return file_of(path)


def replaced(path: Path) -> FileId:
    """Give the path another file, and let the number of the old one be given away at once."""
    new = made(path.with_suffix(".new"))
    os.rename(path.with_suffix(".new"), path)
    return new


@pytest.fixture
def names():
    names = FileNames(look_up_here)
    yield names
    names.close()


def known(path: Path, file: FileId) -> tuple[tuple[NamedFile, int], ...]:
    return ((NamedFile(str(path), file, True, None), 10),)


def test_a_file_that_is_open_is_still_that_file(names, tmp_path):
    path, before = tmp_path / "d", open_descriptors()
    old = made(path)
    pins = pin_files([one for one, _ in known(path, old)], Proc())
    new = replaced(path)
    names.take_over(FormerFiles(known(path, old), pins))
    names.use([str(path)], None)
    assert names.holds_former
    assert names.find(old, "d", start_ns=5) == FoundFile((str(path),), True, True)
    assert names.find(new, "d", start_ns=5) == FoundFile((str(path),), True, False)
    names.let_go()
    assert not names.holds_former
    assert open_descriptors() == before
    for _ in range(3):
        names.refresh()
        names.let_go()
    assert names.find(old, "d", start_ns=5) is None, "the kernel has let go of it"


def test_a_file_that_is_not_open_is_in_doubt_for_a_while(names, tmp_path):
    path = tmp_path / "d"
    old = made(path)
    held = os.open(path, os.O_PATH)
    replaced(path)
    names.take_over(FormerFiles(known(path, old)))
    names.use([str(path)], None)
    assert names.find(old, "d", start_ns=5) == FoundFile((), True, True)
    names.let_go()
    names.let_go()
    assert names.find(old, "d", start_ns=5) is None
    os.close(held)


def test_a_file_in_doubt_that_a_process_runs_is_confirmed(names, tmp_path):
    path = tmp_path / "d"
    old = file_of(Path("/proc/self/exe"))
    made(path)
    names.take_over(FormerFiles(known(path, old)))
    names.use([str(path)], None)
    names.learn(Process(os.getpid(), comm="d", exe=str(path), image=Image(str(path), True, old)))
    for _ in range(3):
        assert names.find(old, "d", start_ns=5) == FoundFile((str(path),), True, True)
        names.let_go()


def test_a_path_that_still_leads_to_its_file_is_not_in_doubt(names, tmp_path):
    path = tmp_path / "d"
    file = made(path)
    names.take_over(FormerFiles(known(path, file)))
    names.use([str(path)], None)
    for _ in range(3):
        assert names.find(file, "d", start_ns=5) == FoundFile((str(path),), True, False)
        names.let_go()


def test_other_rules_name_no_file_of_the_last_daemon(names, tmp_path):
    path = tmp_path / "d"
    old = made(path)
    replaced(path)
    names.take_over(FormerFiles(known(path, old)))
    names.use([str(tmp_path / "other")], None)
    names.use([str(path)], None)
    assert names.find(old, "d", start_ns=5) is None


def test_an_old_file_is_opened_by_a_process_that_runs_it(tmp_path):
    own, other = file_of(Path("/proc/self/exe")), FileId(1, 1)
    old = [NamedFile("/opt/d", file, False, Removal(1, 2)) for file in (own, other)]
    proc = Proc(Process(os.getpid(), exe="/opt/d", image=Image("/opt/d", True, own)), Process(1))
    (fd,) = pin_files(old, proc)
    assert file_of(fd) == own
    os.close(fd)
    made(tmp_path / "d")
    proc.scans = 0
    assert pin_files([NamedFile(str(tmp_path / "d"), other, True, None)], proc) == [], "another file is there by now"
    assert proc.scans == 0


def test_descriptors_are_bounded_and_one_for_each_file(tmp_path):
    before = open_descriptors()
    files = [NamedFile(str(tmp_path / str(n)), made(tmp_path / str(n)), True, None) for n in range(MOST_PINS + 5)]
    pins = pin_files(files, Proc())
    assert len(pins) == MOST_PINS == open_descriptors() - before
    former = FormerFiles((), [*pins, os.dup(pins[0])])
    assert len(former.pins) == MOST_PINS
    former.let_go()
    assert open_descriptors() == before
