"""The child process with the spool's file. It loads for as long as all else of a start, so main starts it first.

This module itself therefore loads little.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cnprocd.spool.disk_wire import receive_message, send_message
from cnprocd.worker import ChildWorker, WorkerEndedError

if TYPE_CHECKING:
    from cnprocd.spool.disk_messages import Answer, Request


class DiskWorker(ChildWorker):
    """The child process with the file (disk_child.py)."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("disk_child.py")
        super().__init__(script, str(script.parents[2]))

    def begin(self, work: Request) -> None:  # type: ignore[override]
        send_message(self._socket, work)

    def collect(self) -> Answer:  # type: ignore[override]
        try:
            found, answer = receive_message(self._socket)
        except OSError as error:
            raise WorkerEndedError(f"the process of the spool is gone: {error.strerror}") from error
        if not found:
            raise WorkerEndedError("the process of the spool has ended")
        return cast("Answer", answer)

    def leave(self, request: Request) -> None:
        """Send a request whose answer is not waited for."""
        with contextlib.suppress(OSError):
            send_message(self._socket, request)

    def abandon(self) -> None:
        """Leave it: it carries out what was sent when the disk answers again, and then ends."""
