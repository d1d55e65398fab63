"""What the next daemon would need of the datagrams that this one has read, if it were killed now. PURE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple


class Needed(NamedTuple):
    """Threads by their id, which a later process can have again."""

    events: Set[int] = frozenset()  # their exit event, the newest one
    records: Set[int] = frozenset()  # their exit records, except for those that are decided
    decided: Sequence[int] = ()  # threads of `records` of which the oldest record is not needed; one entry for each
    left: Sequence[int] | None = None  # with the batch's exits, all that may have left `records`; None: any may have


class Union(Set[int]):
    """The union of two sets. It is not built: one of them can have a hundred thousand elements, for each batch."""

    def __init__(self, small: Set[int], large: Set[int]) -> None:
        self._small, self._large = small, large

    def __contains__(self, tid: object) -> bool:
        return tid in self._small or tid in self._large

    def __iter__(self) -> Iterator[int]:
        yield from self._large
        yield from self._small - self._large

    def __len__(self) -> int:
        return len(self._large) + len(self._small - self._large)

    def __bool__(self) -> bool:
        return bool(self._small or self._large)


NOTHING_NEEDED = Needed()
