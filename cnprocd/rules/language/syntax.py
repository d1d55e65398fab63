"""Parse the values of a rule file (values.py): one function per kind of value. PURE.

Each function takes a YAML value of any type and returns a frozen value, or raises InvalidValueError with all problems
and the accepted values. `each` parses a list and adds the index of the item to its problems. A wait status has an 8-bit
exit code and a signal 1..64 (wait(2)). Every regular expression here bounds its digits. Patterns, users and groups,
which depend on lists and on the machine, are in names.py.
"""

from __future__ import annotations

import re
import signal as signals
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

from cnprocd.rules.language.value_problem import InvalidValueError, ValueProblem, did_you_mean, invalid, shown
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
    """Parse one value, or every item of a list. Report the problems of all items; an empty list is a problem."""
    if not isinstance(value, list):
        return [parse(value)]
    if not value:
        raise invalid("the list is empty", accepted)
    parsed: list[T] = []
    found: list[ValueProblem] = []
    for index, item in enumerate(value):
        try:
            parsed.append(parse(item))
        except InvalidValueError as error:
            found += [replace(m, at=(index, *m.at)) for m in error.problems]
    if found:
        raise InvalidValueError(*found)
    return parsed


def text(value: object, accepted: str) -> str:
    """Return a string that is not empty and has no NUL. For a number or boolean, the hint is to quote it."""
    if isinstance(value, bool | int | float):
        raise invalid(f"expected text, found {shown(value)}", accepted, f'put it in quotes: "{shown(value)}"')
    if not isinstance(value, str):
        raise invalid(f"expected text, found {shown(value)}", accepted)
    if not value:
        raise invalid("the text is empty", accepted)
    if "\0" in value:
        raise invalid("the text contains a NUL character", accepted)
    return value


# Numbers.

_CODES = re.compile(r"(?:(!=|==|>=|<=|>|<)\s*)?([0-9]{1,9})|([0-9]{1,9})\s*-\s*([0-9]{1,9})", re.ASCII)


def exit_codes(value: object) -> IntSet:
    """Return exit codes 0..255: a number, a comparison, an inclusive range, or the union of a list of these."""
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
        raise invalid(f"invalid exit code: {shown(value)}", ACCEPT_CODES)
    op, number, first, last = parts.groups()
    if first is not None:
        return [_code_range(int(first), int(last))]
    n = int(number)
    if op is None and n > 255:
        raise invalid(f"invalid exit code: {n} is above 255", ACCEPT_CODES)
    spans = {
        "!=": [(0, n - 1), (n + 1, 255)],
        ">": [(n + 1, 255)],
        ">=": [(n, 255)],
        "<": [(0, n - 1)],
        "<=": [(0, n)],
    }.get(op, [(n, n)])
    kept = [(low, min(high, 255)) for low, high in spans if low <= min(high, 255)]
    if not kept:
        raise invalid(f"invalid exit code: no code is {op} {n}", ACCEPT_CODES)
    return kept


def _code_range(first: int, last: int) -> tuple[int, int]:
    if first > last:
        raise invalid(f"the range {first}-{last} is empty", ACCEPT_CODES, f'write "{last}-{first}"')
    if last > 255:
        raise invalid(f"the range {first}-{last} is not within 0-255", ACCEPT_CODES)
    return first, last


_REALTIME = re.compile(r"SIGRTM(IN\+|AX-)([0-9]{1,2})", re.ASCII)


def signal_numbers(value: object) -> frozenset[int]:
    """Return signals by name (any case, SIG optional), by number, or all signals for "any"."""
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
        raise invalid(f"invalid signal: {shown(value)}", ACCEPT_SIGNALS, did_you_mean(str(value).upper(), known))
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
    """Return a parser of whole numbers within low..high."""
    accepted = f"a whole number {low} to {high}"

    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise invalid(f"expected a whole number, found {shown(value)}", accepted)
        if not low <= value <= high:
            raise invalid(f"{value} is out of range", accepted)
        return int(value)

    return parse


def umask(value: object) -> int:
    """Return permission bits of "0077" (quoted) or 0o77. A plain 0077 is decimal in YAML 1.2: it is rejected."""
    accepted = 'octal permission bits: "0077" in quotes, or 0o77'
    if isinstance(value, int) and not isinstance(value, Octal):
        raise invalid(f"{shown(value)} is a decimal number in YAML 1.2", accepted)
    octal = f"{int(value):o}" if isinstance(value, Octal) else text(value, accepted)
    if not re.fullmatch(r"(0o)?0?[0-7]{1,3}", octal, re.ASCII):
        raise invalid(f"invalid umask: {shown(value)}", accepted)
    return int(octal.removeprefix("0o"), 8)


# Durations, sizes and comparisons.

_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|d)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([BKMGT]?)", re.ASCII)
_BYTES = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_COMPARISON = re.compile(r"(<=|>=|==|!=|<|>)\s*(.+)")


LONGEST_S = 3650 * 86400  # ten years: sums of times in nanoseconds stay within 64 bits


def duration(value: object) -> float:
    """Return a time above zero, in seconds."""
    seconds = duration_or_zero(value)
    if seconds == 0:
        raise invalid("the duration is zero", ACCEPT_DURATION)
    return seconds


def duration_or_zero(value: object) -> float:
    """Return a time in seconds. The unit is required."""
    parts = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if parts is None:
        unitless = isinstance(value, int | float) and not isinstance(value, bool)
        hint = f'add the unit: "{value}s"' if unitless else ""
        raise invalid(f"invalid duration: {shown(value)}", ACCEPT_DURATION, hint)
    # Division keeps "5ms" at exactly 0.005, which multiplication by 0.001 does not for every number.
    seconds = float(parts[1]) / 1000 if parts[2] == "ms" else float(parts[1]) * _SECONDS[parts[2]]
    if seconds > LONGEST_S:
        raise invalid(f"{shown(value)} is longer than {LONGEST_S // 86400} days", ACCEPT_DURATION)
    return seconds


def size(value: object) -> int:
    """Return a number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return int(value)
    parts = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if parts is None:
        raise invalid(f"invalid size: {shown(value)}", ACCEPT_SIZE)
    return int(float(parts[1]) * _BYTES[parts[2]]) if "." in parts[1] else int(parts[1]) * _BYTES[parts[2]]


def size_from(low: int, high: int) -> Callable[[object], int]:
    """Return a parser of sizes within low..high bytes."""

    def parse(value: object) -> int:
        number = size(value)
        if not low <= number <= high:
            raise invalid(f"{shown(value)} is out of range", f"{low} to {high} bytes; {ACCEPT_SIZE}")
        return number

    return parse


def time_comparison(value: object) -> Comparison:
    """Return a comparison such as `< 5s`, with its value in seconds."""
    return _comparison(value, duration_or_zero, ACCEPT_TIME_COMPARISON)


def size_comparison(value: object) -> Comparison:
    """Return a comparison such as `> 500M`, with its value in bytes."""
    return _comparison(value, size, ACCEPT_SIZE_COMPARISON)


def _comparison(value: object, quantity: Callable[[object], float], accepted: str) -> Comparison:
    parts = _COMPARISON.fullmatch(value.strip()) if isinstance(value, str) else None
    if parts is None:
        raise invalid(f"invalid comparison: {shown(value)}", accepted)
    try:
        compared = Comparison(cast(Operator, parts[1]), float(quantity(parts[2])))
    except InvalidValueError as error:
        raise invalid(error.problems[0].message, accepted) from error
    if compared.value == 0 and compared.op == "<":
        raise invalid(f"{shown(value)} never holds", accepted)
    return compared


# Words.


def flag(value: object) -> bool:
    """Return true or false. Text such as "yes" is rejected."""
    if isinstance(value, bool):
        return value
    hint = "YAML 1.2 reads yes, no, on and off as text" if value in ("yes", "no", "on", "off") else ""
    raise invalid(f"expected true or false, found {shown(value)}", "true or false", hint)


def word_of(*words: str) -> Callable[[object], str]:
    """Return a parser of a closed set of words."""
    accepted = ", ".join(words[:-1]) + " or " + words[-1]

    def parse(value: object) -> str:
        if isinstance(value, str) and value in words:
            return value
        hint = did_you_mean(value, words) if isinstance(value, str) else ""
        raise invalid(f"unknown value: {shown(value)}", accepted, hint)

    return parse


# Templates.

_TEMPLATE_TOKEN = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")


def template(value: object) -> Template:
    """Return a text with {field} parts; {{ and }} are literal braces."""
    accepted = 'text with fields, like "{comm}[{pid}]"; {{ and }} for a brace'
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
        raise invalid(f'unmatched "{token}"', accepted, f'write "{token * 2}" for the character itself')
    if not token.startswith("{"):
        return token
    name = token[1:-1]
    if name in FIELD_NAMES:
        return Field(name)
    raise invalid(f'unknown field "{name}"', "{" + "} {".join(FIELD_NAMES) + "}", did_you_mean(name, FIELD_NAMES))
