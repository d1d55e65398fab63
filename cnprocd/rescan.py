"""Read every process again before other rules come into force, in slices between batches of events.

Until then the rules in force go on matching, under a plan that serves both (`Matcher.and_other`). So every event that
the other rules need has come since before the scan began, and the swap itself reads nothing.

A process that is forked meanwhile takes over what is known of its parent, and the parent may not have been read yet. So
the processes that started during one pass over /proc are read by another one. A pass within one slice is the last: no
event was evaluated during it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cnprocd.process.file_names import FileNames
from cnprocd.process.model import Process, ProcScan
from cnprocd.process.table import START_TOLERANCE_NS
from cnprocd.process.tracker import Tracker

SLICE_S = 0.005
MOST_PASSES = 8  # a storm of forks never ends; each pass is about the few that started during the one before


class Rescan:
    """What is left to read. The tracker has the plan of both rule sets."""

    def __init__(
        self,
        procfs: ProcScan,
        tracker: Tracker,
        files: FileNames | None,
        hold: Callable[[Sequence[Process]], None],
        clock: Callable[[], float],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`hold` gets each group of processes while they live. `now_ns` is CLOCK_MONOTONIC."""
        wanted = tracker.tracking.wanted_anew
        # If rules name programs, it is found out which processes run files that were replaced since.
        self._wanted = replace(wanted, exe=True) if files is not None and files.named_paths else wanted
        # A process that executes before it was read is not known yet: its ids are read then. The next plan ends this.
        tracker.tracking = replace(tracker.tracking, wanted=wanted)
        self._procfs = procfs
        self._tracker = tracker
        self._hold = hold
        self._clock = clock
        self._now_ns = now_ns
        self._passes = 0
        self._groups: Iterator[Sequence[Process]] | None = None  # of the pass that is under way
        self._pass_began_ns = 0

    def go_on(self, budget_s: float = SLICE_S) -> bool:
        """Read for so long, and one group of processes more. Return whether nothing is left to read."""
        deadline_s = self._clock() + budget_s
        while True:
            is_within_slice = self._groups is None
            for group in self._pass():
                self._tracker.renew(group)
                self._hold(group)
                if self._clock() >= deadline_s:
                    return False
            self._groups = None
            if is_within_slice or self._passes >= MOST_PASSES or not self._tracker.tracking.table:
                return True

    def _pass(self) -> Iterator[Sequence[Process]]:
        """Return what is left of the pass, or that of the next one."""
        if self._groups is None:
            tgids = (
                self._tracker.table.started_since(self._pass_began_ns - START_TOLERANCE_NS) if self._passes else None
            )
            self._pass_began_ns = self._now_ns()
            self._passes += 1
            self._groups = iter(self._procfs.scan_in_groups(self._wanted, tgids))
        return self._groups
