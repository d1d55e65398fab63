"""Snapshots of rules: exactly what was parsed, kept where only root can write, found again after a restart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cnprocd.rules import snapshot_files
from cnprocd.rules.language.disabled import load_snapshot, load_with_snapshot
from cnprocd.rules.ruleset import hooks_of
from cnprocd.rules.snapshot import Snapshot
from cnprocd.rules.snapshot_files import SnapshotMissingError

RULES = """
lists: {names: ["ora_*"]}
rules:
  - name: one
    events: [nonzero_exit]
    match: {comm: $names, user: root}
    run: {command: [/bin/true, "{pid}"], user: root, timeout: 7s}
  - {name: two, events: [exit]}
"""


def made(text: str) -> Snapshot:
    return Snapshot.of([(Path("/etc/x.yaml"), text.encode())], None)


def test_a_snapshot_gives_the_rules_that_it_was_made_of(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(RULES)
    (tmp_path / "disabled").write_text("two\n")
    loaded, snapshot = load_with_snapshot(file)
    snapshot_files.store(tmp_path / "kept", snapshot)
    snapshot_files.accept(tmp_path / "kept", snapshot.digest)
    file.write_text("rules: [")
    (tmp_path / "disabled").unlink()
    digest = snapshot_files.accepted(tmp_path / "kept")
    again = load_snapshot(snapshot_files.read(tmp_path / "kept", digest))
    assert (again.rules, again.settings, again.lists, again.files, again.disabled, again.snapshot) == (
        loaded.rules, loaded.settings, loaded.lists, loaded.files, loaded.disabled, digest,
    )  # fmt: skip
    assert hooks_of(again.rules)["one"].timeout_s == 7
    assert [rule.enabled for rule in again.rules] == [True, False]


def test_any_bytes_keep_their_digest_on_the_disk():
    snapshot = Snapshot.of([(Path("/a"), b"\xff\xfe\n"), (Path("/b"), "é".encode())], b"x\xff")
    assert Snapshot.parse(snapshot.text) == snapshot
    assert Snapshot.parse(snapshot.text).digest == snapshot.digest


def test_changed_content_or_another_owner_is_refused(tmp_path):
    snapshot = made("rules: []")
    snapshot_files.store(tmp_path, snapshot)
    path = tmp_path / snapshot.digest
    path.write_text(made("rules: [x]").text)
    with pytest.raises(SnapshotMissingError, match="damaged"):
        snapshot_files.read(tmp_path, snapshot.digest)
    path.write_text(snapshot.text)
    path.chmod(0o622)
    with pytest.raises(SnapshotMissingError, match="can be written by everyone"):
        snapshot_files.read(tmp_path, snapshot.digest)
    for name in ("0" * 64, "../x", ""):
        with pytest.raises(SnapshotMissingError):
            snapshot_files.read(tmp_path, name)


def test_snapshots_of_jobs_are_kept_and_others_deleted(tmp_path):
    snapshots = [made(f"rules: [] # {number}") for number in range(100)]
    for number, snapshot in enumerate(snapshots):
        snapshot_files.store(tmp_path, snapshot)
        os.utime(tmp_path / snapshot.digest, ns=(number, number))
    jobs = {snapshots[3].digest, snapshots[5].digest}
    snapshot_files.accept(tmp_path, snapshots[50].digest, jobs)
    kept = {snapshots[number].digest for number in (3, 5, 50, 96, 97, 98, 99)}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, snapshot_files.ACCEPTED}
    assert snapshot_files.accepted(tmp_path) == snapshots[50].digest


def test_all_are_kept_if_the_needed_ones_are_unknown(tmp_path):
    snapshots = [made(f"rules: [] # {number}") for number in range(snapshot_files.MOST_KEPT - 1)]
    for snapshot in snapshots:
        snapshot_files.store(tmp_path, snapshot)
        snapshot_files.accept(tmp_path, snapshot.digest, None)
    assert {path.name for path in tmp_path.iterdir()} == {*(one.digest for one in snapshots), snapshot_files.ACCEPTED}


def test_the_number_of_kept_snapshots_is_bounded(tmp_path):
    snapshots = [made(f"rules: [] # {number}") for number in range(100)]
    for snapshot in snapshots:
        snapshot_files.store(tmp_path, snapshot)
    snapshot_files.accept(tmp_path, snapshots[0].digest, {snapshot.digest for snapshot in snapshots})
    assert len(list(tmp_path.iterdir())) == snapshot_files.MOST_KEPT + 1
    snapshot_files.read(tmp_path, snapshots[0].digest)
