"""The metrics file, for node_exporter's textfile collector: written by a worker process, because a disk can block.

While the disk does not answer, only the latest text waits. A failure is logged once, until the file is written again.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from pathlib import Path

from cnprocd.edge import Edge, Limits, Missed
from cnprocd.log import Log
from cnprocd.output import metrics_child
from cnprocd.worker import ChildWorker

LATE_S = 10.0

_Text = tuple[str, str]  # a path, and the text that the file shall have


class _Writer(ChildWorker):
    def __init__(self) -> None:
        super().__init__(Path(metrics_child.__file__))

    def begin(self, work: _Text) -> None:  # type: ignore[override]
        """Pass the text as a memfd: it may be longer than a datagram, and writing to memory never waits."""
        path, text = work
        fd = os.memfd_create("cnprocd-metrics", os.MFD_CLOEXEC)
        with open(fd, "wb") as file:
            file.write(text.encode())
            file.flush()
            socket.send_fds(self._socket, [os.fsencode(path)], [fd])


class MetricsFile:
    """Replaces the metrics file. Belongs to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: Log) -> None:
        self._log = log
        self.edge: Edge[_Text, bytes] = Edge("metrics", _Writer, Limits(deadline_s=math.inf, inbox=1), loop)
        self._began_s: float | None = None  # since when a text is being written
        self._next: _Text | None = None
        self._failed = False

    @property
    def waiting(self) -> int:
        """Texts that wait."""
        return int(self._next is not None)

    def write(self, path: str, text: str) -> None:
        """Replace the file some time soon. A text that waits is given up for this one."""
        if self._began_s is not None:
            self._next = path, text
            if time.monotonic() - self._began_s > LATE_S:
                self._report(path, "the disk does not answer")
            return
        self._began_s = time.monotonic()
        if not self.edge.submit((path, text), lambda answer: self._written(path, answer)):
            self._written(path, Missed.REFUSED)

    def close(self) -> None:
        """Wait for nothing. A text that is being written is still written."""
        self._next = None
        self.edge.close(abandon=False)

    def _written(self, path: str, answer: bytes | Missed) -> None:
        self._began_s = None
        if answer == metrics_child.DONE:
            self._failed = False
        elif isinstance(answer, bytes):
            self._report(path, answer.decode())
        elif answer is not Missed.STOPPED:
            self._report(path, "the process that writes it is not there")
        following, self._next = self._next, None
        if following is not None:
            self.write(*following)

    def _report(self, path: str, cause: str) -> None:
        if not self._failed:
            self._failed = True
            message = f"cannot write metrics to {path}: {cause}"
            self._log("warning", "metrics_unwritable", path=path, message=message)
