"""Read jobs and matches from the daemon, or without a daemon from a copy of its spool.

The daemon answers, because it has the spool open. To open the file itself would lock it, and a daemon that starts at
that moment would run without it.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cnprocd.cli.grammar import Options
from cnprocd.control.client import Client, NotRunningError
from cnprocd.errors import StateError
from cnprocd.json_value import JsonObject

if TYPE_CHECKING:  # imported only without a daemon
    from cnprocd.spool.store import Store

_SPOOL = "spool.sqlite3"
Read = Callable[["Store"], JsonObject]


def ask_or_read(options: Options, verb: str, args: JsonObject, read: Read) -> JsonObject:
    """Return the daemon's answer, or without a daemon what `read` finds in its spool."""
    try:
        with Client(options.runtime_dir) as client:
            answer = client.ask(verb, **args)
            if client.note is not None:
                sys.stderr.write(f"cnprocctl: {client.note}\n")
            return answer
    except NotRunningError as not_running:
        if not (options.state_dir / _SPOOL).exists():
            raise
        return _read_copy(options.state_dir, read, not_running)


def _read_copy(state_dir: Path, read: Read, not_running: NotRunningError) -> JsonObject:
    from cnprocd.spool import database
    from cnprocd.spool.store import Store

    try:
        with tempfile.TemporaryDirectory(prefix="cnprocctl-") as directory:
            for name in (_SPOOL, f"{_SPOOL}-wal"):
                if (state_dir / name).exists():
                    shutil.copyfile(state_dir / name, Path(directory) / name)
            return read(Store(database.in_file(Path(directory) / _SPOOL)))
    except PermissionError as error:
        raise StateError(
            f"{not_running.what}, and its spool is private ({error.filename})", "run it as root"
        ) from error
    except sqlite3.Error as error:
        raise StateError(
            f"cannot read {state_dir / _SPOOL}: {error}", "the daemon renames a damaged one when it starts"
        ) from error
