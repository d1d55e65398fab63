"""Put the jobs of a flood into the backlog (spool/backlog.py), and make them later, in their order.

flood.py decides whose job has time. While events wait, the jobs of the backlog are made in a tenth of the time, else at
once. Until then a match is in the backlog only: it is logged, and its hook runs, when its job is made. Later matches of
its rule wait behind it.

A request stays in the backlog until its job is on the disk. While the disk does not answer, no more jobs are made, for
at most DISK_S: after that they are made in memory, as those of all other matches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from cnprocd.delivery import RecordedMatch
from cnprocd.failures import Failures
from cnprocd.json_value import JsonDict, JsonObject, JsonValue
from cnprocd.log import Log, ThrottledLog
from cnprocd.output.record import message
from cnprocd.spool.backlog import Backlog, Postponed
from cnprocd.spool.job import JobRequest
from cnprocd.spool.spool import Spool

AT_ONCE = 32  # jobs of one commit: about 5 ms
EVENTS_TO_JOBS = 9  # the time for events, to that for jobs of the backlog while events wait
DISK_S = 10.0
AGAIN_S, MOST_AGAIN_S = 0.002, 0.1  # until the next look whether the disk has answered
REPORT_EVERY_S = 10.0


class Postponing:
    """The jobs that are made later."""

    def __init__(
        self,
        backlog: Backlog,
        spool: Spool,
        log: Log,
        failures: Failures,
        together: Callable[[], AbstractContextManager[None]],
        request_of: Callable[[RecordedMatch], JobRequest],
        commit: Callable[[list[JobRequest]], Sequence[int | None]],
        made: Callable[[Sequence[JsonObject]], None],
    ) -> None:
        """`commit`: make jobs and return their ids. `made` gets the records of their matches, which are logged."""
        self.backlog = backlog
        self._spool = spool
        self._log = log
        self._failures = failures
        self._together = together
        self._request_of = request_of
        self._commit = commit
        self._made = made
        self._due_s = 0.0  # when jobs are made although events wait
        self._unsafe: list[tuple[Postponed, int]] = []  # their jobs are made, and perhaps not on the disk
        self._disk_until_s: float | None = None  # when not to wait for the disk any more; None: it answers
        self._throttled = ThrottledLog(log, REPORT_EVERY_S)
        spool.also_needed = backlog.snapshots

    @property
    def again_s(self) -> float | None:
        """After how long to call `catch_up`; None: no request waits. The longer the disk takes, the later."""
        if not self.backlog:
            return None
        left_s = 0.0 if self._disk_until_s is None else self._disk_until_s - time.monotonic()
        return AGAIN_S if left_s <= 0 else max(AGAIN_S, min(MOST_AGAIN_S, (DISK_S - left_s) / 4))

    def room(self, rule: str) -> int:
        """Return how many more requests of a rule may wait."""
        return max(0, self._spool.keep.queue_limit - self.backlog.of_rule(rule))

    def postpone(self, matches: list[RecordedMatch]) -> list[RecordedMatch]:
        """Put jobs that have time into the backlog, and those of rules whose jobs wait there. Return other matches.

        If that cannot be done, these are all of them: the jobs are made at once.
        """
        postponed: dict[int, Postponed] = {}
        for recorded in matches:
            name = recorded.match.rule.name
            waits = recorded.match.runs_hook and (recorded.has_time or self.backlog.of_rule(name))
            if waits and self.room(name):
                try:
                    postponed[id(recorded)] = self._postponed(recorded)
                except Exception:  # reported once more when its job is made at once
                    self._failures.note("dispatch", recorded.record, name)
        if not postponed or not self.backlog.append(list(postponed.values())):
            return matches
        self._report(len(postponed))
        return [recorded for recorded in matches if id(recorded) not in postponed]

    def _postponed(self, recorded: RecordedMatch) -> Postponed:
        request = replace(self._request_of(recorded), created_ns=self._spool.clock())
        wanted = recorded.match.rule.rule.log
        if wanted is None:
            return Postponed(request, None, "")
        return Postponed(request, wanted.level, message(wanted.message, recorded.record))

    def catch_up(self, budget_s: float) -> None:
        """Make jobs for so long. With 0 make a few, in a share of the time."""
        began_s = time.monotonic()
        if not self.backlog or (not budget_s and began_s < self._due_s):
            return
        while self._is_safe() and self.backlog:
            self._make_jobs()
            if time.monotonic() >= began_s + budget_s:
                break
        self._is_safe()
        ended_s = time.monotonic()
        self._due_s = ended_s + (ended_s - began_s) * EVENTS_TO_JOBS

    def _is_safe(self) -> bool:
        """Remove the requests whose jobs are on the disk, or need not wait for it. Return whether none is left."""
        if self._spool.durable:
            self._disk_until_s = None
        elif self._disk_until_s is None:
            self._disk_until_s = time.monotonic() + DISK_S
        if self._disk_until_s is not None and time.monotonic() < self._disk_until_s:
            return False
        if self._unsafe:
            self.backlog.remove(self._unsafe)
            self._unsafe = []
        return True

    def _make_jobs(self) -> None:
        """Commit the jobs of the oldest requests, then log their matches."""
        found = self.backlog.oldest(AT_ONCE)
        if not found:
            self._spool.note_dropped(self.backlog.give_up())
            return
        records: list[JsonDict] = [dict(one.request.event) for one, _ in found]
        for record, job_id in zip(records, self._commit([one.request for one, _ in found]), strict=True):
            record["job_id"] = job_id
        with self._together():
            for (one, _), record in zip(found, records, strict=True):
                try:
                    if one.level is not None:
                        self._log(one.level, "rule_matched", message=one.message, **record)
                except Exception:
                    self._failures.note("log", record, one.request.rule)
        self._unsafe = found
        self._made(records)

    def tick(self) -> None:
        """Log what is due. About once a second."""
        self._throttled.flush_due(time.monotonic())

    def stop(self) -> None:
        """Log how many jobs are left to the next daemon, if it finds the file."""
        if self.backlog:
            self._report(0)
        self._throttled.flush(time.monotonic())

    def _report(self, count: int) -> None:
        waiting = len(self.backlog)
        self._throttled.add(
            "warning",
            "hooks_deferred",
            time.monotonic(),
            {"count": count},
            f"{waiting} matches of a flood wait until their jobs are made",
            waiting=waiting,
            rules=list[JsonValue](self.backlog.rules),
        )
