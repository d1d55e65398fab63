"""Build the parts of the daemon and connect them, in order. No part sees another before that one is complete.

Where two parts need each other, the earlier one keeps a list that the later one adds a function to: the tap its
observers, the ticker and the rules in force their handlers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cnprocd.acceptance import Accept, accepted_by_runner, accepted_here
from cnprocd.connector.inflight import InFlight
from cnprocd.connector.listener import Listener
from cnprocd.connector.request import Features
from cnprocd.connector.source import Source
from cnprocd.control import access
from cnprocd.control.room import ControlRoom
from cnprocd.control.tap import MATCHES, Tap
from cnprocd.dispatch import Dispatcher
from cnprocd.edge import EdgeState
from cnprocd.event_loop import EventLoop, Ticker
from cnprocd.failures import Failures
from cnprocd.handover import PROGRAM, Handover
from cnprocd.hits import Hits
from cnprocd.launch.attempt import ObservingLauncher
from cnprocd.load_state import LoadState, ReadDigests
from cnprocd.log import Log
from cnprocd.machine_ids import this_machine
from cnprocd.name_resolution import NameResolution
from cnprocd.names import Names
from cnprocd.output.log import LogOutput
from cnprocd.owner_lock import OwnerLock
from cnprocd.pipeline import Pipeline
from cnprocd.process.counted_lookup import CountedLookup
from cnprocd.process.file_names import FileNames
from cnprocd.process.former_files import FormerFiles
from cnprocd.process.holder import Holder, kernel_reports_exit_status
from cnprocd.process.kernel_log import KernelLog
from cnprocd.process.lookups import Lookups
from cnprocd.process.procfs import boot_id
from cnprocd.process.tracker import Tracker
from cnprocd.recovery import Recovery
from cnprocd.reload import RulesInForce
from cnprocd.rules.compile import Matcher
from cnprocd.rules.plan import Plan
from cnprocd.rules.problems import LoadedRules, RulesError
from cnprocd.rules.ruleset import Hook
from cnprocd.runner.client import RunnerClient
from cnprocd.service import ServiceManager
from cnprocd.spool.disk import ChildDisk
from cnprocd.spool.disk_worker import DiskWorker
from cnprocd.stalls import Stalls
from cnprocd.subscription import HookFollower, Subscription


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line decides."""

    rules: Path | None
    state_dir: Path
    runtime_dir: Path
    refused: frozenset[str] = frozenset()
    runner: Path | None = None  # the runner service's socket; None: hooks are children of the daemon
    observe_only: bool = False  # no hook is started


@dataclass(frozen=True, slots=True)
class Outside:
    """What the daemon gets from main: how to read rule files, how to log, the service manager."""

    load: Callable[[], Awaitable[LoadedRules]]
    read_digests: ReadDigests
    store_snapshot: Accept  # into the state directory
    load_former: Callable[[Collection[str]], Awaitable[Mapping[str, Mapping[str, Hook]]]]  # hooks of kept snapshots
    manager: ServiceManager
    log: Log
    output: LogOutput
    stalls: Stalls  # of the running loop
    own_tgid: int
    owner: OwnerLock = field(default_factory=OwnerLock)  # held until the process ends: nothing may be written after it
    disk: DiskWorker | None = None  # the process of the spool, if it was started already
    broken: RulesError | None = None  # the rule files are invalid, and the rules are those that were accepted last


@dataclass(frozen=True, slots=True)
class ControlledDaemon:
    """The parts of the daemon that the control socket shows and steers (control.view.DaemonView)."""

    rules_in_force: RulesInForce
    subscription: Subscription
    pipeline: Pipeline
    dispatcher: Dispatcher
    hits: Hits
    kept_by_manager: bool
    outside: Outside
    edges: list[EdgeState]
    started_ns: int = field(default_factory=time.time_ns)

    @property
    def stalls(self) -> Stalls:
        return self.outside.stalls

    @property
    def output(self) -> LogOutput:
        return self.outside.output

    @property
    def owner(self) -> OwnerLock:
        return self.outside.owner

    @property
    def loaded(self) -> LoadedRules:
        return self.rules_in_force.loaded

    @property
    def plan(self) -> Plan:
        return self.subscription.plan

    @property
    def features(self) -> Features:
        return self.subscription.features

    @property
    def unwatched(self) -> frozenset[str]:
        return self.subscription.unwatched

    @property
    def load_state(self) -> LoadState:
        return self.rules_in_force.state

    async def reload(self) -> RulesError | None:
        return await self.rules_in_force.reload()


@dataclass(frozen=True, slots=True)
class Parts:
    """The complete daemon, not started yet."""

    rules: RulesInForce
    names: Names
    resolution: NameResolution
    lookups: Lookups
    pipeline: Pipeline
    dispatcher: Dispatcher
    hits: Hits
    control: ControlRoom
    event_loop: EventLoop
    stopping: asyncio.Event
    kept_by_manager: bool  # the sockets stay subscribed after a stop, and a later daemon reads what is queued in them
    sockets_adopted: bool  # from an earlier daemon, perhaps with what is queued in them
    has_runner: bool  # hooks are started by the runner service
    follower: HookFollower
    handover: Handover
    files: FileNames


def connect(options: Options, loaded: LoadedRules, outside: Outside) -> Parts:
    """Subscribe to the kernel's events and build everything on top. Needs a running asyncio loop.

    Raises CnprocdError (no connector, no privilege) or OSError.
    """
    loop, manager, log = asyncio.get_running_loop(), outside.manager, outside.log
    stopping, ticker, failures = asyncio.Event(), Ticker(loop, outside.stalls), Failures(log, time.monotonic)
    source, kept_by_manager = open_source(options, loaded, manager)
    features = source.subscribe()
    matcher = Matcher(loaded.rules)
    blame = outside.stalls.blame
    names = Names(loop, log, blame)
    lookups = Lookups(loop, log, names.user_name, blame)
    lookups.prepare()
    handover = Handover(options.runtime_dir, boot_id(), lookups, log)
    files = _open_files(lookups, handover, manager)
    subscription = Subscription(source, features, matcher, files)
    counted = CountedLookup(lookups)
    tracker = Tracker(subscription.plan.tracking, counted, outside.own_tgid, matcher.cares, files, failures)
    follower = HookFollower(subscription, tracker.family, ticker.arm)
    client = None if options.runner is None else RunnerClient(options.runner, log, follower.register_runner)
    launcher = ObservingLauncher(log, blame=blame) if options.observe_only else client
    disk = ChildDisk(loop, blame, outside.disk)
    dispatcher = Dispatcher(
        options.state_dir, loaded, log, follower, launcher, names.hook_user, disk, failures, outside.stalls,
        outside.output.together, options.runtime_dir, outside.output.write_match,
    )  # fmt: skip
    dispatcher.scheduler.former.load = outside.load_former
    tap = Tap(dispatcher)
    holder = Holder() if "pidfd_info" not in options.refused and kernel_reports_exit_status() else None
    recovery = Recovery(source, tracker, lookups, holder, log)
    kernel_log = _open_kernel_log(options, manager)
    pipeline = Pipeline(
        source, tracker, matcher, tap, recovery, lookups, log, this_machine(), files, kernel_log, failures=failures,
        log_queued=lambda: outside.output.queued, waited_s=dispatcher.spool.waited_s,
    )  # fmt: skip
    rules = RulesInForce(
        loaded, outside.load, outside.read_digests, subscription, pipeline, dispatcher, manager, log,
        outside.output.set_level, stopping, outside.stalls,
        accepted_here(outside.store_snapshot, log) if client is None else accepted_by_runner(client, log),
        outside.broken,
    )  # fmt: skip
    hits = Hits(pipeline.counts, dispatcher.spool)
    rules.on_swap.append(lambda: hits.forget_others({rule.name for rule in rules.loaded.rules}))
    edges: list[EdgeState] = [lookups.edge, names.edge, disk.edge, *dispatcher.scheduler.launcher.edges]
    view = ControlledDaemon(rules, subscription, pipeline, dispatcher, hits, kept_by_manager, outside, edges)
    control = ControlRoom(view, tap, options.runtime_dir, log, lambda: names.resolve("readers", access.readers_group))
    edges += [*outside.output.edges, control.metrics.edge]
    resolution = NameResolution(rules, names.id_of, log)
    rules.on_swap += [control.reloaded, names.expire]
    event_loop = EventLoop(
        loop, ticker, rules, pipeline, counted, dispatcher, follower, manager, log, stopping, outside.stalls,
        lambda: control.server.wanted(MATCHES),
    )  # fmt: skip
    ticker.handlers += [lambda: handover.keep(tracker.family, files.hand_on()), hits.store]
    ticker.handlers += [lambda: lookups.tick(time.monotonic()), lambda: names.tick(time.monotonic())]
    return Parts(
        rules, names, resolution, lookups, pipeline, dispatcher, hits, control, event_loop, stopping, kept_by_manager,
        bool(manager.adopted("connector")), client is not None, follower, handover, files,
    )  # fmt: skip


def _open_files(lookups: Lookups, handover: Handover, manager: ServiceManager) -> FileNames:
    """Return the files of named programs. What the last daemon knew of them matters if its events are queued."""
    files, pins = FileNames(lookups.file_ids), manager.adopted_like(PROGRAM)
    for name in pins:
        manager.forget_fd(name)
    if manager.adopted("connector"):
        files.take_over(FormerFiles(handover.take_files(), [fd for fds in pins.values() for fd in fds]))
    return files


def _open_kernel_log(options: Options, manager: ServiceManager) -> KernelLog:
    if "kernel_log" in options.refused:
        return KernelLog(None, "refused on request")
    return KernelLog.open(manager.adopted("kmsg"))


def open_source(options: Options, loaded: LoadedRules, manager: ServiceManager) -> tuple[Source, bool]:
    """Return both kernel sockets, not subscribed yet, and whether the service manager keeps them after a stop.

    Sockets that the manager kept are adopted with what is queued in them. New ones are given to it to keep: exit
    records as well as events, because an event without its record has no comm.
    """
    adopted = manager.adopted("connector")
    buffer_bytes = loaded.settings.receive_buffer_bytes
    listener = Listener.adopt(adopted[0]) if adopted else Listener.open(buffer_bytes)
    if not adopted:
        manager.store_fd("connector", listener.fileno())

    def keep_taskstats(fd: int | None) -> None:
        if fd is None:
            manager.forget_fd("taskstats")
        else:
            manager.store_fd("taskstats", fd)

    source = Source(
        listener,
        buffer_bytes,
        options.refused,
        taskstats_fd=next(iter(manager.adopted("taskstats")), None),
        keep_taskstats=keep_taskstats,
        in_flight=InFlight(options.runtime_dir / "in-flight", boot_id()),
    )
    return source, bool(adopted) or manager.present
