"""Between the pipeline and the actions: whoever watches hears of a match, and it costs nothing while nobody does.

The actions come first: a job is durable and its record written before anybody watches the match go by. What a throttle
held back is shown as well, and says so (`held_by`): a person who watches wants to see what the rules see.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cnprocd.pipeline import Delivery, RecordedMatch

MATCHES = "matches"


class Tap:
    """A Delivery in front of another one."""

    def __init__(self, inner: Delivery, publish: Callable[[str, object], None], wanted: Callable[[str], bool]) -> None:
        self._inner = inner
        self._publish = publish
        self._wanted = wanted

    def deliver(self, matches: list[RecordedMatch]) -> None:
        self._inner.deliver(matches)
        if self._wanted(MATCHES):
            now_ns = time.time_ns()
            for recorded in matches:
                self._publish(MATCHES, {"time_ns": now_ns, **recorded.record})
