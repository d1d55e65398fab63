"""How long jobs pause whose attempt was interrupted, or could not be started: their hooks are not at fault. PURE."""

from __future__ import annotations

from collections import defaultdict

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


class Postponements:
    """How many attempts could not be started, since the last one that could: the pauses grow with their number.

    If several jobs of one rule in a row could not be started, the others wait without being tried. Otherwise each of
    thousands of waiting jobs would be tried, and logged, every 30 s.
    """

    def __init__(self) -> None:
        self._count = 0
        self._jobs: defaultdict[str, set[int]] = defaultdict(set)  # by rule, at most POSTPONED_ALONE

    def note(self, rule: str, job_id: int) -> tuple[float, bool]:
        """Count one. Return the pause before the next attempt, in seconds, and whether it is for the whole rule."""
        self._count += 1
        jobs = self._jobs[rule]
        if len(jobs) < POSTPONED_ALONE:
            jobs.add(job_id)
        pause_s = min(LONGEST_PAUSE_S, 0.5 * 2.0 ** min(self._count, 10))
        return pause_s, len(jobs) >= POSTPONED_ALONE

    def forget(self, rule: str) -> None:
        """Note that an attempt was started."""
        self._count = 0
        self._jobs.pop(rule, None)
