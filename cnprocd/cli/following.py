"""Follow matches without loss: those of the history after a known one, then those that the daemon reports.

The subscription begins first, so a match is in the history, or queued for this client, or in both; ids remove doubles.
If this client reads too slowly, the daemon skips items, and the history has them as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from cnprocd.control.client import Item
from cnprocd.json_value import JsonObject, as_dict, get_str_or_none

PAGE = 500  # matches that are asked for at once
MOST_IDS = 20_000  # that are remembered; the daemon queues some hundred items for a client
Past = Callable[[str], list[JsonObject]]
"""Return the matches of the history after this one, the oldest first; none if there are no more."""


class Following:
    """The matches after a known one, each once and in order, without end.

    `after` is the id of the last match of the history that was seen; "" begins with the oldest one. Matches that a
    throttle held back come from the stream alone, because the history does not have them.
    """

    def __init__(self, past: Past, after: str) -> None:
        self.after = after
        self._past = past
        self._seen: OrderedDict[str, None] = OrderedDict()

    def note(self, match: JsonObject) -> None:
        """Remember a match of the history that was seen."""
        match_id = get_str_or_none(match, "match_id")
        if match_id is not None:
            self.after = match_id
            self._seen[match_id] = None
            if len(self._seen) > MOST_IDS:
                self._seen.popitem(last=False)

    def past(self) -> Iterator[JsonObject]:
        """Yield the matches of the history that were not seen."""
        while page := self._past(self.after):
            before = self.after
            for match in page:
                self.note(match)
                yield match
            if self.after == before:  # the matches of an older daemon have no id
                return

    def live(self, stream: Iterable[Item | None]) -> Iterator[JsonObject]:
        """Yield the matches that the daemon reports, and those of the history where it skipped some."""
        for item in stream:
            if item is None:
                continue
            if item.skipped:
                yield from self.past()
            match = as_dict(item.data)
            match_id = get_str_or_none(match, "match_id")
            if match_id is not None and match_id in self._seen:
                del self._seen[match_id]
                continue
            if match.get("held_by") is None and match_id is not None:
                self.after = match_id
            yield match
