"""Text for a terminal: colour, aligned columns, times and sizes with units; and JSON output.

NO_COLOR (no-color.org) and TERM=dumb turn colour off. Text that a process chose is escaped before it comes here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

from cnprocd.json_value import JsonValue

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Style:
    """Colour for one stream, if it is a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = sys.stdout if stream is None else stream
        self.colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def __call__(self, name: str, text: str) -> str:
        return f"\x1b[{_CODES[name]}m{text}\x1b[0m" if self.colour else text


def print_json(value: JsonValue, *, line: bool = False) -> None:
    """Print a whole value, indented; or one line of a stream."""
    if line:
        print(json.dumps(value, separators=(",", ":")), flush=True)
    else:
        print(json.dumps(value, indent=2))


def columns(rows: Sequence[Sequence[str]], heads: Sequence[str], style: Style) -> Iterable[str]:
    """Yield the heads and rows as lines with aligned columns; the last column is not padded."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    yield style("bold", line(heads))
    yield from map(line, rows)


def duration(seconds: float | None) -> str:
    """Return a duration as `3.2ms`, `12s`, `4m12s`, `3h04m` or `2d03h`; `-` for None."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.3g}ms"
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.3g}s" if seconds < 10 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def ago(time_ns: int | None) -> str:
    """Return the time since a moment of the wall clock, in nanoseconds since 1970."""
    return "never" if time_ns is None else f"{duration(max(0.0, time.time() - time_ns / 1e9))} ago"


def clock(time_ns: int) -> str:
    """Return a moment as local time to the second, with its zone: `2026-11-25 22:00:15+01:00`."""
    text = time.strftime("%Y-%m-%d %H:%M:%S%z", time.localtime(time_ns / 1e9))
    return f"{text[:-2]}:{text[-2:]}"


def state_text(enabled: bool, until_ns: int | None) -> str:
    """Return the state of a rule: `enabled`, `DISABLED`, or `DISABLED until` a time."""
    if enabled:
        return "enabled"
    return "DISABLED" if until_ns is None else f"DISABLED until {clock(until_ns)}"


def size(count_bytes: float) -> str:
    """Return a size as `832 B` or `8.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_bytes < 1024 or unit == "GiB":
            return f"{count_bytes:.0f} B" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    raise AssertionError


def counted(number: int, what: str, ending: str = "s") -> str:
    """Return a number with its noun: `1 rule`, `2 rules`. `ending` is that of the plural."""
    return f"{number} {what}{'' if number == 1 else ending}"


def text(value: JsonValue) -> str:
    """Return a JSON value for a column: `-` for null."""
    return "-" if value is None else str(value)
