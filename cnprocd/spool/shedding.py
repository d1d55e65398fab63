"""Count and log the jobs that were dropped from a full queue, by rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cnprocd.log import Log, ThrottledLog

EVERY_S = 5
MOST_NAMED = 3  # rules in one record


class Shedding:
    """The jobs that were dropped since the start of the daemon."""

    def __init__(self, log: Log) -> None:
        self.by_rule: Counter[str] = Counter()
        self._log = ThrottledLog(log, EVERY_S)
        self._since: Counter[str] = Counter()  # since the last record

    @property
    def count(self) -> int:
        """The number of dropped jobs of all rules."""
        return self.by_rule.total()

    def add(self, dropped: Mapping[str, int], limit: int, now_s: float) -> None:
        """Count dropped jobs by rule, and log them, in few records."""
        if not dropped:
            return
        self.by_rule.update(dropped)
        self._since.update(dropped)
        self._log.add(
            "error",
            "queue_full",
            now_s,
            {"shed": sum(dropped.values())},
            lambda counts: f"dropped {counts['shed']} jobs ({self._rules()}): {limit} are waiting (queue_limit)",
            shed_in_all=self.count,
            limit=limit,
        )

    def flush_due(self, now_s: float) -> None:
        """Log what was dropped since the last record, if that was long ago."""
        self._log.flush_due(now_s)

    def _rules(self) -> str:
        """Return the rules that dropped most since the last record, and begin to count again."""
        most = self._since.most_common(MOST_NAMED)
        self._since.clear()
        return ", ".join(f"{count} of {rule}" for rule, count in most)
