"""The end of a command that runs without end: by time or by a signal, and always through `with` and `finally`."""

from __future__ import annotations

import signal
from types import FrameType


class TimeIsUpError(Exception):
    """The time of --for is over."""


def end_after(seconds: float | None) -> None:
    """Raise TimeIsUpError after `seconds`, and KeyboardInterrupt at SIGTERM and SIGHUP, in the main thread."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    if seconds is not None:
        signal.signal(signal.SIGALRM, _ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))


def _ring(number: int, frame: FrameType | None) -> None:
    raise TimeIsUpError
