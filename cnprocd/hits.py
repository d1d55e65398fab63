"""The hits of each rule, kept in the spool so that they survive a restart.

The pipeline counts; nothing is added to its work for a match. About once a second the rules that matched are stored. A
crash loses the hits of the last second.
"""

from __future__ import annotations

from collections.abc import Collection

from cnprocd.counts import Counts
from cnprocd.spool.history import COUNTING_SINCE
from cnprocd.spool.rows import RuleHits
from cnprocd.spool.spool import Spool


class Hits:
    """Loads the hits of former runs into the pipeline's counts, and stores them again."""

    def __init__(self, counts: Counts, spool: Spool) -> None:
        stored = spool.hits()
        since = stored.pop(COUNTING_SINCE, None)
        self.since_ns = since.last_ns if since is not None and since.last_ns is not None else spool.clock()
        self._counts = counts
        self._spool = spool
        self._stored = {rule: one.count for rule, one in stored.items()}
        for rule, one in stored.items():
            counts.rules[rule] += one.count
            if one.last_ns is not None:
                counts.rule_last_ns[rule] = one.last_ns
        if since is None:
            spool.put_hits({COUNTING_SINCE: RuleHits(0, self.since_ns)})

    def store(self) -> None:
        """Store the rules that matched since the last call."""
        changed = {rule: count for rule, count in self._counts.rules.items() if self._stored.get(rule, 0) != count}
        if changed:
            last_ns = self._counts.rule_last_ns
            self._spool.put_hits({rule: RuleHits(count, last_ns.get(rule)) for rule, count in changed.items()})
            self._stored |= changed

    def store_all(self) -> None:
        """Store all rules, at the end: the spool may have moved to another database."""
        self._stored.clear()
        self._spool.put_hits({COUNTING_SINCE: RuleHits(0, self.since_ns)})
        self.store()

    def forget_others(self, rules: Collection[str]) -> None:
        """Forget the hits of rules that are not in `rules`."""
        gone = [rule for rule in self._counts.rules if rule not in rules]
        for rule in gone:
            del self._counts.rules[rule]
            self._counts.rule_last_ns.pop(rule, None)
            self._stored.pop(rule, None)
        if gone:
            self._spool.put_hits({}, gone)
