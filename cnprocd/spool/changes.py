"""The changes of the spool that the file does not have yet. PURE."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cnprocd.spool.rows import RuleHits

MOST_WAITING_MATCHES = 10_000  # while the disk does not answer; the oldest are dropped first
MOST_OUTPUTS = 64  # likewise

EventRange = tuple[int, int]  # after the first event id, up to the last
Row = tuple[Any, ...]


@dataclass(slots=True)
class Changes:
    """What the file does not have yet."""

    jobs: dict[int, None] = field(default_factory=dict)
    events: list[EventRange] = field(default_factory=list)
    outputs: dict[int, str] = field(default_factory=dict)
    hits: dict[str, RuleHits] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    matches: deque[Row] = field(default_factory=lambda: deque(maxlen=MOST_WAITING_MATCHES))

    def put_back(self, sent: Changes) -> None:
        """Take back changes that were not committed; those noted since are newer."""
        self.jobs = {**sent.jobs, **self.jobs}
        self.events = sent.events + self.events
        self.outputs = {**sent.outputs, **self.outputs}
        self.hits = {**sent.hits, **self.hits}
        self.gone |= sent.gone - set(self.hits)
        self.matches.extendleft(reversed(sent.matches))

    def __bool__(self) -> bool:
        return bool(self.jobs or self.matches or self.outputs or self.hits or self.gone)

    def put_output(self, job_id: int, output: str) -> None:
        """Note the output of a job's last attempt."""
        self.outputs[job_id] = output
        if len(self.outputs) > MOST_OUTPUTS:
            del self.outputs[next(iter(self.outputs))]

    def put_hits(self, hits: Mapping[str, RuleHits], gone: Iterable[str]) -> None:
        """Note the hits of rules, and the rules that are gone."""
        self.hits.update(hits)
        self.gone -= set(hits)
        for rule in gone:
            self.hits.pop(rule, None)
            self.gone.add(rule)
