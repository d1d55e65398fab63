"""What the pipeline counts. PURE."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """Counters since start, for status and metrics."""

    occurrences: int = 0
    matches: int = 0
    unknown: Counter[tuple[str, str]] = field(default_factory=Counter)  # by attribute and reason
    kinds: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    rule_last_ns: dict[str, int] = field(default_factory=dict)  # wall clock
