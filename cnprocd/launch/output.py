"""Log a hook's output line by line up to a limit, and discard the rest.

Standard output and standard error are one pipe, so that their order is kept. Past the limit the pipe is still drained;
otherwise the hook would block in write(2) or get SIGPIPE. splice(2) moves pages from the pipe to /dev/null without
copying. Each wakeup reads a bounded amount (a pipe holds 64 KiB), so a hook that writes 100 MB does not hold the loop.
Long lines are split and lines are counted: 64 KiB of newlines must not become 65,536 records.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from cnprocd.escape import printable

MOST_LINES = 1000
MOST_LINE_BYTES = 4096
_CHUNK = 65536


class Output:
    """One hook's output. `emit` gets each line, escaped. `fd` is non-blocking, and the caller closes it."""

    def __init__(self, fd: int, limit: int, emit: Callable[[str], None]) -> None:
        self.fd = fd
        self.discarded_bytes = 0
        self.discarded_lines = 0
        self.ended = False  # all writers have closed the pipe
        self.emit = emit
        self._left = limit
        self._lines = 0
        self._partial = b""

    def read(self) -> bool:
        """Read at most a pipe full. Return False at EOF. Raises BlockingIOError if nothing is available."""
        if self._left > 0:
            data = os.read(self.fd, min(_CHUNK, self._left))
            self._left -= len(data)
            self._take(data)
            self.ended = not data
        else:
            gone = self._discard()
            self.discarded_bytes += gone
            self.ended = gone == 0
        return not self.ended

    def finish(self) -> None:
        """Read the rest of the pipe after the hook has exited, then emit how much was discarded."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):  # a child that was left behind may write for ever
                if not self.read():
                    break
        if self._partial:
            self._line(self._partial)
            self._partial = b""
        if self.discarded_bytes or self.discarded_lines:
            self.emit(
                f"[output limit reached: {self.discarded_bytes} bytes and {self.discarded_lines} lines not shown]"
            )
            self.discarded_bytes = self.discarded_lines = 0

    def _take(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._partial) >= MOST_LINE_BYTES:
            self._line(self._partial)
            self._partial = b""

    def _line(self, line: bytes) -> None:
        if not line.strip():
            return
        if self._lines >= MOST_LINES:
            self.discarded_lines += 1
            return
        self._lines += 1
        text = line[:MOST_LINE_BYTES].rstrip(b"\r").replace(b"\t", b"    ").decode("utf-8", "surrogateescape")
        self.emit(printable(text))

    def _discard(self) -> int:
        null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        try:
            return os.splice(self.fd, null, 1 << 20)
        finally:
            os.close(null)
