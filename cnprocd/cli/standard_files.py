"""Standard input, output and error, of which a program may have been started without some.

The next file or socket that is opened gets the lowest free descriptor. So without this a log record could be written
into the control socket, and a traceback into the spool.
"""

from __future__ import annotations

import os
import sys

from cnprocd.errors import CnprocdError

STDIN, STDOUT, STDERR = 0, 1, 2


def read_input(most_bytes: int = -1) -> bytes:
    """Return what standard input holds, at most `most_bytes` of it. Raises CnprocdError if it is closed."""
    if sys.stdin is None:  # Python found no descriptor 0
        raise CnprocdError("cannot read standard input: it is closed", "give the name of a file")
    return sys.stdin.buffer.read(most_bytes)


def fill_missing() -> frozenset[int]:
    """Open /dev/null for each that is closed, and return those. Call it before anything else is opened."""
    missing = frozenset(fd for fd in (STDIN, STDOUT, STDERR) if not _is_open(fd))
    for fd in sorted(missing):
        null = os.open(os.devnull, os.O_RDWR)
        if null != fd:
            os.dup2(null, fd)
            os.close(null)
        os.set_inheritable(fd, True)
    if STDOUT in missing:
        sys.stdout = open(STDOUT, "w", closefd=False)  # noqa: SIM115 (for the life of the process)
    if STDERR in missing:
        sys.stderr = open(STDERR, "w", closefd=False)  # noqa: SIM115
    return missing


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
