"""Paths of files that exit records name: what was seen is looked at again, what is guessed must be that file."""

from __future__ import annotations

import os
import time

import pytest

from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process import watched_files
from cnprocd.process.executed_file import take_executed_file
from cnprocd.process.file_names import CHECKED_FOR_S, MISSED_FOR_S, FileNames
from cnprocd.process.files import FileId, FoundFile
from cnprocd.process.lookup_child import file_at
from cnprocd.process.model import Image, Process


class Host:
    """The real file system, with the looks counted, which may be late."""

    def __init__(self) -> None:
        self.looks: list[list[str]] = []
        self.late = False
        self.now_s = 100.0

    def look_up(self, paths):
        self.looks.append(list(paths))
        found = (FileId(*file_at(os.fsencode(path))) for path in paths)
        return None if self.late else [file if file.inode else None for file in found]

    def clock(self) -> float:
        return self.now_s


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def names(host):
    names = FileNames(host.look_up, host.clock)
    yield names
    names.close()


def made(path) -> FileId:
    path.write_text("x")
    return file_of(path)


def file_of(path) -> FileId:
    found = os.stat(path)
    return FileId(found.st_dev, found.st_ino)


def record_of(file: FileId) -> TaskRecord:
    """Return the exit record of a process that executed this file."""
    rest = (7, 7, 1, 256, True, False, "d", 0, 0, 0, 1000, 0, 0, 0, 0, 0, 0)
    return TaskRecord(*rest, exe_device=file.device, exe_inode=file.inode)


def seen(path, file: FileId, deleted: bool = False) -> Process:
    return Process(os.getpid(), comm="d", exe=str(path), image=Image(str(path), deleted, file))


def test_a_named_file_is_found_without_a_look(names, host, tmp_path):
    file = made(tmp_path / "d")
    names.use([str(tmp_path / "d")], None)
    host.looks.clear()
    assert names.find(file, "d") == FoundFile((str(tmp_path / "d"),), True, False)
    assert host.looks == []
    assert names.knows_all_named


def test_no_other_path_is_sought_unless_a_rule_needs_it(names, host, tmp_path):
    file = made(tmp_path / "d")
    names.use([], None)
    names.learn(seen(tmp_path / "d", file))
    assert names.find(file, "d") is None
    assert host.looks == [[]]


def test_a_seen_file_is_looked_at_again_before_it_is_used(names, host, tmp_path):
    path = tmp_path / "d"
    file = made(path)
    names.use([], [])
    names.learn(seen(path, file))
    host.looks.clear()
    for _ in range(3):
        assert names.find(file, "d") == FoundFile((str(path),), False, False)
    assert host.looks == [[str(path)]]
    host.now_s += CHECKED_FOR_S
    (tmp_path / "other").write_text("y")
    os.rename(tmp_path / "other", path)
    assert names.find(file, "other-name") is None
    assert names.known.find(file) is None


def test_a_path_is_guessed_from_the_comm_and_must_be_that_file(names, host, tmp_path):
    file, other = made(tmp_path / "d"), made(tmp_path / "e")
    names.use([], [str(tmp_path)])
    assert names.find(file, "d") == FoundFile((str(tmp_path / "d"),), False, False)
    assert names.find(other, "d") is None
    host.looks.clear()
    assert names.find(other, "e") is None, "missed, and not guessed again for a while"
    assert host.looks == []
    host.now_s += MISSED_FOR_S
    assert names.find(other, "e") == FoundFile((str(tmp_path / "e"),), False, False)


@pytest.mark.parametrize("comm", ["../d", ".", "..", "", None, "123456789012345"])
def test_no_path_is_guessed_from_a_comm_that_is_no_whole_name(names, host, tmp_path, comm):
    file = made(tmp_path / "123456789012345")
    names.use([], [str(tmp_path)])
    host.looks.clear()
    assert names.find(file, comm) is None
    assert host.looks == []


def test_a_guess_over_a_symbolic_link_is_none(names, host, tmp_path):
    file = made(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    names.use([str(tmp_path / "link")], [str(tmp_path)])
    assert names.find(file, "link") is None


def test_a_late_look_at_a_watched_path_costs_nothing(names, host, tmp_path):
    """The tick looks once a second, in case a directory cannot be watched. A process of another file is decided."""
    program = tmp_path / "d"
    file = made(program)
    names.use([str(program)], None)
    host.late = True
    names.tick()
    assert (names.knows_all_named, names.find(file, None)) == (True, FoundFile((str(program),), True, False))
    made(tmp_path / "new")
    os.rename(tmp_path / "new", program)
    names.refresh()
    assert not names.knows_all_named, "now it has a file that was not seen"


def test_what_was_found_holds_until_a_named_path_changes(names, tmp_path):
    """Processes that are alike in a flood are counted by what was found for one of them (crowd.py)."""
    program, other = tmp_path / "d", tmp_path / "other"
    made(program)
    names.use([str(program)], None)
    names.let_go()
    names.let_go()
    made(other)
    assert names.refresh() is False
    os.rename(other, program)
    assert names.refresh() is True
    names.let_go()
    names.let_go()
    assert names.refresh() is False


def test_a_late_look_leaves_the_path_unknown_until_the_tick(names, host, tmp_path):
    file = made(tmp_path / "d")
    host.late = True
    names.use([str(tmp_path / "d")], None)
    assert names.find(file, "d") is None
    assert not names.knows_all_named
    host.late = False
    names.tick()
    assert names.find(file, "d") == FoundFile((str(tmp_path / "d"),), True, False)
    assert names.knows_all_named


def test_identities_on_an_untrusted_device_are_not_compared(names, tmp_path):
    file = made(tmp_path / "d")
    assert names.is_same(file, file) is True
    assert names.is_same(file, file._replace(inode=1)) is False
    assert names.is_same(file, FileId(1, 1)) is None


def test_a_user_who_never_stops_changing_files_stops_nothing(names, tmp_path, monkeypatch):
    """A rule names a program in a directory of a user: what inotify has at first is read, and no more."""
    made(tmp_path / "d")
    names.use([str(tmp_path / "d")], None)
    made(tmp_path / "other")
    reads = []

    def read_and_change(fd, size):
        raw = os.read(fd, size)
        reads.append(raw)
        assert len(reads) < 100, "it reads for ever"
        made(tmp_path / str(len(reads)))
        return raw

    monkeypatch.setattr(watched_files, "read", read_and_change)
    names.refresh()
    assert len(reads) == 1
    replaced = made(tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / "d")
    names.refresh()
    assert names.find(replaced, None) == FoundFile((str(tmp_path / "d"),), True, False)


def test_a_path_reinstalled_with_the_same_inode_is_found(names, tmp_path):
    """install(1) removes the file first; ext4 often gives its inode number to the new one at once."""
    path = tmp_path / "d"
    made(path)
    names.use([str(path)], None)
    for _ in range(20):
        path.unlink()
        file = made(path)
        for _ in range(3):
            names.refresh()
            assert names.find(file, None) == FoundFile((str(path),), True, False)
            names.let_go()


def test_a_number_that_returns_after_its_release_is_found(names, host, tmp_path):
    """The looks at the path are late when the old file is let go."""
    path = tmp_path / "d"
    made(path)
    names.use([str(path)], None)
    for _ in range(20):
        path.unlink()
        file = made(path)
        host.late = True
        for _ in range(3):
            names.refresh()
            names.let_go()
            assert not names.knows_all_named, "a rule is undecided meanwhile, and that is counted"
        host.late = False
        names.tick()
        for _ in range(3):
            assert names.find(file, None) == FoundFile((str(path),), True, False)
            names.let_go()


def test_a_moved_file_has_its_old_path_for_older_processes(names, tmp_path):
    """Processes that started after the move, or when it was made, do not match a rule on the old path."""
    path = tmp_path / "d"
    file = made(path)
    names.use([str(path)], None)
    os.rename(path, tmp_path / "moved")
    new = made(path)
    moved_ns = time.monotonic_ns()
    names.tick()
    after_ns = time.monotonic_ns() + 1_000_000_000
    assert names.find(file, None, 1) == FoundFile((str(path),), True, True)
    assert names.find(file, None, moved_ns) == FoundFile((), True, True), "in doubt"
    assert names.find(file, None, after_ns) is None
    assert names.find(new, None, 1) == names.find(new, None, after_ns) == FoundFile((str(path),), True, False)
    os.rename(tmp_path / "moved", path)
    names.tick()
    assert names.find(file, None, after_ns) == FoundFile((str(path),), True, False)


@pytest.mark.parametrize("is_named", [True, False], ids=["literal", "glob"])
@pytest.mark.parametrize("change", ["replaced", "removed", "directory"])
def test_a_program_replaced_while_it_runs_is_deleted(names, host, tmp_path, is_named, change):
    """Its process was seen before, and the path is the same. Another process of the new file has it undeleted."""
    path = tmp_path / "bin" / "d"
    path.parent.mkdir()
    file = made(path)
    names.use([str(path)] if is_named else [], ["/other"])
    first, second = (seen(path, file) for _ in range(2))
    names.learn(first)
    take_executed_file(second, record_of(file), names)
    assert (second.exe, second.exe_deleted) == (str(path), False)
    host.now_s += CHECKED_FOR_S
    if change == "directory":
        os.rename(path.parent, tmp_path / "old")
        path.parent.mkdir()
    else:
        os.rename(path, tmp_path / "old")
    new = None if change == "removed" else made(path)
    names.refresh()
    for _ in range(2):
        again = seen(path, file)
        take_executed_file(again, record_of(file), names)
        assert (again.exe, again.exe_deleted) == (str(path), True)
    if new is not None:
        fresh = seen(path, new)
        take_executed_file(fresh, record_of(new), names)
        assert (fresh.exe, fresh.exe_deleted) == (str(path), False)


@pytest.mark.parametrize("shown", [None, "/moved"])
def test_a_file_in_doubt_leaves_a_process_undecided(names, tmp_path, shown):
    path = tmp_path / "d"
    file = made(path)
    names.use([str(path)], None)
    path.unlink()
    removed_ns = time.monotonic_ns()
    names.tick()
    for start_ns, is_unnamed in ((removed_ns, False), (removed_ns + 10_000_000_000, True)):
        process = Process(7, comm="d", exe=shown, start_ns=start_ns)
        take_executed_file(process, record_of(file), names)
        assert (process.exe, process.exe_is_unnamed) == (shown, is_unnamed)


def test_files_between_two_looks_leave_rules_undecided(names, tmp_path):
    """Of three files that a path had, the look shows the last one. A process may have executed another one."""
    path = tmp_path / "d"
    made(path)
    names.use([str(path)], None)
    for _ in range(3):
        made(tmp_path / "new")
        os.rename(tmp_path / "new", path)
    names.refresh()
    assert not names.knows_all_named
    names.let_go()
    assert not names.knows_all_named, "a record may have come while this was read"
    names.let_go()
    assert names.knows_all_named
    made(tmp_path / "new")
    os.rename(tmp_path / "new", path)
    names.refresh()
    assert names.knows_all_named


@pytest.mark.parametrize("moved", ["opt", "opt/bin"])
def test_a_directory_above_that_is_swapped_shows_at_once(names, tmp_path, moved):
    """The old program and the new one match, without a tick, and what was there between is undecided."""
    for version in ("opt", "opt.new"):
        (tmp_path / version / "bin").mkdir(parents=True)
    path = tmp_path / "opt" / "bin" / "d"
    old, new = made(path), made(tmp_path / "opt.new" / "bin" / "d")
    names.use([str(path)], None)
    os.rename(tmp_path / moved, tmp_path / "opt.old")
    os.rename(tmp_path / moved.replace("opt", "opt.new"), tmp_path / moved)
    names.refresh()
    assert names.find(new, None, time.monotonic_ns()) == FoundFile((str(path),), True, False)
    assert names.find(old, None, 1) == FoundFile((str(path),), True, True)
    assert not names.knows_all_named
    for _ in range(2):
        names.let_go()
    assert names.knows_all_named


def test_a_directory_above_that_is_made_anew_shows_at_once(names, tmp_path):
    path = tmp_path / "opt" / "bin" / "d"
    names.use([str(path)], None)
    path.parent.mkdir(parents=True)
    file = made(path)
    names.refresh()
    assert names.find(file, None) == FoundFile((str(path),), True, False)


def test_a_directory_that_was_replaced_is_watched_anew(names, tmp_path):
    directory = tmp_path / "opt" / "bin"
    directory.mkdir(parents=True)
    made(directory / "d")
    names.use([str(directory / "d")], None)
    os.rename(tmp_path / "opt", tmp_path / "old")
    directory.mkdir(parents=True)
    names.tick()
    file = made(directory / "d")
    names.refresh()
    assert names.find(file, None) == FoundFile((str(directory / "d"),), True, False)
