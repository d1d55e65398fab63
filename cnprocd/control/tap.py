"""Copies matches to `cnprocctl watch`, between the pipeline and dispatch. Costs nothing without a subscriber.

Dispatch comes first: the job is durable and the log record is written before a client sees the match. Matches that a
throttle held back are shown with `held_by`, because a client of `watch` wants to see every match of the rules.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cnprocd.delivery import Delivery, Fate, RecordedMatch
from cnprocd.json_value import JsonObject
from cnprocd.rules.compile import Match

MATCHES = "matches"


class Tap:
    """A Delivery in front of another one. Complete without observers; the control room becomes one."""

    def __init__(self, inner: Delivery) -> None:
        self._inner = inner
        self._observers: list[tuple[Callable[[str, JsonObject], None], Callable[[str], bool]]] = []

    def observe(self, publish: Callable[[str, JsonObject], None], wanted: Callable[[str], bool]) -> None:
        """Publish every match from now on, while `wanted` returns true for the topic MATCHES."""
        self._observers.append((publish, wanted))

    def decide(self, match: Match) -> Fate:
        """Let the other delivery decide. What it holds back in a flood is not published."""
        return self._inner.decide(match)

    def holds(self, rule: str, fields: JsonObject, at_ns: int) -> bool:
        return self._inner.holds(rule, fields, at_ns)

    def is_below(self, rule: str, fields: JsonObject, more: int) -> bool:
        return self._inner.is_below(rule, fields, more)

    def hold(self, rule: str, fields: JsonObject, at_ns: int, count: int) -> None:
        self._inner.hold(rule, fields, at_ns, count)

    def room(self, rule: str) -> int:
        return self._inner.room(rule)

    def note_dropped(self, rule: str, count: int) -> None:
        self._inner.note_dropped(rule, count)

    @property
    def again_s(self) -> float | None:
        return self._inner.again_s

    def catch_up(self, budget_s: float) -> None:
        self._inner.catch_up(budget_s)

    def deliver(self, matches: list[RecordedMatch]) -> None:
        """Deliver the matches, then publish them."""
        self._inner.deliver(matches)
        for publish, wanted in self._observers:
            if wanted(MATCHES):
                now_ns = time.time_ns()
                for recorded in matches:
                    publish(MATCHES, {"match": {"time_ns": now_ns, **recorded.record}})
