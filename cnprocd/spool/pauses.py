"""How long jobs pause whose attempt was interrupted, or could not be started: their hooks are not at fault. PURE."""

from __future__ import annotations

from dataclasses import dataclass, field

from cnprocd.spool.job import NS

MOST_INTERRUPTIONS = 10  # of one job, while others end
LONGEST_PAUSE_S = 30.0
POSTPONED_ALONE = 3  # jobs of a rule, one after the other; then all of its jobs wait


class Interruptions:
    """How often running jobs were interrupted in this life of the daemon, and whether others ended meanwhile.

    If nothing else ends either, the jobs are not at fault: the runner, or the machine, is.
    """

    def __init__(self) -> None:
        self._counts: dict[int, tuple[int, int]] = {}  # job -> interruptions, and attempts that had ended at the first

    def note(self, job_id: int, ended: int) -> str | None:
        """Count an interruption. `ended` counts all attempts that ended. Return the reason to give the job up."""
        count, ended_before = self._counts.get(job_id, (0, ended))
        self._counts[job_id] = count + 1, ended_before
        if count + 1 < MOST_INTERRUPTIONS or ended == ended_before:
            return None
        del self._counts[job_id]
        return f"interrupted {count + 1} times while other hooks ran to their end"

    def pause_s(self, job_id: int, chance: float) -> float:
        """Return the pause before the next attempt. It is random, so that jobs do not interrupt each other for ever."""
        count = self._counts.get(job_id, (0, 0))[0]
        return 0.0 if count < 2 else min(LONGEST_PAUSE_S, 0.5 * 2.0 ** (count - 2)) * (0.5 + chance)

    def forget(self, job_id: int) -> None:
        """Forget a job whose attempt ended."""
        self._counts.pop(job_id, None)


@dataclass(slots=True)
class _Postponed:
    """The attempts of a rule that could not be started, since the last one that could."""

    jobs: set[int] = field(default_factory=set)  # at most POSTPONED_ALONE
    pauses: int = 0
    until_ns: int = 0  # the end of the current pause


class Postponements:
    """Pauses of the rules whose hooks cannot be started now. They grow, and end with the first one that is started.

    If several jobs of a rule in a row could not be started, its others wait without being tried. Otherwise each of
    thousands of waiting jobs would be tried, and logged, in each pause.
    """

    def __init__(self) -> None:
        self._rules: dict[str, _Postponed] = {}

    def note(self, rule: str, job_id: int, now_ns: int, *, alone: bool = False) -> tuple[int, bool]:
        """Return until when the job waits, and whether all jobs of its rule do. `alone`: the others may be started."""
        found = self._rules.setdefault(rule, _Postponed())
        if now_ns >= found.until_ns:
            found.pauses += 1
            found.until_ns = now_ns + int(min(LONGEST_PAUSE_S, 0.5 * 2.0 ** min(found.pauses, 10)) * NS)
        if len(found.jobs) < POSTPONED_ALONE and not alone:
            found.jobs.add(job_id)
        return found.until_ns, len(found.jobs) >= POSTPONED_ALONE and not alone

    def forget(self, rule: str) -> None:
        """Note that an attempt was started."""
        self._rules.pop(rule, None)
