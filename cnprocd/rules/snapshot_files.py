"""The snapshots of accepted rules on the disk, in a directory that only root can write.

`<digest>` is a snapshot. `accepted` holds the digest of the last one that was put in force. Both are replaced by
rename(2) after fsync(2), so they survive a power cut. A file is read only if root alone (or the user of this process)
can have written it, and only if its content has the digest of its name.

How many are kept: the accepted one, those that jobs refer to, and the latest few; at most MOST_KEPT. While the spool
cannot be read, it is not known which ones jobs refer to, and none is deleted below that number. A job whose snapshot is
gone is reported as dead.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from cnprocd.errors import CnprocdError
from cnprocd.json_value import JsonError
from cnprocd.rules.snapshot import DIGEST, Snapshot
from cnprocd.safe_open import UnsafeFileError, safe_open

ACCEPTED = "accepted"
DIRECTORY_NAME = "rules"  # in the state directory of the process that writes it: the runner, or the daemon without one
RUNNER_DIRECTORY = Path("/var/lib/cnprocd-runner") / DIRECTORY_NAME
MOST_KEPT = 64
LATEST_KEPT = 4


class SnapshotMissingError(CnprocdError):
    """There is no such snapshot, or its file is unsafe or damaged."""


def store(directory: Path, snapshot: Snapshot, gid: int | None = None) -> None:
    """Write a snapshot, readable for group `gid`. Raises OSError."""
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    if gid is not None:
        os.chown(directory, -1, gid)
        directory.chmod(0o750)
    path = directory / snapshot.digest
    if path.exists() and path.read_bytes() == snapshot.text.encode():
        os.utime(path)  # it is one of the latest again
        return
    _write(path, snapshot.text, gid)


def accept(directory: Path, digest: str, keep: Collection[str] | None = (), gid: int | None = None) -> None:
    """Note that a stored snapshot is in force, and delete those that are not kept (None: all are). Raises OSError."""
    if accepted(directory) != digest:
        _write(directory / ACCEPTED, digest, gid)
    latest = sorted(_stored(directory), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    wanted = [path for index, path in enumerate(latest) if index < LATEST_KEPT or keep is None or path.name in keep]
    kept = {digest, *(path.name for path in wanted[: MOST_KEPT - 1])}
    for path in latest:
        if path.name not in kept:
            path.unlink(missing_ok=True)


def accepted(directory: Path) -> str | None:
    """Return the digest of the snapshot that was put in force last, or None."""
    with contextlib.suppress(OSError, UnsafeFileError):
        found = _read(directory / ACCEPTED)
        return found if DIGEST.fullmatch(found) else None
    return None


def read(directory: Path, digest: str) -> Snapshot:
    """Return a stored snapshot. Raises SnapshotMissingError."""
    try:
        if not DIGEST.fullmatch(digest):
            raise SnapshotMissingError(f"{digest[:80]!r} does not name a snapshot")
        snapshot = Snapshot.parse(_read(directory / digest))
    except (OSError, UnsafeFileError, JsonError, ValueError) as error:
        raise SnapshotMissingError(f"the snapshot {digest[:12]} of the rules cannot be read: {error}") from error
    if snapshot.digest != digest or not snapshot.files:
        raise SnapshotMissingError(f"the snapshot {digest[:12]} of the rules is damaged")
    return snapshot


def _stored(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if DIGEST.fullmatch(path.name)]


def _read(path: Path) -> str:
    with os.fdopen(safe_open(path), encoding="ascii") as file:
        return file.read()


def _write(path: Path, text: str, gid: int | None) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        if gid is not None:
            os.fchown(fd, -1, gid)
            os.fchmod(fd, 0o640)
        file.write(text)
        file.flush()
        os.fsync(fd)
    os.replace(temporary, path)
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
