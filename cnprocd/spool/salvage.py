"""Recover jobs from a bad spool file: detect damage, rename the file, and read the rows that are readable."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

from cnprocd.spool import copies, database
from cnprocd.spool.rows import Rows
from cnprocd.spool.store import Store

MOST_DAMAGED = 5  # renamed files that are kept: repeated damage must not fill the disk

# The errors of a call on a database. sqlite3 quotes the schema in its messages and fails to decode a damaged one.
FAILURES = (sqlite3.Error, UnicodeDecodeError)
# SQLite's primary result codes that mean that the file is bad, not the disk.
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})


def private_file(path: Path) -> Store:
    """Open the store in a file of mode 0600: records contain other users' command lines."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.close(fd)  # before SQLite opens it: closing any descriptor of a file drops the process's fcntl locks on it
    return Store(database.in_file(path))


def salvaged(path: Path) -> Rows:
    """Return the live jobs that are still readable in a damaged file."""
    try:
        with contextlib.closing(database.connect(path)) as db:
            return copies.read_rows(db, copies.LIVE, damaged=True)
    except FAILURES:
        return Rows()


def copied(path: Path) -> Rows:
    """Return the live jobs of a read-only file, from a copy: SQLite must write to open a file with a WAL.

    The copy of an older version is migrated.
    """
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(f"{path}{suffix}", f"{directory}/{path.name}{suffix}")
            copy = Path(directory, path.name)
            with contextlib.suppress(*FAILURES), contextlib.closing(database.in_file(copy)) as db:
                return copies.read_rows(db, copies.LIVE)
            return salvaged(copy)
    except OSError:
        return Rows()


def with_new_ids(store: Store) -> Store:
    """Start job ids at the time in milliseconds, above all ids in a file that cannot be read."""
    store.skip_ids(time.time_ns() // 1_000_000)
    return store


def is_damage(error: Exception) -> bool:
    if isinstance(error, database.NewerSpoolError):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(error, (database.NotOurDatabaseError, UnicodeDecodeError)) or (
        isinstance(error, sqlite3.DatabaseError) and code is None
    ):
        return True
    return code is not None and code & 0xFF in _DAMAGED


def sentence(error: Exception) -> str:
    name = getattr(error, "sqlite_errorname", None)
    return f"{error} ({name})" if name else str(error)


def size_of_wal(path: Path) -> int:
    try:
        return os.stat(f"{path}-wal").st_size
    except OSError:
        return 0


def rename_damaged(path: Path) -> Path:
    """Rename a damaged file, and keep it for inspection. Delete the oldest of such files. Return the new path."""
    kept = sorted(path.parent.glob(f"{path.name}.damaged-*[0-9a-f]"))
    for old in kept[: max(0, len(kept) + 1 - MOST_DAMAGED)]:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(f"{old}{suffix}")
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + f"-{random.getrandbits(16):04x}"
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    return aside
