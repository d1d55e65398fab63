"""What the pipeline hands over: a match with its record, and the protocol of where it goes. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import NamedTuple, Protocol

from cnprocd.json_value import JsonDict, JsonObject
from cnprocd.rules.compile import Match


class RecordedMatch(NamedTuple):
    """A match and its record."""

    match: Match
    record: JsonDict
    provenance: Mapping[str, str] | None  # of each attribute of the process, if the log level is debug
    deferred: bool = False  # in a flood: its throttle has let it pass already
    has_time: bool = False  # in a flood: its job need not be made at once


class Fate(Enum):
    """What is decided about a match before its record is made."""

    OPEN = auto()  # a throttle needs the record
    PASSES = auto()
    HELD = auto()  # a throttle has counted it
    DROPPED = auto()  # its job has no room in the spool, and is counted


class Delivery(Protocol):
    """Where matches go: throttles, the spool, the log.

    When `deliver` returns, every job is durable, or its request is where a kill of the daemon does not lose it.
    """

    def deliver(self, matches: list[RecordedMatch]) -> None: ...

    def decide(self, match: Match) -> Fate:
        """Decide about a match as far as its record is not needed, in a flood."""

    def holds(self, rule: str, fields: JsonObject, at_ns: int) -> bool:
        """Return whether the throttle of a rule certainly holds back matches of these fields at this time."""

    def is_below(self, rule: str, fields: JsonObject, more: int) -> bool:
        """Return whether `after` of a rule certainly holds back such a match, after so many more are counted."""

    def hold(self, rule: str, fields: JsonObject, at_ns: int, count: int) -> None:
        """Count matches for which `holds` has returned True."""

    def room(self, rule: str) -> int:
        """Return how many more jobs of a rule there is room for, in a flood."""

    def note_dropped(self, rule: str, count: int) -> None:
        """Count matches whose jobs have no room."""

    @property
    def again_s(self) -> float | None:
        """After how long to call `catch_up`, because jobs are still to be made of matches; None: of none."""

    def catch_up(self, budget_s: float) -> None:
        """Make jobs of them for so long. With 0 make a few, in a share of the time."""
