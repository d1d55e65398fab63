"""Where records go: JSON lines, a console, or the journal; chosen once, at start.

All that is said goes through one callable, `Log`: a level, a stable snake_case event class, and fields. structlog
carries it: its processor adds the time and puts the contract's fields first. `notice` is not one of structlog's levels
but is syslog's, and is what a normal but significant record is.

A reader that is gone (a closed pipe) or a full disk must not take the daemon and its cleanups down: a record that
cannot be written is counted and dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO

import structlog

from cnprocd.log import LEVELS, Level, Log
from cnprocd.output import console
from cnprocd.output.journal import JournalSink, JournalUnavailableError

Format = Literal["auto", "json", "console", "journal"]
Emit = Callable[[Mapping[str, object]], None]


class Output:
    """The end of the processor chain: takes whole records, counts those it could not write."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.lost = 0

    def write(self, record: Mapping[str, object]) -> None:
        try:
            self._emit(record)
        except (OSError, ValueError):
            self.lost += 1


def make_output(wanted: Format, stream: TextIO, under_journal: bool) -> Output:
    """The output for `wanted`; `auto` is the journal under systemd, the console on a terminal, else JSON lines."""
    chosen = wanted
    if wanted == "auto":
        chosen = "journal" if under_journal else "console" if stream.isatty() else "json"
    if chosen == "journal":
        return Output(_journal_or(lambda record: _print_json(record, stream)))
    if chosen == "console":
        colour = stream.isatty()
        return Output(lambda record: _print(console.line(record, colour), stream))
    return Output(lambda record: _print_json(record, stream))


def _journal_or(fallback: Emit) -> Emit:
    """The journal, and while it cannot be reached (journald restarting) the fallback."""
    sink = JournalSink()

    def emit(record: Mapping[str, object]) -> None:
        try:
            sink.emit(record)
        except JournalUnavailableError:
            fallback(record)

    return emit


def make_log(output: Output, threshold: Level = "info") -> Log:
    """A Log that writes to `output` whatever is at least as severe as `threshold`."""
    lowest = LEVELS.index(threshold)
    logger = structlog.wrap_logger(
        output,
        processors=[_stamp],
        wrapper_class=structlog.BoundLoggerBase,
    ).bind()  # once: the lazy proxy binds anew for every record

    def log(level: Level, event: str, **fields: object) -> None:
        if LEVELS.index(level) >= lowest:
            # As one value: structlog copies its keywords twice, and a match has thirty fields.
            logger._proxy_to_logger("write", event, level=level, fields=fields)

    return log


def _stamp(
    logger: object, method: str, said: structlog.typing.EventDict
) -> tuple[tuple[dict[str, object]], dict[str, object]]:
    """The record as the one argument of Output.write: time, RFC 3339 in UTC to the microsecond, and contract first."""
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return ({"timestamp": now, "level": said["level"], "event": said["event"], **said["fields"]},), {}


# One encoder for all records: json.dumps() with arguments makes a new one each time.
_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode


def _print_json(record: Mapping[str, object], stream: TextIO) -> None:
    # ensure_ascii: a lone surrogate or a C1 control must not reach a terminal or break a reader
    _print(_encode(record), stream)


def _print(text: str, stream: TextIO) -> None:
    stream.write(text + "\n")
    stream.flush()
