"""Rules as the rule language writes them: what a rule file must say to give exactly this rule, defaults included. PURE.

`cnprocctl rules show` prints it, and its digest shows whether two rules are the same. A field of ruleset.py whose
name carries a unit (`timeout_s`, `output_limit_bytes`) is written with its plain key and a unit in the value.
"""

from __future__ import annotations

import hashlib
import json
import signal as signals
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import cast

from cnprocd.json_value import JsonDict, JsonValue
from cnprocd.process.model import NO_LOGIN
from cnprocd.rules.ruleset import LOGIN_UNSET, Rule
from cnprocd.rules.values import Comparison, Field, IntSet, Pattern, Template

_EVERY_SIGNAL = frozenset(range(1, 65))
_TIMES = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
_SIZES = (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10))
_SIZE_KEYS = ("max_rss",)  # comparisons with sizes; all others compare times


def written_rule(rule: Rule) -> JsonDict:
    """Return a rule as the plain data of a rule file."""
    return _mapping(rule)


def digest(rule: Rule) -> str:
    """Return 16 hexadecimal digits that two rules share if they differ in `enabled` at most."""
    data = {key: value for key, value in written_rule(rule).items() if key != "enabled"}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _mapping(value: object) -> JsonDict:
    """Return the keys of a dataclass of ruleset.py, without those that are not given."""
    found: JsonDict = {}
    for one in fields(value):  # type: ignore[arg-type]  # a dataclass, as _written() has found
        held = getattr(value, one.name)
        if one.name == "log" and held is None:
            found["log"] = False
        elif held not in (None, ()) and one.compare:  # `given` is not a key of a file
            found[_key(one.name)] = _written(one.name, held)
    return found


def _key(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_s").removesuffix("_")


def _written(name: str, value: object) -> JsonValue:
    if name.endswith("_s"):
        return duration(cast(float, value))
    if name.endswith("_bytes"):
        return size(cast(int, value))
    if name == "umask":
        return f"{value:04o}"
    if isinstance(value, Comparison):
        return f"{value.op} {size(int(value.value)) if name in _SIZE_KEYS else duration(value.value)}"
    if isinstance(value, IntSet):
        return _one_or_list([low if low == high else f"{low}-{high}" for low, high in value.ranges])
    if isinstance(value, frozenset):
        return "any" if value == _EVERY_SIGNAL else _one_or_list([_signal(number) for number in sorted(value)])
    if name == "loginuid":
        return _one_or_list([LOGIN_UNSET if one == NO_LOGIN else one for one in cast(tuple[int | str, ...], value)])
    if isinstance(value, tuple):
        found = [_written("", one) for one in value]
        return found if name in ("command", "any", "all") else _one_or_list(found)
    if isinstance(value, Mapping):
        return {key: _written("", one) for key, one in value.items()}
    return _scalar(value)


def _scalar(value: object) -> JsonValue:
    if isinstance(value, Pattern):
        return f"/{value.text}/" if value.kind == "regex" else value.text
    if isinstance(value, Template):
        return "".join(
            f"{{{part.name}}}" if isinstance(part, Field) else part.replace("{", "{{").replace("}", "}}")
            for part in value.parts
        )
    return _mapping(value) if is_dataclass(value) else cast(JsonValue, value)


def _one_or_list(found: list[JsonValue]) -> JsonValue:
    return found[0] if len(found) == 1 else found


def _signal(number: int) -> str | int:
    if signals.SIGRTMIN <= number <= signals.SIGRTMAX:
        return f"SIGRTMIN+{number - signals.SIGRTMIN}"
    return next((one.name for one in signals.Signals if one == number), number)


def duration(seconds: float) -> str:
    """Return a duration with the largest unit that gives a whole number: `90s`, `2m`, `500ms`."""
    for unit, factor in _TIMES:
        if seconds >= factor and seconds % factor == 0:
            return f"{int(seconds // factor)}{unit}"
    milliseconds = f"{seconds * 1000:.9f}".rstrip("0").rstrip(".")
    if float(milliseconds) / 1000 == seconds:
        return f"{milliseconds}ms"
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def size(count_bytes: int) -> str | int:
    """Return a size with the largest unit that gives a whole number: `64K`, `8M`; a number of bytes if none does."""
    for unit, factor in _SIZES:
        if count_bytes and count_bytes % factor == 0:
            return f"{count_bytes // factor}{unit}"
    return count_bytes
