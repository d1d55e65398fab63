"""Write log records as JSON lines, to a console, or to the journal; chosen once, at start.

structlog carries the records: `RecordLogger` is its bound logger and the `Log` of all parts (cnprocd/log.py). The
levels are those of syslog, because structlog has no `notice`.

A closed pipe or a full disk must not stop the daemon and its hooks. A record that cannot be written is counted and
dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal, TextIO

import structlog

from cnprocd.json_value import JsonDict, JsonObject, JsonValue
from cnprocd.log import LEVELS, Level, Log
from cnprocd.output import console
from cnprocd.output.journal import JournalSink, JournalUnavailableError

Format = Literal["auto", "json", "console", "journal"]
Emit = Callable[[JsonObject], None]


class LogOutput:
    """The end of structlog's chain: writes whole records, and counts those that it could not write."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.lost = 0
        self.lowest = LEVELS.index("info")

    def set_level(self, level: Level) -> None:
        """Write only records that are at least as severe as `level`, from now on."""
        self.lowest = LEVELS.index(level)

    def write(self, record: JsonObject) -> None:
        try:
            self._emit(record)
        except (OSError, ValueError):
            self.lost += 1


def make_output(wanted: Format, stream: TextIO, under_journal: bool) -> LogOutput:
    """Return the output for `wanted`; `auto`: the journal under systemd, the console on a terminal, else JSON lines."""
    chosen = wanted
    if wanted == "auto":
        chosen = "journal" if under_journal else "console" if stream.isatty() else "json"
    if chosen == "journal":
        return LogOutput(_journal_or(lambda record: _print_json(record, stream)))
    if chosen == "console":
        colour = stream.isatty()
        return LogOutput(lambda record: _print(console.line(record, colour), stream))
    return LogOutput(lambda record: _print_json(record, stream))


def _journal_or(fallback: Emit) -> Emit:
    """Return a function that writes to the journal, or to `fallback` while journald cannot be reached."""
    sink = JournalSink()

    def emit(record: JsonObject) -> None:
        try:
            sink.emit(record)
        except JournalUnavailableError:
            fallback(record)

    return emit


class RecordLogger(structlog.BoundLoggerBase):
    """structlog's bound logger with the signature of `Log`."""

    def __call__(self, level: Level, event: str, **fields: JsonValue) -> None:
        if LEVELS.index(level) >= self._logger.lowest:
            self._proxy_to_logger("write", event, level=level, **fields)


def make_log(output: LogOutput, threshold: Level = "info") -> Log:
    """Return a Log that writes to `output` the records that are at least as severe as `threshold`."""
    output.set_level(threshold)
    # Bound once: structlog's lazy proxy binds anew for every record.
    log: Log = structlog.wrap_logger(output, processors=[_stamp], wrapper_class=RecordLogger).bind()
    return log


def _stamp(logger: object, method: str, event: structlog.typing.EventDict) -> tuple[tuple[JsonDict], JsonDict]:
    """Return the record as the argument of LogOutput.write: time (RFC 3339, UTC, microseconds), level, event, fields.

    One processor, because each costs a copy of a match's thirty fields.
    """
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return ({"timestamp": now, "level": event.pop("level"), "event": event.pop("event"), **event},), {}


# One encoder for all records, because json.dumps() with arguments makes a new one each time.
_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode


def _print_json(record: JsonObject, stream: TextIO) -> None:
    # ensure_ascii, so that no lone surrogate and no C1 control reaches a terminal or a parser.
    _print(_encode(record), stream)


def _print(text: str, stream: TextIO) -> None:
    stream.write(text + "\n")
    stream.flush()
