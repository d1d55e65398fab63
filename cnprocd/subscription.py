"""What is asked of the kernel now: the plan of the rules in force, and the forks of hooks while any hook may live."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from cnprocd.connector.request import Features
from cnprocd.connector.source import Source
from cnprocd.process.family import HookFamily, left_by_hooks
from cnprocd.process.file_names import FileNames
from cnprocd.process.handed_on import FormerHooks
from cnprocd.process.model import Process
from cnprocd.process.pidfd_watch import PidfdWatch
from cnprocd.process.table import START_TOLERANCE_NS
from cnprocd.rules.compile import Matcher
from cnprocd.rules.plan import Plan, make_plan

_FOLLOW_AT_LEAST_S = 1.0


class Subscription:
    """The plan in force. `features` shrink if the kernel withdraws its exit records."""

    def __init__(self, source: Source, features: Features, matcher: Matcher, files: FileNames | None = None) -> None:
        """`files`: to know the programs that rules name by the files of exit records; None: by /proc alone."""
        self.features = features
        self._files = files
        self._source = source
        self._matcher = matcher
        self._use_files(matcher)
        self._follows_hooks = False
        self.plan = self._ask()

    def use(self, matcher: Matcher) -> Plan:
        """Ask the kernel for what these rules need. It is in force when this returns."""
        self._matcher = matcher
        self._use_files(matcher)
        self.plan = self._ask()
        return self.plan

    @property
    def unwatched(self) -> frozenset[str]:
        """The paths that rules name and whose files exit records do not identify here."""
        if self._files is None:
            return self._matcher.exe_paths
        return frozenset(one.path for one in self._files.unwatched)

    def _use_files(self, matcher: Matcher) -> None:
        if self._files is not None:
            self._files.use(matcher.exe_paths, matcher.exe_directories)

    def follow_hooks(self, wanted: bool) -> None:
        """Ask for every fork as well, or no longer. No event is read here: a hook may start amid a batch."""
        self._follows_hooks = wanted
        self.plan = self._make_plan()
        self._source.ask(self.plan.request)

    def _ask(self) -> Plan:
        plan = self._make_plan()
        if not self._source.ask(plan.request):  # the kernel sends no exit records any more: serve it like an older one
            self.features = self.features.without_taskstats()
            plan = self._make_plan()
            self._source.ask(plan.request)
        return plan

    def _make_plan(self) -> Plan:
        return make_plan(self._matcher, self.features, self._follows_hooks, self.unwatched)


class HookFollower:
    """The registry of hooks (dispatch.HookRegistry). Descendants of a hook must be known from its first fork on."""

    def __init__(
        self,
        subscription: Subscription,
        family: HookFamily,
        on_follow: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_follow` is called when following begins, so that `stop_if_over` is called about once a second."""
        self._subscription = subscription
        self._family = family
        self._on_follow = on_follow
        self._clock = clock
        self._last_start_s: float | None = None

    @property
    def following(self) -> bool:
        """Whether the kernel is asked for every fork."""
        return self._last_start_s is not None

    def follow(self) -> None:
        """Ask the kernel for every fork from now on: a hook is about to start."""
        if self._last_start_s is None:
            self._subscription.follow_hooks(True)
            self._on_follow()
        self._last_start_s = self._clock()

    def take_over(self, former: FormerHooks, scan: Sequence[Process]) -> None:
        """Follow what the hooks of an earlier daemon left. Call it before the events that are queued are read.

        `scan`: every process, with its cgroup if there is a runner service.
        """
        starts = {process.tgid: process.start_ns for process in scan}
        for runner in former.runners:
            if abs((starts.get(runner.tgid) or 0) - runner.start_ns) <= START_TOLERANCE_NS:
                self.register_runner(runner.tgid)
        for tgid in left_by_hooks(former, scan):
            self._family.add(tgid)
        if self._family.alive:
            self.follow()

    def register_hook(self, hook_pid: int) -> None:
        """Take this process for a hook. It has not done anything yet."""
        self._family.add(hook_pid)

    def register_runner(self, runner_pid: int) -> None:
        """Take this process for the runner service: whatever it forks from now on is a hook."""
        with contextlib.suppress(OSError):  # it ended already
            self._family.add_root(runner_pid, PidfdWatch(runner_pid).is_alive)

    def stop_if_over(self, hooks_running: bool) -> None:
        """Ask for forks no longer if no hook runs and no descendant of one is alive."""
        if self._last_start_s is None or hooks_running or self._family.alive:
            return
        if self._clock() - self._last_start_s >= _FOLLOW_AT_LEAST_S:
            self._last_start_s = None
            self._subscription.follow_hooks(False)
