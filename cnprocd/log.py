"""How every part of cnprocd writes log records: one protocol, the levels, and one rate limiter. PURE.

`Log` is a callable, so a part that logs needs neither a logger object nor structlog. output/log.py makes the real one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

from cnprocd.json_value import JsonObject, JsonValue

Level = Literal["debug", "info", "notice", "warning", "error", "critical"]
LEVELS: tuple[Level, ...] = ("debug", "info", "notice", "warning", "error", "critical")
"""From the least to the most severe. The names are those of syslog(3), without `alert` and `emerg`."""

Message = str | Callable[[Mapping[str, int]], str]
"""The text of a throttled record, or a function from the accumulated counts to it."""


class Log(Protocol):
    """Write one record. `event` is its stable snake_case class; fields are JSON values."""

    def __call__(self, level: Level, event: str, **fields: JsonValue) -> None: ...


class MatchLog(Protocol):
    """Write the record of a match. Return its JSON text if it was made: the history needs it as well."""

    def __call__(self, level: Level, message: str, record: JsonObject) -> str | None: ...


def match_log(log: Log) -> MatchLog:
    """Return a MatchLog that writes as all other records are written."""

    def write(level: Level, message: str, record: JsonObject) -> None:
        log(level, "rule_matched", message=message, **record)

    return write


class _Pending(NamedTuple):
    level: Level
    counts: Counter[str]
    message: Message
    fields: JsonObject


class ThrottledLog:
    """Write at most one record of each class every `every_s` seconds; a record carries the counts since the last one.

    The first occurrence of a class is logged at once. Later ones are counted until the interval has passed. Call
    `flush_due` about once a second and `flush` at the end, so that the last counts are logged as well.

    The caller passes the time (`now_s`, any monotonic clock in seconds).
    """

    def __init__(self, log: Log, every_s: float) -> None:
        self._log = log
        self._every_s = every_s
        self._logged_at_s: dict[str, float] = {}
        self._pending: dict[str, _Pending] = {}

    @property
    def pending(self) -> bool:
        """Whether counts wait for their record."""
        return bool(self._pending)

    def add(
        self, level: Level, event: str, now_s: float, counts: Mapping[str, int], message: Message, **fields: JsonValue
    ) -> None:
        """Add `counts` to those of the class `event`, and log them if its interval has passed.

        The counts become fields of the record. Level, message and the other fields are those of the latest call.
        """
        former = self._pending.get(event)
        total = Counter(counts) if former is None else former.counts
        if former is not None:
            total.update(counts)
        self._pending[event] = _Pending(level, total, message, fields)
        if self._is_due(event, now_s):
            self._write(event, now_s)

    def flush_due(self, now_s: float) -> None:
        """Log the counts of every class whose interval has passed."""
        for event in [event for event in self._pending if self._is_due(event, now_s)]:
            self._write(event, now_s)

    def flush(self, now_s: float) -> None:
        """Log all counts now, whether or not their interval has passed."""
        for event in list(self._pending):
            self._write(event, now_s)

    def _is_due(self, event: str, now_s: float) -> bool:
        logged_at_s = self._logged_at_s.get(event)
        return logged_at_s is None or now_s - logged_at_s >= self._every_s

    def _write(self, event: str, now_s: float) -> None:
        level, counts, message, fields = self._pending.pop(event)
        self._logged_at_s[event] = now_s
        text = message if isinstance(message, str) else message(counts)
        self._log(level, event, **{**counts, **fields, "message": text})
