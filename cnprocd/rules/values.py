"""The parsed values of the rule language: patterns, sets of exit codes, comparisons and templates. PURE.

Each has one frozen type, which syntax.py makes of text. Times are float seconds, sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PatternKind = Literal["literal", "glob", "regex"]
Operator = Literal["<", "<=", ">", ">=", "==", "!="]


class Octal(int):
    """An integer that the file has in the form 0o17. Only for umask does the notation matter."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern for a text attribute.

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
        """Return whether `measured` (same unit as `value`) satisfies the comparison."""
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
    """A part of a template that is replaced by a field of the event; `name` is one of FIELD_NAMES."""

    name: str


@dataclass(frozen=True, slots=True)
class Template:
    """Text with event fields. Adjacent texts are joined; an empty template has no parts."""

    parts: tuple[str | Field, ...]

    @property
    def fields(self) -> frozenset[str]:
        """Return the names of the event fields in this template."""
        return frozenset(part.name for part in self.parts if isinstance(part, Field))

    def render(self, values: Mapping[str, str]) -> str:
        """Return the text with every field replaced by its entry in `values`. Raises KeyError if one is missing."""
        return "".join(values[part.name] if isinstance(part, Field) else part for part in self.parts)


# Fields whose text a process can choose. A program that parses commands must never get them.
FREE_TEXT_FIELDS = frozenset({
    "comm", "parent_comm", "ancestors", "exe", "exe_claimed", "cmdline", "unit", "user_unit", "cgroup", "container",
    "containers",
})  # fmt: skip

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
    "exe_claimed",
    "exe_deleted",
    "cmdline",
    "unit",
    "user_unit",
    "cgroup",
    "container",
    "containers",
    "runtime",
    "pod_uid",
    "exit_code",
    "signal",
    "status",
    "core_dumped",
    "oom_killed",
    "recovered",
    "job_id",
    "match_id",
    "host",
    "machine_id",
    "boot_id",
    "kernel_time_ns",
    "parent_comm",
    "cpu",
    "lifetime_ms",
    "cpu_time_ms",
    "max_rss_kib",
    "read_bytes",
    "write_bytes",
    "loginuid",
    "ancestors",
    "cmdline_truncated",
    "ruid",
    "euid",
    "rgid",
    "egid",
    "tracer_pid",
    "tracer_tid",
)
