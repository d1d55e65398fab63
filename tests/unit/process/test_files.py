"""Files and their paths: what a record's device and inode mean, over upgrades, deletions and other mount namespaces."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cnprocd.process.files import (
    ALWAYS,
    DELETED,
    MOST_OLD,
    ExeClaim,
    FileId,
    FoundFile,
    KnownFiles,
    NamedFile,
    Removal,
    claim_of,
    device_number,
    parse_mountinfo,
    verified_path,
)

ONE, TWO, THREE = FileId(65024, 11), FileId(65024, 12), FileId(65024, 13)
MOUNTINFO = b"""\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:22 / /proc rw,nosuid - proc proc rw
30 22 0:39 /sub /data rw,relatime - btrfs /dev/vdb rw,subvolid=256
31 22 0:40 / /mnt/with\\040blank rw - tmpfs tmpfs rw
32 22 0:41 / /home rw - nfs4 server:/home rw
33 22 0:42 / /merged rw - overlay overlay rw
35 22 0:43 / /dev rw - devtmpfs devtmpfs rw
36 35 0:44 / /dev/shm rw - tmpfs tmpfs rw
37 22 0:45 / /boot/efi rw - vfat /dev/vda1 rw
a line that is none
34 22 0:43 / /short
"""


def test_a_named_path_is_found_by_its_file():
    files = KnownFiles()
    files.name("/bin/d", ONE)
    assert files.find(ONE) == FoundFile(("/bin/d",), is_named=True, is_deleted=False)
    assert files.find(TWO) is None


def test_after_an_upgrade_the_old_and_the_new_file_match():
    files = KnownFiles()
    files.name("/bin/d", ONE)
    files.name("/bin/d", TWO)
    assert files.find(ONE) == FoundFile(("/bin/d",), is_named=True, is_deleted=True)
    assert files.find(TWO) == FoundFile(("/bin/d",), is_named=True, is_deleted=False)
    files.release("/bin/d", ONE)
    assert files.find(ONE) is None


def test_a_file_in_doubt_has_no_path_until_it_is_confirmed():
    """Only its number is known, so a process that executed it may have executed another file."""
    files = KnownFiles()
    files.name_old("/bin/d", ONE, ALWAYS)
    for start_ns in (None, 0, 1 << 60):
        assert files.find(ONE, start_ns) == FoundFile((), is_named=True, is_deleted=True)
    assert files.is_in_doubt("/bin/d", ONE)
    files.confirm("/bin/d", ONE)
    assert files.find(ONE, 7) == FoundFile(("/bin/d",), is_named=True, is_deleted=True)
    files.name_old("/bin/d", TWO, ALWAYS)
    files.name("/bin/d", TWO)
    assert files.find(TWO, 7) == FoundFile(("/bin/d",), is_named=True, is_deleted=False), "the path leads to it"


def test_all_named_files_are_known_with_their_removals():
    files = KnownFiles()
    files.name("/bin/d", ONE)
    files.name("/bin/d", TWO, Removal(5, 7))
    assert files.all_named() == (
        NamedFile("/bin/d", ONE, False, Removal(5, 7)),
        NamedFile("/bin/d", TWO, True, None),
    )


def test_a_deleted_file_stays_until_it_is_released():
    files = KnownFiles()
    files.name("/bin/d", ONE)
    files.name("/bin/d", None)
    assert files.find(ONE) == FoundFile(("/bin/d",), is_named=True, is_deleted=True)
    files.release("/bin/d", ONE)
    assert files.find(ONE) is None
    assert files.named_paths == {"/bin/d"}


def test_hard_links_that_rules_name_are_one_file():
    files = KnownFiles()
    files.name("/bin/a", ONE)
    files.name("/bin/b", ONE)
    assert files.find(ONE) == FoundFile(("/bin/a", "/bin/b"), is_named=True, is_deleted=False)
    files.name("/bin/a", TWO)
    assert files.find(ONE) == FoundFile(("/bin/a", "/bin/b"), is_named=True, is_deleted=False)
    files.unname("/bin/b")
    assert files.find(ONE) == FoundFile(("/bin/a",), is_named=True, is_deleted=True)


def test_what_no_rule_names_any_more_is_unknown():
    files = KnownFiles()
    files.name("/bin/d", ONE)
    files.name("/bin/d", TWO)
    files.unname("/bin/d")
    assert (files.find(ONE), files.find(TWO), files.named_paths) == (None, None, frozenset())


def test_old_files_of_a_path_are_bounded():
    files = KnownFiles()
    for inode in range(1, 100):
        files.name("/bin/d", FileId(1, inode))
    assert files.old_files("/bin/d") == tuple(FileId(1, inode) for inode in range(99 - MOST_OLD, 99))
    assert files.find(FileId(1, 1)) is None


def test_files_that_were_seen_are_bounded_oldest_first():
    files = KnownFiles(most_seen=2)
    for file, path in ((ONE, "/a"), (TWO, "/b"), (ONE, "/a"), (THREE, "/c")):
        files.learn(file, path)
    assert files.find(TWO) is None
    assert files.find(ONE) == FoundFile(("/a",), is_named=False, is_deleted=False)
    assert files.find(THREE) == FoundFile(("/c",), is_named=False, is_deleted=False)
    files.forget(ONE)
    assert files.find(ONE) is None


def test_what_a_rule_names_counts_more_than_what_was_seen():
    files = KnownFiles()
    files.learn(ONE, "/proc/says")
    files.name("/bin/d", ONE)
    files.learn(ONE, "/proc/says")
    assert files.find(ONE) == FoundFile(("/bin/d",), is_named=True, is_deleted=False)


class Upgrades(RuleBasedStateMachine):
    """Random renames over named paths; a plain model keeps what must be found."""

    def __init__(self):
        super().__init__()
        self.files = KnownFiles(most_seen=3)
        self.current = {}
        self.ever = {}

    @rule(path=st.sampled_from("abc"), inode=st.none() | st.integers(1, 6))
    def name(self, path, inode):
        file = None if inode is None else FileId(1, inode)
        self.files.name(path, file)
        self.current[path] = file
        self.ever.setdefault(path, set()).update({file} - {None})

    @rule(path=st.sampled_from("abc"), inode=st.integers(1, 6))
    def release(self, path, inode):
        file = FileId(1, inode)
        if self.current.get(path) != file:
            self.files.release(path, file)
            self.ever.get(path, set()).discard(file)

    @rule(path=st.sampled_from("abc"))
    def unname(self, path):
        self.files.unname(path)
        self.current.pop(path, None)
        self.ever.pop(path, None)

    @rule(inode=st.integers(1, 6))
    def learn(self, inode):
        self.files.learn(FileId(1, inode), "seen")

    @invariant()
    def found_is_what_the_model_knows(self):
        for inode in range(1, 7):
            file = FileId(1, inode)
            named = {path for path, files in self.ever.items() if file in files}
            found = self.files.find(file)
            if named:
                assert found is not None
                assert (set(found.paths), found.is_named) == (named, True)
                assert found.is_deleted == (file not in self.current.values())
            else:
                assert found is None or not found.is_named
        assert self.files.named_paths == set(self.current)


TestUpgrades = Upgrades.TestCase


# --- claims


@pytest.mark.parametrize(
    ("text", "file", "at_text", "claim"),
    [
        ("/bin/d", ONE, ONE, ExeClaim("/bin/d", False, ONE)),
        ("/bin/d (deleted)", ONE, None, ExeClaim("/bin/d", True, ONE)),
        ("/bin/d (deleted)", ONE, ONE, ExeClaim("/bin/d (deleted)", False, ONE)),  # really called so
        ("/bin/d (deleted)", ONE, TWO, ExeClaim("/bin/d", True, ONE)),
        ("/bin/d (deleted)", None, None, ExeClaim("/bin/d", True, None)),
    ],
)
def test_the_kernels_suffix_is_taken_from_a_claim(text, file, at_text, claim):
    assert claim_of(text, file, at_text) == claim


@pytest.mark.parametrize(
    ("claim", "at_path", "in_host", "path"),
    [
        (ExeClaim("/bin/d", False, ONE), ONE, False, "/bin/d"),  # a service with mounts of its own
        (ExeClaim("/bin/d", False, TWO), ONE, False, None),  # another file was bound over it
        (ExeClaim("/bin/d", False, TWO), None, False, None),  # a container's
        (ExeClaim("/bin/d", True, ONE), TWO, True, "/bin/d"),  # upgraded under a process of the host
        (ExeClaim("/bin/d", True, ONE), ONE, False, None),
        (ExeClaim("/root/d", False, None), None, True, "/root/d"),
        (ExeClaim("/root/d", False, None), None, False, None),  # nothing equals nothing
    ],
)
def test_a_claim_is_verified_by_the_file_or_the_namespace(claim, at_path, in_host, path):
    assert verified_path(claim, at_path, in_host) == path


# --- mounts


def test_only_devices_with_unique_inodes_are_trusted():
    mounts = parse_mountinfo(MOUNTINFO)
    trusted = [device for device in (*range(30, 50), os.makedev(254, 0)) if mounts.identifies(device)]
    assert trusted == [40, 42, 43, 44, os.makedev(254, 0)]


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("/usr/bin/false", True),
        ("/mnt/with blank/d", True),
        ("/data/d", True),
        ("/home/u/d", False),
        ("/homely/d", True),
        ("/home", False),
        ("/proc/1/exe", False),
        ("/dev/shm/d", True),
        ("/boot/efi/d", True),
    ],
)
def test_a_path_over_the_network_is_not_local(path, local):
    assert parse_mountinfo(MOUNTINFO).is_local(path) is local


@given(st.binary(max_size=200))
def test_any_mountinfo_is_read(raw):
    parse_mountinfo(raw).is_local("/x")


@given(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))
def test_device_numbers_are_encoded_as_st_dev(major, minor):
    assert device_number(major, minor) == os.makedev(major, minor)


def test_the_suffix_is_the_kernels(tmp_path):
    file = tmp_path / "x"
    file.touch()
    with file.open() as opened:
        file.unlink()
        assert os.readlink(f"/proc/self/fd/{opened.fileno()}") == str(file) + DELETED
