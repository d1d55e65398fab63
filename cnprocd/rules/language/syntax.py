"""From the text of a rule file to the typed values of values.py: one function per small language.

Strategy: each function takes what YAML gave (any type) and returns a frozen value or raises MistakeError with all its
mistakes, each with what would be accepted. A list is walked by `each`, so a mistake names its item. Fact relied on: a
wait status has an 8-bit exit code and a signal 1..64. Digits are bounded in every expression here, so that no number
grows endlessly. Patterns, users and groups, which need to know the world outside, are in names.py.
"""

from __future__ import annotations

import re
import signal as signals
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

from cnprocd.rules.language.mistakes import Mistake, MistakeError, mistake, nearest, shown
from cnprocd.rules.values import FIELD_NAMES, Comparison, Field, IntSet, Octal, Operator, Template

T = TypeVar("T")
SIGNALS = range(1, 65)

ACCEPT_CODES = 'a number 0-255, "!= 0", "> 3", a range "1-127", or a list of these'
ACCEPT_SIGNALS = 'a signal name (SIGKILL or KILL), a number 1-64, "SIGRTMIN+3", "any", or a list of these'
ACCEPT_DURATION = 'a duration with its unit: "500ms", "30s", "5m", "1h" or "7d"'
ACCEPT_SIZE = 'a number of bytes, or with a unit of 1024: "64K", "8M", "1G", "2T"'
ACCEPT_TIME_COMPARISON = 'a comparison with a duration: "< 5s", ">= 10m"'
ACCEPT_SIZE_COMPARISON = 'a comparison with a size: "> 500M", "<= 2G"'


def each(value: object, parse: Callable[[object], T], accepted: str) -> list[T]:
    """Parse one value, or every item of a list of them; all mistakes at once, an empty list is one."""
    if not isinstance(value, list):
        return [parse(value)]
    if not value:
        raise mistake("the list is empty", accepted)
    parsed: list[T] = []
    found: list[Mistake] = []
    for index, item in enumerate(value):
        try:
            parsed.append(parse(item))
        except MistakeError as error:
            found += [replace(m, at=(index, *m.at)) for m in error.mistakes]
    if found:
        raise MistakeError(*found)
    return parsed


def text(value: object, accepted: str) -> str:
    """A string that is not empty and has no NUL; a number or true/false gets the advice to quote it."""
    if isinstance(value, bool | int | float):
        raise mistake(f"{shown(value)} is not text", accepted, f'put it in quotes: "{shown(value)}"')
    if not isinstance(value, str):
        raise mistake(f"expected text, found {shown(value)}", accepted)
    if not value:
        raise mistake("the text is empty", accepted)
    if "\0" in value:
        raise mistake("the text contains a NUL character", accepted)
    return value


# --- numbers

_CODES = re.compile(r"(?:(!=|==|>=|<=|>|<)\s*)?([0-9]{1,9})|([0-9]{1,9})\s*-\s*([0-9]{1,9})", re.ASCII)


def exit_codes(value: object) -> IntSet:
    """Exit codes 0..255: a number, a comparison, an inclusive range, or a list of these, united."""
    ranges = sorted(span for spans in each(value, _code_ranges, ACCEPT_CODES) for span in spans)
    merged = [ranges[0]]
    for low, high in ranges[1:]:
        last_low, last_high = merged[-1]
        if low <= last_high + 1:
            merged[-1] = (last_low, max(last_high, high))
        else:
            merged.append((low, high))
    return IntSet(tuple(merged))


def _code_ranges(value: object) -> list[tuple[int, int]]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(int(value))
    parts = _CODES.fullmatch(value.strip()) if isinstance(value, str) else None
    if parts is None:
        raise mistake(f"{shown(value)} is not an exit code", ACCEPT_CODES)
    op, number, first, last = parts.groups()
    if first is not None:
        return [_code_range(int(first), int(last))]
    n = int(number)
    if op is None and n > 255:
        raise mistake(f"{n} is not an exit code: they end at 255", ACCEPT_CODES)
    spans = {
        "!=": [(0, n - 1), (n + 1, 255)],
        ">": [(n + 1, 255)],
        ">=": [(n, 255)],
        "<": [(0, n - 1)],
        "<=": [(0, n)],
    }.get(op, [(n, n)])
    kept = [(low, min(high, 255)) for low, high in spans if low <= min(high, 255)]
    if not kept:
        raise mistake(f"no exit code is {op} {n}", ACCEPT_CODES)
    return kept


def _code_range(first: int, last: int) -> tuple[int, int]:
    if first > last:
        raise mistake(f"the range {first}-{last} is empty", ACCEPT_CODES, f'write "{last}-{first}"')
    if last > 255:
        raise mistake(f"the range {first}-{last} leaves 0-255", ACCEPT_CODES)
    return first, last


_REALTIME = re.compile(r"SIGRTM(IN\+|AX-)([0-9]{1,2})", re.ASCII)


def signal_numbers(value: object) -> frozenset[int]:
    """Signals by name (any case, SIG optional), by number, or all of them with "any"."""
    return frozenset().union(*each(value, _signals, ACCEPT_SIGNALS))


def _signals(value: object) -> frozenset[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        number: int | None = int(value)
    else:
        word = text(value, ACCEPT_SIGNALS).upper()
        if word == "ANY":
            return frozenset(SIGNALS)
        number = _signal_named(word)
    if number is None or number not in SIGNALS:
        known = [name for full in signals.Signals.__members__ for name in (full, full[3:])]
        raise mistake(f"{shown(value)} is not a signal", ACCEPT_SIGNALS, nearest(str(value).upper(), known))
    return frozenset({number})


def _signal_named(word: str) -> int | None:
    if re.fullmatch(r"[0-9]{1,3}", word, re.ASCII):
        return int(word)
    name = word if word.startswith("SIG") else "SIG" + word
    realtime = _REALTIME.fullmatch(name)
    if realtime is None:
        return int(signals.Signals[name]) if name in signals.Signals.__members__ else None
    offset = int(realtime[2])
    number = signals.SIGRTMIN + offset if realtime[1] == "IN+" else signals.SIGRTMAX - offset
    return number if signals.SIGRTMIN <= number <= signals.SIGRTMAX else None


def whole(low: int, high: int) -> Callable[[object], int]:
    """A parser of whole numbers within low..high."""
    accepted = f"a whole number {low} to {high}"

    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise mistake(f"{shown(value)} is not a whole number", accepted)
        if not low <= value <= high:
            raise mistake(f"{value} is out of range", accepted)
        return int(value)

    return parse


def umask(value: object) -> int:
    """Permission bits from "0077" (quoted) or 0o77; a plain 0077 is decimal in YAML 1.2 and so refused."""
    accepted = 'octal permission bits: "0077" in quotes, or 0o77'
    if isinstance(value, int) and not isinstance(value, Octal):
        raise mistake(f"{shown(value)} is a decimal number in YAML 1.2", accepted)
    octal = f"{int(value):o}" if isinstance(value, Octal) else text(value, accepted)
    if not re.fullmatch(r"(0o)?0?[0-7]{1,3}", octal, re.ASCII):
        raise mistake(f"{shown(value)} is not an umask", accepted)
    return int(octal.removeprefix("0o"), 8)


# --- quantities

_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|d)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([BKMGT]?)", re.ASCII)
_BYTES = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_COMPARISON = re.compile(r"(<=|>=|==|!=|<|>)\s*(.+)")


def duration(value: object) -> float:
    """A time above zero, in seconds."""
    seconds = duration_or_zero(value)
    if seconds == 0:
        raise mistake("the duration is zero", ACCEPT_DURATION)
    return seconds


def duration_or_zero(value: object) -> float:
    """A time in seconds; the unit is never guessed."""
    parts = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if parts is None:
        unitless = isinstance(value, int | float) and not isinstance(value, bool)
        hint = f'add the unit: "{value}s"' if unitless else ""
        raise mistake(f"{shown(value)} is not a duration", ACCEPT_DURATION, hint)
    # Division keeps "5ms" at exactly 0.005, which multiplication by 0.001 does not for every number.
    return float(parts[1]) / 1000 if parts[2] == "ms" else float(parts[1]) * _SECONDS[parts[2]]


def size(value: object) -> int:
    """A number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return int(value)
    parts = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if parts is None:
        raise mistake(f"{shown(value)} is not a size", ACCEPT_SIZE)
    return int(float(parts[1]) * _BYTES[parts[2]]) if "." in parts[1] else int(parts[1]) * _BYTES[parts[2]]


def size_from(low: int, high: int) -> Callable[[object], int]:
    """A parser of sizes within low..high bytes."""

    def parse(value: object) -> int:
        number = size(value)
        if not low <= number <= high:
            raise mistake(f"{shown(value)} is out of range", f"{low} to {high} bytes; {ACCEPT_SIZE}")
        return number

    return parse


def time_comparison(value: object) -> Comparison:
    """`< 5s`: the value in seconds."""
    return _comparison(value, duration_or_zero, ACCEPT_TIME_COMPARISON)


def size_comparison(value: object) -> Comparison:
    """`> 500M`: the value in bytes."""
    return _comparison(value, size, ACCEPT_SIZE_COMPARISON)


def _comparison(value: object, quantity: Callable[[object], float], accepted: str) -> Comparison:
    parts = _COMPARISON.fullmatch(value.strip()) if isinstance(value, str) else None
    if parts is None:
        raise mistake(f"{shown(value)} is not a comparison", accepted)
    try:
        compared = Comparison(cast(Operator, parts[1]), float(quantity(parts[2])))
    except MistakeError as error:
        raise mistake(error.mistakes[0].message, accepted) from error
    if compared.value == 0 and compared.op == "<":
        raise mistake(f"{shown(value)} can never hold", accepted)
    return compared


# --- words


def flag(value: object) -> bool:
    """true or false, and nothing that merely looks like it."""
    if isinstance(value, bool):
        return value
    hint = "YAML 1.2 reads yes, no, on and off as text" if value in ("yes", "no", "on", "off") else ""
    raise mistake(f"{shown(value)} is neither true nor false", "true or false", hint)


def word_of(*words: str) -> Callable[[object], str]:
    """A parser for a closed set of words."""
    accepted = ", ".join(words[:-1]) + " or " + words[-1]

    def parse(value: object) -> str:
        if isinstance(value, str) and value in words:
            return value
        hint = nearest(value, words) if isinstance(value, str) else ""
        raise mistake(f"{shown(value)} is not one of the words known here", accepted, hint)

    return parse


# --- templates

_TEMPLATE_TOKEN = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")


def template(value: object) -> Template:
    """Text with {field} in it; {{ and }} stand for the braces themselves."""
    accepted = 'text with fields in it, like "{comm}[{pid}]"; {{ and }} for a brace'
    if value == "":
        return Template(())
    parts: list[str | Field] = []
    for token in _TEMPLATE_TOKEN.findall(text(value, accepted)):
        part = _template_part(token, accepted)
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return Template(tuple(parts))


def _template_part(token: str, accepted: str) -> str | Field:
    if token in ("{{", "}}"):
        return token[0]
    if token in ("{", "}"):
        raise mistake(f'a "{token}" stands alone', accepted, f'write "{token * 2}" for the character itself')
    if not token.startswith("{"):
        return token
    name = token[1:-1]
    if name in FIELD_NAMES:
        return Field(name)
    raise mistake(f'there is no field "{name}"', "{" + "} {".join(FIELD_NAMES) + "}", nearest(name, FIELD_NAMES))
