"""Random damage to bytes: the mutations that all targets share.

All randomness comes from one random.Random, so the same seed and target repeat the same run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

_NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 16, 76, 80, 127, 128, 255, 256, 4095, 4096, 32767, 32768, 65535, 1 << 20, (1 << 31) - 1,
    1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip


class Mutator:
    """Make inputs from others. `tokens` are words of the target's language; they reach further than random bytes."""

    def __init__(self, rng: random.Random, tokens: Sequence[bytes] = ()) -> None:
        self.rng = rng
        self.tokens = tuple(tokens) or (b"\0", b"\n", b"\xff")
        self._ways = (
            self._flip, self._byte, self._number, self._noise, self._delete, self._double, self._token, self._token,
            self._cut, self._move,
        )  # fmt: skip

    def damaged(self, data: bytes, others: Sequence[bytes] = (), most: int = 4) -> bytes:
        """Return `data` after one to `most` mutations, sometimes with the tail of another input."""
        rng = self.rng
        raw = bytearray(data)
        if others and rng.random() < 0.05:
            other = others[int(rng.random() * len(others))]
            raw[int(rng.random() * (len(raw) + 1)) :] = other[int(rng.random() * (len(other) + 1)) :]
        for _ in range(1 + int(rng.random() * most)):
            self._ways[int(rng.random() * len(self._ways))](raw)
        return bytes(raw)

    def _at(self, raw: bytearray, room: int = 0) -> int:
        return int(self.rng.random() * (len(raw) + 1 - room)) if len(raw) >= room else 0

    def _flip(self, raw: bytearray) -> None:
        if raw:
            raw[int(self.rng.random() * len(raw))] ^= 1 << self.rng.getrandbits(3)

    def _byte(self, raw: bytearray) -> None:
        if raw:
            raw[int(self.rng.random() * len(raw))] = self.rng.getrandbits(8)

    def _number(self, raw: bytearray) -> None:
        """Return an integer near a limit, of any width and either byte order."""
        rng = self.rng
        width = 1 << rng.getrandbits(2)
        value = (_NUMBERS[int(rng.random() * len(_NUMBERS))] + rng.getrandbits(1)) & ((1 << 8 * width) - 1)
        at = self._at(raw, width)
        raw[at : at + width] = value.to_bytes(width, "big" if rng.getrandbits(1) else "little")

    def _noise(self, raw: bytearray) -> None:
        length = 1 + int(self.rng.random() * 16)
        at = self._at(raw)
        raw[at : at + length] = self.rng.randbytes(length)

    def _delete(self, raw: bytearray) -> None:
        at = self._at(raw)
        del raw[at : at + 1 + int(self.rng.random() * 32)]

    def _double(self, raw: bytearray) -> None:
        at = self._at(raw)
        piece = raw[at : at + 1 + int(self.rng.random() * 64)]
        raw[at:at] = piece * (1 + int(self.rng.random() ** 4 * 40))

    def _token(self, raw: bytearray) -> None:
        token = self.tokens[int(self.rng.random() * len(self.tokens))]
        at = self._at(raw)
        raw[at : at + (len(token) if self.rng.getrandbits(1) else 0)] = token

    def _cut(self, raw: bytearray) -> None:
        if self.rng.random() < 0.3:
            del raw[self._at(raw) :]

    def _move(self, raw: bytearray) -> None:
        start, to = self._at(raw), self._at(raw)
        piece = raw[start : start + 1 + int(self.rng.random() * 32)]
        del raw[start : start + len(piece)]
        raw[to:to] = piece


_LEAVES: tuple[object, ...] = (
    None, True, False, 0, 1, -1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 10**400, 1.5, -0.0, 1e308,
    float("inf"), float("nan"), "", "a", "\udcff", "\ud800", "\0", "\n", "\x1b[31m", "x" * 300, "9" * 4400, [], {},
    [None], {"": None},
)  # fmt: skip


def json_damaged(rng: random.Random, value: object, words: Sequence[str] = ()) -> object:
    """Return a JSON value with a part replaced, removed, added, doubled or nested."""
    chance = rng.random()
    if isinstance(value, dict) and value and chance < 0.85:
        changed = dict(value)
        key = rng.choice(list(changed))
        if chance < 0.65:
            changed[key] = json_damaged(rng, changed[key], words)
        elif chance < 0.75:
            del changed[key]
        else:
            changed[rng.choice(words) if words else "extra"] = changed[key] if rng.getrandbits(1) else _leaf(rng, words)
        return changed
    if isinstance(value, list) and value and chance < 0.8:
        changed_list = list(value)
        at = rng.randrange(len(changed_list))
        if chance < 0.6:
            changed_list[at] = json_damaged(rng, changed_list[at], words)
        elif chance < 0.7:
            del changed_list[at]
        else:
            changed_list.insert(at, changed_list[at])
        return changed_list
    if isinstance(value, int) and not isinstance(value, bool) and chance < 0.4:
        return value + rng.choice((-1, 1, 1 << 31, 1 << 63))
    if chance > 0.985:
        return _nested(rng, value)
    return _leaf(rng, words)


def _leaf(rng: random.Random, words: Sequence[str]) -> object:
    return rng.choice(words) if words and rng.random() < 0.3 else rng.choice(_LEAVES)


def _nested(rng: random.Random, value: object) -> object:
    """Return nested brackets: shallow, or near a limit that a recursive parser or writer can have."""
    for _ in range(rng.choice((3, 60, 200, 300, 450, 600, 900, 960 + rng.getrandbits(5)))):
        value = [value] if rng.getrandbits(1) else {"a": value}
    return value


def json_text(value: object) -> bytes:
    """Write JSON without limits of depth. json.dumps fails on deep nesting."""
    out: list[str] = []
    stack: list[object] = [value]

    while stack:
        one = stack.pop()
        if isinstance(one, _Raw):
            out.append(one)
        elif isinstance(one, dict):
            out.append("{")
            stack.append(_Raw("}"))
            for number, (key, inner) in enumerate(reversed(list(one.items()))):
                stack += [inner, _Raw(f"{json.dumps(key)}:"), *([_Raw(",")] if number < len(one) - 1 else [])]
        elif isinstance(one, list):
            out.append("[")
            stack.append(_Raw("]"))
            for number, inner in enumerate(reversed(one)):
                stack += [inner, *([_Raw(",")] if number < len(one) - 1 else [])]
        else:
            out.append(json.dumps(one))
    return "".join(out).encode("utf-8", "surrogatepass")


class _Raw(str):
    """Text that is already JSON."""

    __slots__ = ()
