"""Between the pipeline and the actions: `cnprocctl watch` sees every match, and costs nothing while it does not run.

The actions come first: a job is durable and its record written before a client sees the match. A match that a throttle
held back is shown as well, with `held_by`, because a person who watches wants to see what the rules see.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cnprocd.pipeline import Delivery, RecordedMatch

MATCHES = "matches"


class Tap:
    """A Delivery in front of another one. Complete without observers; the control room becomes one."""

    def __init__(self, inner: Delivery) -> None:
        self._inner = inner
        self._observers: list[tuple[Callable[[str, object], None], Callable[[str], bool]]] = []

    def observe(self, publish: Callable[[str, object], None], wanted: Callable[[str], bool]) -> None:
        """Publish every match from now on, while `wanted` returns true for the topic MATCHES."""
        self._observers.append((publish, wanted))

    def deliver(self, matches: list[RecordedMatch]) -> None:
        self._inner.deliver(matches)
        for publish, wanted in self._observers:
            if wanted(MATCHES):
                now_ns = time.time_ns()
                for recorded in matches:
                    publish(MATCHES, {"time_ns": now_ns, **recorded.record})
