"""Events and matches as lines for a terminal: fixed columns, colour for failures, and a limited number per second.

`Budget` is the sampling. It counts the lines above the limit, and the count is shown in their place, so that a sample
is never taken for the whole. Pure: the clock is an argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from cnprocd.cli.terminal import Style, text
from cnprocd.json_value import JsonObject

LINES_A_SECOND = 50


def match_line(record: JsonObject, style: Style, at: str) -> str:
    """Return one line: time, status or kind, process, user, rule, parent, unit and job."""
    what = str(record.get("status") or record["kind"])
    colour = _colour(record)
    process = f"{text(record.get('comm'))}[{text(record.get('pid'))}]"
    parts = [
        style("dim", at),
        style(colour, what.ljust(24)) if colour else what.ljust(24),
        style("bold", process.ljust(24)),
        text(record.get("user")).ljust(10),
    ]
    if record.get("rule"):
        parts.append(style("cyan", str(record["rule"])))
    if record.get("parent_comm"):
        parts.append(style("dim", f"child of {record['parent_comm']}[{text(record.get('ppid'))}]"))
    if record.get("unit"):
        parts.append(style("dim", str(record["unit"])))
    if record.get("job_id"):
        parts.append(f"job {record['job_id']}")
    if record.get("recovered"):
        parts.append(style("yellow", "recovered"))
    if record.get("held_by"):
        parts.append(style("yellow", f"held back by {record['held_by']}"))
    return "  ".join(parts).rstrip()


def _colour(record: JsonObject) -> str | None:
    if record.get("signal"):
        return "red"
    if record.get("exit_code"):
        return "yellow"
    return "green" if record.get("kind") in ("fork", "exec") else None


class Budget:
    """At most `per_second` lines in each second of `clock` (in seconds); None means no limit."""

    def __init__(self, per_second: int | None, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._clock = clock
        self._second = int(clock())
        self._shown = 0
        self._left_out: Counter[str] = Counter()

    def take(self, kind: str) -> bool:
        """Return whether one more line may be shown. If not, count it under `kind`."""
        if self._per_second is None:
            return True
        if self._shown < self._per_second:
            self._shown += 1
            return True
        self._left_out[kind] += 1
        return False

    def report(self) -> str | None:
        """Return the line about the lines left out in the last second, once the second is over, or None."""
        now = int(self._clock())
        if now == self._second:
            return None
        self._second = now
        return self.rest()

    def rest(self) -> str | None:
        """Return the line about the lines left out since the last report, or None."""
        shown, left_out = self._shown, self._left_out
        self._shown, self._left_out = 0, Counter()
        if not left_out:
            return None
        count = left_out.total()
        kinds = ", ".join(f"{number} {kind}" for kind, number in left_out.most_common())
        return f"... sampled: {shown} of {shown + count} shown; left out {kinds}"
