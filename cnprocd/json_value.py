"""JSON values with types: what `json.loads` returns, and accessors that check each value where it is read. PURE.

An accessor returns a value of the expected type or raises JsonError, which names the path from the value that was read:
"jobs[3].attempts: expected an integer, found a string". To keep the whole path, read nested values through `get_dict`,
`get_list` and `get_map` with a function that reads one item; each adds its key or index to the errors of that function.
As in JSON, a boolean is not a number here, although Python's bool is an int.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from cnprocd.errors import EX_SOFTWARE, CnprocdError

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
JsonObject: TypeAlias = Mapping[str, JsonValue]
"""An object that is only read."""
JsonDict: TypeAlias = dict[str, JsonValue]
"""An object that is being built."""

T = TypeVar("T")


class JsonError(CnprocdError):
    """A JSON value is not of the expected form.

    `path` leads from the value that was read to the wrong one ("jobs[3].attempts"); it is empty for the value itself.
    """

    exit_status = EX_SOFTWARE

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.problem = problem
        self.path = path

    def below(self, step: str) -> JsonError:
        """Return this error as seen from the value that contains the wrong one at `step` (a key or `[index]`)."""
        joint = "." if self.path and not self.path.startswith("[") else ""
        return JsonError(self.problem, f"{step}{joint}{self.path}")


# One encoder, because json.dumps() with arguments makes a new one each time.
_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode


def json_text(value: JsonValue) -> str:
    """Return compact JSON. It is ASCII, so no lone surrogate and no C1 control reaches a terminal or a parser."""
    return _encode(value)


def parse_json(text: str | bytes) -> JsonValue:
    """Return the value of a JSON text. Raises JsonError."""
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise JsonError(f"invalid JSON: {error}") from error
    return value


# A value.


def as_str(value: JsonValue) -> str:
    """Return a string. Raises JsonError."""
    if isinstance(value, str):
        return value
    raise _unexpected("a string", value)


def as_bool(value: JsonValue) -> bool:
    """Return true or false. Raises JsonError."""
    if isinstance(value, bool):
        return value
    raise _unexpected("true or false", value)


def as_int(value: JsonValue, minimum: int | None = None, maximum: int | None = None) -> int:
    """Return an integer within the bounds, both included. Raises JsonError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise _unexpected(f"an integer{_bounds(minimum, maximum)}", value)
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise JsonError(f"expected an integer{_bounds(minimum, maximum)}, found {value}")
    return value


def as_number(value: JsonValue) -> int | float:
    """Return an integer or a finite float, as it is. Raises JsonError (also for NaN, which Python's json accepts)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _unexpected("a number", value)
    if isinstance(value, float) and not math.isfinite(value):  # isfinite() of an int above 1e308 would overflow
        raise JsonError(f"expected a number, found {value}")
    return value


def as_list(value: JsonValue) -> Sequence[JsonValue]:
    """Return an array. Raises JsonError."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return value
    raise _unexpected("an array", value)


def as_dict(value: JsonValue) -> JsonObject:
    """Return an object. Raises JsonError."""
    if isinstance(value, Mapping):
        return value
    raise _unexpected("an object", value)


def list_of(item: Callable[[JsonValue], T]) -> Callable[[JsonValue], list[T]]:
    """Return the function that reads an array by reading each item with `item`."""
    return lambda value: [_below(f"[{index}]", item, each) for index, each in enumerate(as_list(value))]


def map_of(item: Callable[[JsonValue], T]) -> Callable[[JsonValue], dict[str, T]]:
    """Return the function that reads an object whose keys are data, by reading each value with `item`."""
    return lambda value: {key: _below(_key(key), item, each) for key, each in as_dict(value).items()}


# The value of a key. Without a default, a missing key is an error; null is an error unless the name ends in `_or_none`.


def get_str(obj: JsonObject, key: str, default: str | None = None) -> str:
    """Return the string at `key`. Raises JsonError."""
    return _get(obj, key, as_str, default)


def get_str_or_none(obj: JsonObject, key: str) -> str | None:
    """Return the string at `key`, or None if the key is missing or its value is null. Raises JsonError."""
    return _get_or_none(obj, key, as_str)


def get_choice(obj: JsonObject, key: str, choices: Collection[str], default: str | None = None) -> str:
    """Return the string at `key`, which is one of `choices`. Raises JsonError."""
    return _get(obj, key, lambda value: _choice(value, choices), default)


def get_choice_or_none(obj: JsonObject, key: str, choices: Collection[str]) -> str | None:
    """Return the string at `key`, or None if the key is missing or its value is null. Raises JsonError."""
    return _get_or_none(obj, key, lambda value: _choice(value, choices))


def get_bool(obj: JsonObject, key: str, default: bool | None = None) -> bool:
    """Return the boolean at `key`. Raises JsonError."""
    return _get(obj, key, as_bool, default)


def get_int(
    obj: JsonObject, key: str, default: int | None = None, *, minimum: int | None = None, maximum: int | None = None
) -> int:
    """Return the integer at `key`, within the bounds. Raises JsonError."""
    return _get(obj, key, lambda value: as_int(value, minimum, maximum), default)


def get_int_or_none(obj: JsonObject, key: str, *, minimum: int | None = None, maximum: int | None = None) -> int | None:
    """Return the integer at `key`, or None if the key is missing or its value is null. Raises JsonError."""
    return _get_or_none(obj, key, lambda value: as_int(value, minimum, maximum))


def get_number(obj: JsonObject, key: str, default: float | None = None) -> int | float:
    """Return the number at `key`. Raises JsonError."""
    return _get(obj, key, as_number, default)


def get_number_or_none(obj: JsonObject, key: str) -> int | float | None:
    """Return the number at `key`, or None if the key is missing or its value is null. Raises JsonError."""
    return _get_or_none(obj, key, as_number)


def get_list(obj: JsonObject, key: str, item: Callable[[JsonValue], T], default: Iterable[T] | None = None) -> list[T]:
    """Return the array at `key`, each item read with `item` (such as `as_str`). Raises JsonError."""
    return _get(obj, key, list_of(item), list(default) if default is not None else None)


def get_map(
    obj: JsonObject, key: str, item: Callable[[JsonValue], T], default: Mapping[str, T] | None = None
) -> dict[str, T]:
    """Return the object at `key` whose keys are data, each value read with `item`. Raises JsonError."""
    return _get(obj, key, map_of(item), dict(default) if default is not None else None)


def get_dict(obj: JsonObject, key: str, default: JsonObject | None = None) -> JsonObject:
    """Return the object at `key`. Raises JsonError."""
    return _get(obj, key, as_dict, default)


def get_dict_or_none(obj: JsonObject, key: str) -> JsonObject | None:
    """Return the object at `key`, or None if the key is missing or its value is null. Raises JsonError."""
    return _get_or_none(obj, key, as_dict)


def get_with(obj: JsonObject, key: str, read: Callable[[JsonValue], T]) -> T:
    """Return the value at `key`, read with `read`; its errors get `key` in front of their paths. Raises JsonError."""
    return _get(obj, key, read, None)


def _get(obj: JsonObject, key: str, read: Callable[[JsonValue], T], default: T | None) -> T:
    if key in obj:
        return _below(_key(key), read, obj[key])
    if default is None:
        raise JsonError("the key is missing", _key(key))
    return default


def _get_or_none(obj: JsonObject, key: str, read: Callable[[JsonValue], T]) -> T | None:
    value = obj.get(key)
    return None if value is None else _below(_key(key), read, value)


def _below(step: str, read: Callable[[JsonValue], T], value: JsonValue) -> T:
    try:
        return read(value)
    except JsonError as error:
        raise error.below(step) from None


def _choice(value: JsonValue, choices: Collection[str]) -> str:
    text = as_str(value)
    if text not in choices:
        raise JsonError(f"expected one of {', '.join(choices)}, found {json.dumps(text[:40])}")
    return text


def _key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else f"[{json.dumps(key)}]"


def _bounds(minimum: int | None, maximum: int | None) -> str:
    if minimum is not None and maximum is not None:
        return f" from {minimum} to {maximum}"
    if minimum is not None:
        return f" of at least {minimum}"
    return f" of at most {maximum}" if maximum is not None else ""


def _unexpected(expected: str, value: object) -> JsonError:
    return JsonError(f"expected {expected}, found {_kind(value)}")


def _kind(value: object) -> str:
    kinds = (
        (bool, "a boolean"), (int, "an integer"), (float, "a number"), (str, "a string"), (Mapping, "an object"),
        (bytes | bytearray, "bytes"), (Sequence, "an array"),
    )  # fmt: skip
    return "null" if value is None else next((name for kind, name in kinds if isinstance(value, kind)), "another type")
