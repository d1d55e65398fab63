"""Whether one process still runs, whatever becomes of its PID."""

from __future__ import annotations

import os
import select


class PidfdWatch:
    """A pidfd: it is readable once all threads of its process have ended (pidfd_open(2)). Closed with this object."""

    def __init__(self, tgid: int) -> None:
        """Raises OSError if there is no such process, or no descriptor for it."""
        self._pidfd = os.pidfd_open(tgid)
        self._poll = select.poll()
        self._poll.register(self._pidfd, select.POLLIN)

    def is_alive(self) -> bool:
        """Return whether any of its threads still runs."""
        return not self._poll.poll(0)

    def __del__(self) -> None:
        if hasattr(self, "_pidfd"):
            os.close(self._pidfd)
