"""A pytest plugin: makes this process read and write bytes as a big-endian machine does (s390x).

Native formats of struct become big-endian, sys.byteorder is "big", and the C structures of wire.py, from which fixtures
are made, have that order. Loaded with -p before cnprocd is imported. memoryview.cast and array stay little-endian, so
the comparison of a whole batch fails, and each slot is decoded alone. What the kernel writes keeps its order: use this
for tests of bytes only.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
import sys

from hypothesis import settings

_Native = struct.Struct
_NAMES = ("pack", "pack_into", "unpack", "unpack_from", "iter_unpack", "calcsize")


def _swapped(format: str | bytes) -> str:
    text = format.decode() if isinstance(format, bytes) else format
    return f">{text[1:]}" if text.startswith("=") else text


class BigEndianStruct(_Native):
    """struct.Struct of a big-endian machine."""

    def __new__(cls, format: str | bytes) -> BigEndianStruct:
        return super().__new__(cls, _swapped(format))  # type: ignore[call-arg]

    def __init__(self, format: str | bytes) -> None:
        super().__init__(_swapped(format))


def _function(name: str):
    native = getattr(struct, name)
    return lambda format, *arguments, **named: native(_swapped(format), *arguments, **named)


struct.Struct = BigEndianStruct
for _name in _NAMES:
    setattr(struct, _name, _function(_name))
sys.byteorder = "big"


class _BigEndianUnion(ctypes.BigEndianUnion):
    """A union that a structure of the same order may contain. ctypes of Python 3.11 does not know that by itself."""

    def __init_subclass__(cls) -> None:
        cls.__ctype_be__ = cls  # type: ignore[attr-defined]


_native = ctypes.Structure, ctypes.Union
ctypes.Structure, ctypes.Union = ctypes.BigEndianStructure, _BigEndianUnion
importlib.import_module("unit.connector.wire")
ctypes.Structure, ctypes.Union = _native


def pytest_collection_finish() -> None:
    """Try few examples: the same tests run with all of them in the order of this machine."""
    settings.register_profile("big-endian", parent=settings.get_profile("cnprocd"), max_examples=10)
    settings.load_profile("big-endian")
