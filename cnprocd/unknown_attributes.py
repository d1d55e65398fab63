"""Count and log what rules needed to know and could not: never silent, and never a match.

The counts are by attribute and reason, one for each rule. The records are rate-limited and share their interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from cnprocd.connector.status import describe
from cnprocd.json_value import JsonValue
from cnprocd.log import ThrottledLog
from cnprocd.process.model import Occurrence
from cnprocd.rules.compile import CompiledRule, Match
from cnprocd.rules.needs import unknown_attributes


class UnknownAttributes:
    """Reports the attributes that are unknown of an occurrence."""

    def __init__(self, counts: Counter[tuple[str, str]], throttled: ThrottledLog, clock: Callable[[], float]) -> None:
        self._counts = counts
        self._throttled = throttled
        self._clock = clock

    def report_nameless(self, occurrence: Occurrence) -> None:
        """Report an event of unknown comm: rules that ask for comm cannot match it."""
        tgid, kind = occurrence.process.tgid, occurrence.kind
        status = describe(occurrence.status) if kind == "exit" else None
        what = f"ended ({status})" if kind == "exit" else f"caused the event {kind} and was gone"
        message = f"process {tgid} {what} before its name could be read; rules that ask for comm did not match it"
        self._counts["comm", "lost" if occurrence.recovered else "gone"] += 1
        self._log(message, pid=tgid, status=status)

    def report_undecided(self, rules: Iterable[CompiledRule], occurrence: Occurrence) -> None:
        """Report rules that neither matched nor failed to."""
        for rule in rules:
            attributes = dict(unknown_attributes(rule.match_needs, occurrence))
            self._counts.update(attributes.items())
            tgid, names = occurrence.process.tgid, ", ".join(sorted(attributes)) or "an attribute"
            message = f"rule {rule.name} could not be decided for process {tgid}: {names} is unknown"
            self._log(message, pid=tgid, rule=rule.name)

    def report_incomplete(self, matches: Iterable[Match], occurrence: Occurrence) -> None:
        """Report what the records of these matches should have and have not."""
        for match in matches:
            needs = match.rule.record_needs  # of an unknown comm that the rule asks for: see report_nameless
            attributes = dict(unknown_attributes(needs, occurrence)) if needs else {}
            if not attributes:
                continue
            self._counts.update(attributes.items())
            tgid, names = occurrence.process.tgid, ", ".join(sorted(attributes))
            message = f"rule {match.rule.name} matched process {tgid}, and {names} is unknown"
            self._log(message, pid=tgid, rule=match.rule.name)

    def _log(self, message: str, **fields: JsonValue) -> None:
        self._throttled.add("warning", "identity_unknown", self._clock(), {"count": 1}, message, **fields)
