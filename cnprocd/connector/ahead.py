"""A look at the events that are queued behind a batch. PURE."""

from __future__ import annotations

from typing import NamedTuple

from cnprocd.connector.event import Row


class Ahead(NamedTuple):
    """The events that are queued behind a batch, and whether these are all."""

    events: list[Row]
    is_all: bool


def nothing_ahead() -> Ahead:
    """Return that no event is queued."""
    return Ahead([], is_all=True)
