"""Unexpected exceptions: each costs one event or one match and is reported, never the batch or the daemon. PURE."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Literal

from cnprocd.escape import printable
from cnprocd.log import Log, ThrottledLog

Step = Literal["identify", "evaluate", "dispatch", "log"]

_REPORT_EVERY_S = 10.0
_MOST_FRAMES = 20  # of a traceback, counted from where the exception was raised
_LONGEST_SUBJECT = 300  # characters


class Failures:
    """Counts and logs exceptions that no part of the daemon expects. The record of the latest one has its traceback."""

    def __init__(self, log: Log, clock: Callable[[], float]) -> None:
        """`clock`: any monotonic clock in seconds."""
        self.count = 0  # since the start
        self._throttled = ThrottledLog(log, _REPORT_EVERY_S)
        self._clock = clock

    def note(self, step: Step, subject: object, rule: str | None = None) -> None:
        """Count the exception that is being handled. `subject`: the event, or what is known of it."""
        self.count += 1
        text = traceback.format_exc(-_MOST_FRAMES)
        error = printable(text.rstrip().rpartition("\n")[2])
        self._throttled.add(
            "error",
            "event_failed",
            self._clock(),
            {"count": 1},
            f"cannot {step} an event or match: {error}. This is a bug in cnprocd",
            step=step,
            rule=rule,
            subject=printable(_shown(subject)),
            traceback=[printable(line) for line in text.splitlines()],
        )

    @property
    def pending(self) -> bool:
        """Whether counts wait for their record."""
        return self._throttled.pending

    def flush_due(self) -> None:
        """Log the count if its interval has passed."""
        self._throttled.flush_due(self._clock())

    def flush(self) -> None:
        """Log the count now."""
        self._throttled.flush(self._clock())


def _shown(subject: object) -> str:
    try:
        return repr(subject)[:_LONGEST_SUBJECT]
    except Exception:  # the subject may be the cause of the exception
        return type(subject).__name__
