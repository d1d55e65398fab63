"""The parsed values of the rule language: what is left of configuration text after load.

Strategy: every small language in a rule file (patterns, code sets, comparisons, templates) has one frozen type here,
and syntax.py is the only way from text to it. Times are float seconds, sizes are bytes. Nothing here knows about YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PatternKind = Literal["literal", "glob", "regex"]
Operator = Literal["<", "<=", ">", ">=", "==", "!="]


class Octal(int):
    """An integer that the file wrote as 0o17: the only number whose notation matters (umask)."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a text attribute must look like.

    `literal` is compared whole. `glob` is matched whole, case-sensitively, with fnmatch's `* ? [a-z] [!a-z]`, where `*`
    also crosses "/". `regex` is searched anywhere (anchor it with ^ and $); a trailing flag i in the file has become a
    leading `(?i)`. The text compiles as a str pattern and, encoded as UTF-8, as a bytes pattern.
    """

    kind: PatternKind
    text: str


@dataclass(frozen=True, slots=True)
class IntSet:
    """A non-empty set of exit codes as inclusive ranges: sorted, disjoint and not adjacent, within 0..255."""

    ranges: tuple[tuple[int, int], ...]

    def __contains__(self, number: int) -> bool:
        return any(low <= number <= high for low, high in self.ranges)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`attribute op value`; the value is in seconds for times and in bytes for sizes."""

    op: Operator
    value: float

    def holds(self, measured: float) -> bool:
        """Whether `measured` (same unit as `value`) satisfies the comparison."""
        below, equal = measured < self.value, measured == self.value
        return {
            "<": below,
            "<=": below or equal,
            ">": not below and not equal,
            ">=": not below,
            "==": equal,
            "!=": not equal,
        }[self.op]


@dataclass(frozen=True, slots=True)
class Field:
    """A place in a template where a field of the event goes; `name` is one of FIELD_NAMES."""

    name: str


@dataclass(frozen=True, slots=True)
class Template:
    """Text with event fields in it. Adjacent texts are joined; an empty template has no parts."""

    parts: tuple[str | Field, ...]

    @property
    def fields(self) -> frozenset[str]:
        """The names of the event fields that this template needs."""
        return frozenset(part.name for part in self.parts if isinstance(part, Field))

    def render(self, values: Mapping[str, str]) -> str:
        """The text with every field replaced by its entry in `values`; raises KeyError when one is missing."""
        return "".join(values[part.name] if isinstance(part, Field) else part for part in self.parts)


# Fields whose text a process chooses for itself: never to be handed to anything that parses text as commands.
FREE_TEXT_FIELDS = frozenset({"comm", "parent_comm", "exe", "cmdline", "unit", "cgroup"})

FIELD_NAMES = (
    "rule",
    "kind",
    "pid",
    "tid",
    "comm",
    "ppid",
    "uid",
    "gid",
    "user",
    "exe",
    "cmdline",
    "unit",
    "cgroup",
    "exit_code",
    "signal",
    "status",
    "core_dumped",
    "recovered",
    "job_id",
    "kernel_time_ns",
    "parent_comm",
)
