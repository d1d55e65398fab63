"""Render log records for a terminal: one line each, with colour if the output is a terminal. PURE.

The layout is fixed: time, level, event, the message, then the other fields.
"""

from __future__ import annotations

from cnprocd.json_value import JsonObject, JsonValue

_COLOURS = {"debug": "2", "notice": "1", "warning": "33", "error": "31", "critical": "1;31"}
_QUIET = frozenset({"timestamp", "level", "event", "message"})


def line(record: JsonObject, colour: bool) -> str:
    """Return a record as one line of text. Absent values are omitted."""
    level = str(record.get("level", "info"))
    code = _COLOURS.get(level)
    head = f"{str(record.get('timestamp', ''))[11:23]} {level:8}"
    event = str(record.get("event", ""))
    if colour and code:
        head, event = f"\x1b[{code}m{head}\x1b[0m", f"\x1b[{code}m{event}\x1b[0m"
    rest = " ".join(
        f"{name}={_shown(value)}" for name, value in record.items() if name not in _QUIET and value is not None
    )
    return " ".join(part for part in (head, event, str(record.get("message") or ""), rest) if part)


def _shown(value: JsonValue) -> str:
    text = str(value)
    return f'"{text}"' if " " in text or not text else text
