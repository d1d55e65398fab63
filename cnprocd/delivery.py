"""What the pipeline hands over: a match with its record, and the protocol of where it goes. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from cnprocd.json_value import JsonDict
from cnprocd.rules.compile import Match


@dataclass(frozen=True, slots=True)
class RecordedMatch:
    """A match and its record."""

    match: Match
    record: JsonDict
    provenance: Mapping[str, str] | None  # of each attribute of the process, if the log level is debug
    deferred: bool = False  # in a flood: its throttle has let it pass already


class Fate(Enum):
    """What is decided about a match before its record is made."""

    OPEN = auto()  # a throttle needs the record
    PASSES = auto()
    HELD = auto()  # a throttle has counted it
    DROPPED = auto()  # its job has no room in the spool, and is counted


class Delivery(Protocol):
    """Where matches go: throttles, the spool, the log. Every job is durable when `deliver` returns."""

    def deliver(self, matches: list[RecordedMatch]) -> None: ...

    def decide(self, match: Match) -> Fate:
        """Decide about a match as far as its record is not needed, in a flood."""
