"""What the next daemon would need of the datagrams that this one has read, if it were killed now. PURE."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple


class Needed(NamedTuple):
    """Threads by their id, which a later process can have again."""

    events: Set[int] = frozenset()  # their exit event, the newest one
    records: Set[int] = frozenset()  # their exit records, except for those that are decided
    decided: Sequence[int] = ()  # threads of `records` of which the oldest record is not needed; one entry for each


NOTHING_NEEDED = Needed()
