"""The results of attempts, kept until a daemon asks: it may have been restarted while its hooks ran.

The latest results are in memory. A result that no daemon was connected to receive is also written to the disk, so that
it survives the end of the runner. Neither is deleted when it is sent, because the daemon may be killed before it has
committed it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict
from pathlib import Path

from cnprocd.runner import wire

MOST_KEPT = 1024  # in memory, and on the disk
KEPT_S = 7 * 86400.0  # on the disk
_LONGEST_UPTIME_S = 1e9  # 31 years


class Results:
    """Results by attempt id. `directory` is root's alone; None keeps them in memory only."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._latest: OrderedDict[str, wire.Ended] = OrderedDict()

    def add(self, ended: wire.Ended, *, delivered: bool) -> None:
        """Keep a result. `delivered`: a connected daemon got it. If the disk fails, it is in memory only."""
        self._latest[ended.attempt_id] = ended
        while len(self._latest) > MOST_KEPT:
            self._latest.popitem(last=False)
        if not delivered and self._directory is not None:
            with contextlib.suppress(OSError):
                self._write(self._directory, ended)

    def find(self, attempt_id: str) -> wire.Ended | None:
        """Return the result of an attempt, or None if it is unknown. `attempt_id` is hexadecimal digits."""
        found = self._latest.get(attempt_id)
        if found is None and self._directory is not None:
            with contextlib.suppress(OSError, wire.WireError):
                read = wire.from_runner((self._directory / attempt_id).read_bytes())
                return read if isinstance(read, wire.Ended) else None
        return found

    def prune(self) -> None:
        """Delete the results on the disk that are too old or too many."""
        if self._directory is None:
            return
        with contextlib.suppress(OSError):
            files = sorted(((path.stat().st_mtime, path) for path in self._directory.iterdir()), reverse=True)
            for index, (written_s, path) in enumerate(files):
                if index >= MOST_KEPT or _is_old(written_s):
                    path.unlink(missing_ok=True)

    def _write(self, directory: Path, ended: wire.Ended) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = directory / f".{ended.attempt_id}"
        temporary.write_bytes(wire.body(ended))
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        os.utime(temporary, (now_s, now_s))
        os.replace(temporary, directory / ended.attempt_id)


def _is_old(written_s: float) -> bool:
    """Return whether no daemon asks for a result any more, by the time of its file.

    The time is of CLOCK_BOOTTIME: a wall clock that is set ahead makes no result old, and no daemon asks for one of an
    earlier boot. Files of earlier versions have the wall clock's time.
    """
    if written_s > _LONGEST_UPTIME_S:
        return time.time() - written_s > KEPT_S
    return not -1.0 < time.clock_gettime(time.CLOCK_BOOTTIME) - written_s < KEPT_S  # a file system rounds times
