"""The daemon around the pipeline: start order, the event loop, signals, reload, stop.

Start: rules, socket, LISTEN and its acknowledgement, narrow, scan /proc, drain, READY=1. Whoever is told READY can
start processes and none of their deaths is missed.

The loop: an event wakes `_drain`, which turns the pipeline until nothing is left or BUDGET_S is spent, then lets the
loop breathe (hooks, control, watchdog). Under load the sockets are left alone for a while, so that the next wake-up
brings many events for one (connector/gathering.py); an isolated event never waits.

Reload: load everything, then swap; what is wrong is told with its position and changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from cnprocd.connector.canary import kernel_sends_events, raise_listener_count
from cnprocd.connector.gathering import Gathering
from cnprocd.connector.inflight import InFlight
from cnprocd.connector.listener import Listener
from cnprocd.connector.source import Source
from cnprocd.connector.uapi import QUEUED_EVENT_BYTES
from cnprocd.control.room import ControlRoom
from cnprocd.dispatch import Actions
from cnprocd.errors import CnprocdError
from cnprocd.log import Level, Log
from cnprocd.pipeline import Pipeline
from cnprocd.process.holder import Holder, kernel_reports_exit_status
from cnprocd.process.procfs import ProcFs, boot_id
from cnprocd.process.tracker import Tracker
from cnprocd.rules.compile import Matcher
from cnprocd.rules.plan import Plan, make_plan
from cnprocd.rules.problems import LoadedRules, RulesError
from cnprocd.service import ServiceManager

BUDGET_S = 0.01  # of draining before the loop gets its turn
TICK_S = 1.0
LAST_DEATHS_S = 0.1  # record and event of one death are microseconds apart
STOP_BOUND_S = 10.0  # how long running hooks may go on after SIGTERM
CANARY_AFTER_S = 60.0  # of silence, then the kernel must prove that it still tells us
COLLECTOR = (20_000, 20, 20)  # see gc.set_threshold
MOST_REVIVALS = 100  # how far below zero the kernel's count may have been brought


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line decides."""

    rules: Path | None
    state_dir: Path
    runtime_dir: Path
    refused: frozenset[str] = frozenset()
    runner: Path | None = None  # the runner service's socket; None: hooks are our own children


class Daemon:
    """One running cnprocd."""

    def __init__(
        self,
        options: Options,
        loaded: LoadedRules,
        load: Callable[[], Awaitable[LoadedRules]],
        manager: ServiceManager,
        log: Log,
        own_tgid: int,
    ) -> None:
        self.options = options
        self.loaded = loaded
        self.started_ns = time.time_ns()
        self._load = load
        self._manager = manager
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._reload_turn = asyncio.Lock()
        self._reload_tasks: set[asyncio.Task[RulesError | None]] = set()
        self._tick_handle: asyncio.TimerHandle | None = None
        self._following_since: float | None = None
        self._heard_at = time.monotonic()
        self._gathering = Gathering()
        self._listening = False
        self._again: asyncio.TimerHandle | None = None  # when to drain without being woken

        adopted = manager.adopted("connector")
        # With a manager that keeps it, the socket stays subscribed when we go: the next of us reads what we missed.
        self.kept_by_manager = bool(adopted) or manager.present
        listener = Listener.adopt(adopted[0]) if adopted else Listener.open(loaded.settings.receive_buffer_bytes)
        if not adopted:
            manager.store_fd("connector", listener.fileno())
        self.source = Source(
            listener,
            loaded.settings.receive_buffer_bytes,
            options.refused,
            taskstats_fd=next(iter(manager.adopted("taskstats")), None),
            keep_taskstats=self._keep_taskstats,
            in_flight=InFlight(_made(options.state_dir) / "in-flight", boot_id()),
        )
        self.features = self.source.subscribe()
        matcher = Matcher(loaded.rules)
        self.plan = make_plan(matcher, self.features)
        self.source.ask(self.plan.request)
        self.actions = Actions(options.state_dir, loaded, log, self, options.runner)
        self.control = ControlRoom(self, options.runtime_dir, log)
        self.pipeline = Pipeline(
            self.source,
            Tracker(self.plan.tracking, ProcFs(), own_tgid, matcher.cares),
            matcher,
            self.control.tapped(self.actions),
            ProcFs(),
            log,
            Holder() if "pidfd_info" not in options.refused and kernel_reports_exit_status() else None,
        )
        self.pipeline.logs_provenance = loaded.settings.log_level == "debug"

    async def run(self) -> None:
        """From here to a clean stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        self._say_buffer()
        self.pipeline.start()
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        self.actions.start()
        self._listen()
        self._watch()
        await self.control.open()
        # What start-up made stays: the collector need not look at it again. And it looks less often, since what an
        # event makes is freed by its reference count; 700 new objects are three milliseconds of a storm.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECTOR)
        self._log("notice", "started", **self._summary(), message=self.status_line())
        self._manager.ready(self.status_line())
        await self._stop.wait()
        await self._shut_down()

    def status_line(self) -> str:
        """One true line for an operator."""
        counts, lost = self.pipeline.counts, self.source.losses.total()
        rules = len(self.pipeline.matcher.rules)
        return (
            f"Watching with {rules} rule{'' if rules == 1 else 's'}: {self.source.events_seen} events, "
            f"{counts.matches} matches, {lost} lost, {self.actions.status_phrase()}"
        )

    def _on_hangup(self) -> None:
        task = self._loop.create_task(self.reload())
        self._reload_tasks.add(task)
        task.add_done_callback(self._reload_tasks.discard)

    async def reload(self) -> RulesError | None:
        """Read the rules again. Returns what is wrong with them, in which case nothing has changed.

        The old rules judge until the new ones are there. Whoever asks meanwhile gets a reading that began after that.
        """
        async with self._reload_turn:
            self._manager.reloading()
            problem: RulesError | None = None
            try:
                loaded = await self._load()
                if not self._stop.is_set():
                    self._swap(loaded)
            except RulesError as error:
                problem = error
                if not self._stop.is_set():  # whoever reads for us may have been told to stop as well
                    self._log(
                        "error",
                        "rules_rejected",
                        problems=len(error.problems),
                        message=f"the rules in force stay in force\n{error.render()}",
                    )
            finally:
                if not self._stop.is_set():
                    self._manager.ready(self.status_line())
            return problem

    def _swap(self, loaded: LoadedRules) -> None:
        matcher = Matcher(loaded.rules)
        plan = make_plan(matcher, self.features, self._following_since is not None)
        self._use(matcher, plan)
        resized = loaded.settings.receive_buffer_bytes != self.loaded.settings.receive_buffer_bytes
        self.loaded = loaded
        if resized:
            self.source.resize(loaded.settings.receive_buffer_bytes)
            self._say_buffer()
        self.actions.use(loaded)
        self.control.reloaded()
        self._log("notice", "rules_loaded", **self._summary())

    def _use(self, matcher: Matcher, plan: Plan) -> None:
        """Put rules and plan in force; a kernel that takes its exit records back is served like an older one."""
        if not self.pipeline.use(matcher, plan):
            self.features = self.features.without_taskstats()
            plan = make_plan(matcher, self.features, self._following_since is not None)
            self.pipeline.use(matcher, plan)
        self.plan = plan

    # The loop.

    def _listen(self) -> None:
        if self._listening or self._stop.is_set():
            return
        self._listening = True
        for fd in self.source.filenos():
            self._loop.add_reader(fd, self._drain)

    def _deafen(self) -> None:
        if not self._listening:
            return
        self._listening = False
        for fd in self.source.filenos():
            self._loop.remove_reader(fd)

    def _drain(self) -> None:
        if self._stop.is_set():
            return  # what is queued is taken by _shut_down, and afterwards the sockets are closed
        try:
            self._turn_for_a_while()
        except BaseException:
            self._listen()  # whatever it was, the loop tells of it: we are not deaf for it
            raise

    def _turn_for_a_while(self) -> None:
        """Turn the pipeline for a while; under load let events gather before the next time."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        began = time.monotonic()
        deadline, quiet_s = began + BUDGET_S, began - self._heard_at
        seen, more = self.pipeline.turn()
        most = seen
        while more and time.monotonic() < deadline:
            seen, more = self.pipeline.turn()
            most = max(most, seen)
        self._heard_at = time.monotonic()
        self._arm_tick()
        if more:
            self._listen()  # the budget is spent: the loop has its turn, and wakes us at once
            return
        looks_up = self.plan.tracking.looks_up
        window_s = self._gathering.window_s(most, quiet_s, self.loaded.settings.gather_s, looks_up)
        if window_s:
            self._deafen()  # window after window: while they follow each other, nobody else wakes us
            self._again = self._loop.call_later(window_s, self._drain)
            return
        self._listen()
        if self.pipeline.tracker.deaths.has_held:
            self._again = self._loop.call_later(0.002, self._drain)

    def _arm_tick(self) -> None:
        """Housekeeping follows activity; an idle daemon sleeps."""
        if self._tick_handle is None:
            self._tick_handle = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._tick_handle = None
        if self._stop.is_set():
            return
        self.pipeline.tick()
        self.actions.tick()
        self._stop_following()
        self._manager.status(self.status_line())
        if (
            time.monotonic() - self._heard_at < 3 * TICK_S
            or self._following_since is not None
            or self.actions.busy
            or self.actions.holds_back
        ):
            self._arm_tick()

    def _watch(self) -> None:
        """The watchdog's ping, from the same loop that drains: if that hangs, so does this. And the canary.

        Exit records whose event nobody asked for come without waking us: here they are taken at the latest.
        """
        if not self._stop.is_set():
            self.pipeline.drain()
        interval_s = self._manager.watchdog_interval_s
        if interval_s is not None:
            self._manager.watchdog()
        if time.monotonic() - self._heard_at >= CANARY_AFTER_S:
            self._heard_at = time.monotonic()
            self._check_canary()
        self._loop.call_later(interval_s or CANARY_AFTER_S, self._watch)

    def _check_canary(self) -> None:
        """A long silence may be a quiet day, or a kernel that was made to believe that nobody listens."""
        for _ in range(MOST_REVIVALS):
            if kernel_sends_events():
                return
            raise_listener_count()
            self._log("warning", "muted", message="the kernel had stopped sending events: subscribed again")
        self._log("critical", "muted", message="the kernel sends no events: see `cnprocctl doctor`")

    # Hooks' descendants must be known from their first fork on.

    def register_hook(self, hook_pid: int) -> None:
        """A hook was started; it has not done anything yet."""
        self.pipeline.tracker.family.add(hook_pid)

    def register_runner(self, runner_pid: int) -> None:
        """The runner service said who it is; it has not started anything yet."""
        self.pipeline.tracker.family.roots.add(runner_pid)

    def follow(self) -> None:
        """Called before a hook is started: ask for forks, so that whatever comes of it is known."""
        if self._following_since is None:
            self._following_since = time.monotonic()
            self._ask_anew(follow_hooks=True)
            self._arm_tick()
        self._following_since = time.monotonic()

    def _stop_following(self) -> None:
        since = self._following_since
        if since is None or self.actions.busy or self.pipeline.tracker.family.alive:
            return
        if time.monotonic() - since >= TICK_S:
            self._following_since = None
            self._ask_anew(follow_hooks=False)

    def _ask_anew(self, follow_hooks: bool) -> None:
        """The same rules, asking for more or for less. No event is judged here: a hook starts from amid a batch."""
        self.plan = make_plan(self.pipeline.matcher, self.features, follow_hooks)
        self.source.ask(self.plan.request)

    # Ends.

    async def _shut_down(self) -> None:
        """Take what is queued, let running hooks finish within a bound, let the kernel go."""
        self._manager.stopping()
        self._deafen()
        await self._take_the_last()
        if not self.kept_by_manager:
            self.pipeline.finish()
        self._log("notice", "stopping", message=self.status_line())
        await self.control.close()
        await self.actions.stop(STOP_BOUND_S)
        if not self.kept_by_manager:
            with contextlib.suppress(OSError):
                self.source.close()

    async def _take_the_last(self) -> None:
        """Drain until no half of a death is in our hands: the next of us could not join it with the other half."""
        deaths, deadline = self.pipeline.tracker.deaths, time.monotonic() + LAST_DEATHS_S
        self.pipeline.drain()
        while (deaths.has_held or deaths.has_waiting) and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
            self.pipeline.drain()

    def _summary(self) -> dict[str, object]:
        return {
            "rules": len(self.pipeline.matcher.rules),
            "files": [str(path) for path in self.loaded.files],
            "event_mask": self.features.event_mask,
            "taskstats": self.features.taskstats,
            "table": self.plan.tracking.table,
        }

    def _keep_taskstats(self, fd: int | None) -> None:
        """Exit records must outlive us as the events do: an event without its record has no name."""
        if fd is None:
            self._manager.forget_fd("taskstats")
        else:
            self._manager.store_fd("taskstats", fd)

    def _say_buffer(self) -> None:
        granted = self.source.granted_buffer_bytes
        wanted = self.loaded.settings.receive_buffer_bytes
        level: Level = "warning" if granted < wanted else "info"
        short = f"; {wanted} were asked for, which needs CAP_NET_ADMIN" if granted < wanted else ""
        self._log(
            level,
            "receive_buffer",
            bytes=granted,
            events=granted // QUEUED_EVENT_BYTES,
            message=f"the receive buffer holds {granted // QUEUED_EVENT_BYTES} events{short}",
        )


def _made(state_dir: Path) -> Path:
    """The state directory, made if need be; what is wrong with it is told by those who use it."""
    with contextlib.suppress(OSError):
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return state_dir


async def serve(
    options: Options,
    loaded: LoadedRules,
    load: Callable[[], Awaitable[LoadedRules]],
    manager: ServiceManager,
    log: Log,
    own_tgid: int,
) -> None:
    """Run a daemon until it is told to stop. Raises CnprocdError if it cannot start."""
    try:
        await Daemon(options, loaded, load, manager, log, own_tgid).run()
    except OSError as error:
        raise CnprocdError(f"the connector failed: {error}", "see the journal, and `cnprocctl doctor`") from error
