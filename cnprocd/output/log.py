"""Write log records as JSON lines, to a console, or to the journal; chosen once, at start.

structlog carries the records: `RecordLogger` is its bound logger and the `Log` of all parts (cnprocd/log.py). The
levels are those of syslog, because structlog has no `notice`. Records of matches do not pass through it (write_match).

A reader that does not read, a closed pipe or a full disk must not stop the daemon and its hooks: a record goes into a
queue that never waits (log_queue.py). What it must drop is counted and reported as `log_lost`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from typing import Literal

import structlog

from cnprocd.edge import EdgeState
from cnprocd.errors import CnprocdError
from cnprocd.json_value import JsonDict, JsonObject, JsonValue, json_text
from cnprocd.log import LEVELS, Level, Log
from cnprocd.output import console, journal
from cnprocd.output.log_queue import LogQueue, Lost
from cnprocd.output.sink import JournalSink, sink_of

LOG_BOUND_S = 2.0  # at a stop, for records that wait
Format = Literal["auto", "json", "console", "journal"]


class LogOutput:
    """The end of structlog's chain: encodes records and hands them to a queue that never waits.

    `encoders`: how a record becomes bytes, and the queue for them. The second is used while the first is broken.
    """

    def __init__(self) -> None:
        self.lowest = LEVELS.index("info")
        self.outputs: list[tuple[Callable[[JsonObject], bytes], LogQueue]] = []
        self.log: Log | None = None

    def set_level(self, level: Level) -> None:
        """Write only records that are at least as severe as `level`, from now on."""
        self.lowest = LEVELS.index(level)

    def write(self, record: JsonObject) -> None:
        rule = record.get("rule") if record.get("event") == "rule_matched" else None
        name = rule if isinstance(rule, str) else None
        for encode, queue in self.outputs:
            try:
                queue.add(encode(record), name)
            except OSError:
                continue
            return
        self.outputs[0][1].drop(name)

    def write_match(self, level: Level, message: str, record: JsonObject) -> str | None:
        """Write the record of a match without structlog, whose calls and copies cost as much as the text.

        The bytes are the same. A burst writes thousands of them. Return the JSON text of `record` if it was made.
        """
        if LEVELS.index(level) < self.lowest:
            return None
        now, (encode, queue) = _now(), self.outputs[0]
        if encode is not _json_line:
            self.write({"timestamp": now, "level": level, "event": "rule_matched", "message": message, **record})
            return None
        text = json_text(record)
        head = f'{{"timestamp":"{now}","level":"{level}","event":"rule_matched","message":{_quoted(message)},'
        try:
            queue.add((head + text[1:] + "\n").encode("ascii"), str(record["rule"]))
        except OSError:
            self.write({"timestamp": now, "level": level, "event": "rule_matched", "message": message, **record})
        return text

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write the records of this block with as few system calls as possible, at its end."""
        queues = [queue for _, queue in self.outputs if queue.hold()]
        try:
            yield
        finally:
            for queue in queues:
                queue.release()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use an event loop to wait for room in the output."""
        for _, queue in self.outputs:
            queue.attach(loop)

    async def close(self, bound_s: float) -> int:
        """Write what waits, for at most so long. Returns how many records were not written."""
        return sum(await asyncio.gather(*(queue.close(bound_s) for _, queue in self.outputs)))

    @property
    def lost(self) -> Lost:
        """What was dropped since start."""
        return self.outputs[0][1].lost

    @property
    def queued(self) -> int:
        """Records that wait for room."""
        return sum(queue.queued for _, queue in self.outputs)

    @property
    def edges(self) -> list[EdgeState]:
        """The workers that write to files."""
        return [queue.edge for _, queue in self.outputs if queue.edge is not None]

    def report(self, lost: Lost) -> None:
        """Log what was dropped."""
        assert self.log is not None
        self.log(
            "error",
            "log_lost",
            records=lost.records,
            matches=lost.matches,
            rules=dict(lost.by_rule),
            message=f"{lost.records} log records were dropped, {lost.matches} of them matches: the output had no room",
        )


def make_output(wanted: Format, stdout: int, under_journal: bool) -> LogOutput:
    """Return the output for `wanted`; `auto`: the journal under systemd, the console on a terminal, else JSON lines.

    Raises CnprocdError: the output is closed.
    """
    chosen = wanted
    if wanted == "auto":
        chosen = "journal" if under_journal else "console" if os.isatty(stdout) else "json"
    output = LogOutput()
    if chosen == "journal":
        output.outputs.append((journal.encode, LogQueue(JournalSink(journal.JOURNAL_SOCKET), output.report)))
    try:
        stream = LogQueue(sink_of(stdout), output.report)
    except OSError as error:
        if chosen != "journal":
            what = f"cannot write log records to standard output: {error.strerror}"
            raise CnprocdError(what, "open it, or use --log-format journal") from error
        return output
    colour = os.isatty(stdout)
    output.outputs.append((_console_line(colour) if chosen == "console" else _json_line, stream))
    return output


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
    output.log = log
    return log


def _stamp(logger: object, method: str, event: structlog.typing.EventDict) -> tuple[tuple[JsonDict], JsonDict]:
    """Return the record as the argument of LogOutput.write: time (RFC 3339, UTC, microseconds), level, event, fields.

    One processor, because each costs a copy of a match's thirty fields.
    """
    return ({"timestamp": _now(), "level": event.pop("level"), "event": event.pop("event"), **event},), {}


def _now() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return f"{_date_of(seconds)}.{nanoseconds // 1000:06}Z"


@lru_cache(maxsize=2)
def _date_of(seconds: int) -> str:
    """Return the date and time of a second since 1970, without its zone."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:-6]


def _json_line(record: JsonObject) -> bytes:
    return json_text(record).encode("ascii") + b"\n"


def _console_line(colour: bool) -> Callable[[JsonObject], bytes]:
    return lambda record: console.line(record, colour).encode("utf-8", "backslashreplace") + b"\n"
