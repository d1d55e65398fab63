"""The rules in force, and how a reload replaces them: load everything, then swap. A failed reload changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence

from cnprocd.acceptance import Accept, FilesChangedError
from cnprocd.connector.source import Source
from cnprocd.connector.uapi import QUEUED_EVENT_BYTES
from cnprocd.dispatch import Dispatcher
from cnprocd.json_value import JsonDict
from cnprocd.load_state import LoadState, ReadDigests
from cnprocd.log import Level, Log
from cnprocd.pipeline import Pipeline
from cnprocd.rescan import SLICE_S
from cnprocd.rules.compile import Matcher, compile_rule
from cnprocd.rules.problems import LoadedRules, RetryableError, RulesError, next_end_ns, with_expired_enabled
from cnprocd.rules.ruleset import Rule
from cnprocd.service import ServiceManager
from cnprocd.stalls import Stalls
from cnprocd.subscription import Subscription

MOST_LOADS = 3  # of one reload, while the files change
RETRY_FIRST_S = 1.0  # after a reload that failed for a cause that may pass; doubled each time, up to RETRY_MOST_S
RETRY_MOST_S = 60.0
MOST_WAIT_S = 60.0  # until the clock is looked at again: it may be set while a rule is disabled for a time


class RulesInForce:
    """What the files say, as far as it is in force."""

    def __init__(
        self,
        loaded: LoadedRules,
        load: Callable[[], Awaitable[LoadedRules]],
        read_digests: ReadDigests,
        subscription: Subscription,
        pipeline: Pipeline,
        dispatcher: Dispatcher,
        manager: ServiceManager,
        log: Log,
        set_log_level: Callable[[Level], None],
        stopping: asyncio.Event,
        stalls: Stalls,
        accept: Accept,
        broken: RulesError | None = None,
    ) -> None:
        """`broken`: the rule files are invalid, and `loaded` are the rules that were accepted last."""
        self.loaded = loaded
        self.state = LoadState(loaded, read_digests, self._show_state)
        self.on_swap: list[Callable[[], None]] = []
        self._load = load
        self._subscription = subscription
        self._pipeline = pipeline
        self._dispatcher = dispatcher
        self._manager = manager
        self._log = log
        self._set_log_level = set_log_level
        self._stopping = stopping
        self._stalls = stalls
        self._accept = accept
        self._broken = broken
        if broken is not None:
            self.state.failed(broken, "start")
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[RulesError | None] | None = None  # the reload that waits for its turn
        self._tasks: set[asyncio.Task[RulesError | None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = RETRY_FIRST_S
        self._expiry: asyncio.TimerHandle | None = None
        self._use_log_level(loaded.settings.log_level)

    def reload_soon(self) -> None:
        """Reload in a task of its own, as a signal asks for."""
        self._next_reload()

    async def reload(self) -> RulesError | None:
        """Load the rules again. Return the error that rejected them, in which case nothing has changed.

        The old rules match until the new ones are loaded. Requests that come meanwhile wait, and share one more load,
        so each answer is about files that were read after its request. A client that leaves cancels nothing.
        """
        return await asyncio.shield(self._next_reload())

    def _next_reload(self) -> asyncio.Task[RulesError | None]:
        """Return the reload that waits for its turn. So any number of requests cost one reload beside the current."""
        if self._next is None:
            self._next = self._keep(self._reload_in_turn())
        return self._next

    def _keep(self, work: Coroutine[None, None, RulesError | None]) -> asyncio.Task[RulesError | None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _reload_in_turn(self) -> RulesError | None:
        async with self._turn:
            self._next = None  # a later request may be about files that are changed from now on
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
            self._manager.reloading()
            problem: RulesError | None = None
            try:
                loaded = await self._load_and_accept()
                if await self._stalls.steps("reload", self._swap(loaded)):
                    self.state.succeeded(loaded)
                self._retry_s = RETRY_FIRST_S
            except RulesError as error:
                problem = error
                self.state.failed(error)
                if not self._stopping.is_set():  # the loader process may have got the signal to stop as well
                    retry_in_s = self._retry_later(error)
                    again = "" if retry_in_s is None else f"; the next attempt is in {retry_in_s:g} s"
                    self._log(
                        "error",
                        "rules_rejected",
                        problems=len(error.problems),
                        rules_hash=self.loaded.rules_hash,
                        retry_in_s=retry_in_s,
                        message=f"reload failed; keeping the current rules{again}\n{error.render()}",
                    )
            finally:
                if not self._stopping.is_set():
                    self._manager.ready(self.status_line())
            return problem

    def _retry_later(self, error: RulesError) -> float | None:
        """Reload again later if the cause may pass, and return in how many seconds. None: the files are invalid."""
        if not isinstance(error, RetryableError):
            self._retry_s = RETRY_FIRST_S
            return None
        after_s, self._retry_s = self._retry_s, min(2 * self._retry_s, RETRY_MOST_S)
        self._retry = asyncio.get_running_loop().call_later(after_s, self._retry_now)
        return after_s

    def _retry_now(self) -> None:
        self._retry = None
        if not self._stopping.is_set():
            self.reload_soon()

    async def accept_at_start(self, within_s: float) -> None:
        """Let the rules that were loaded at start become the accepted ones. If the files changed since, reload them.

        Wait for the runner or the disk at most so long; what is left of it is done beside the loop.
        """
        if self._broken is None:
            task = self._keep(self._accept_loaded())
            await asyncio.wait({task}, timeout=within_s)

    async def _accept_loaded(self) -> RulesError | None:
        async with self._turn:
            try:
                await self._accept(self.loaded, self._dispatcher.snapshots())
            except FilesChangedError:
                self.reload_soon()
            except RulesError as error:
                self.state.failed(error, "acceptance")
                self._log("error", "rules_rejected", problems=len(error.problems), message=error.render())
                self._accept_later(self.loaded.snapshot, RETRY_FIRST_S)
        return None

    def _accept_later(self, snapshot: str, after_s: float) -> None:
        """Ask the runner again to accept the rules of the start, until it does or a reload replaces them."""

        async def accept() -> RulesError | None:
            async with self._turn:
                if self._stopping.is_set() or self.loaded.snapshot != snapshot:
                    return None
                try:
                    await self._accept(self.loaded, self._dispatcher.snapshots())
                except FilesChangedError:
                    self.reload_soon()
                    return None
                except RulesError as error:
                    self._accept_later(snapshot, min(2 * after_s, RETRY_MOST_S))
                    return error
                if self.state.failed_load is not None and self.state.failed_load.step == "acceptance":
                    self.state.succeeded(self.loaded)
                    self._log("notice", "rules_loaded", **self.summary())
                    self._show_state()
                return None

        asyncio.get_running_loop().call_later(after_s, lambda: self._keep(accept()))

    async def _load_and_accept(self) -> LoadedRules:
        """Load the rules until the snapshot of the files is the one that was loaded, at most MOST_LOADS times."""
        for _ in range(MOST_LOADS - 1):
            loaded = await self._load()
            with contextlib.suppress(FilesChangedError):
                await self._accept(loaded, self._dispatcher.snapshots())
                return loaded
        loaded = await self._load()
        await self._accept(loaded, self._dispatcher.snapshots())
        return loaded

    def enable_expired(self) -> None:
        """Enable the rules whose `rules disable --for` is over, and come back when the next one's is.

        No file is read for it: edits that have not been reloaded, or cannot be, must neither come into force nor keep a
        rule disabled.
        """
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        end_ns, now_ns = next_end_ns(self.loaded), time.time_ns()
        if end_ns is None or self._stopping.is_set():
            return
        if end_ns > now_ns:
            wait_s = min((end_ns - now_ns) / 1e9, MOST_WAIT_S)
            self._expiry = asyncio.get_running_loop().call_later(wait_s, self.enable_expired)
            return
        self._keep(self._change(lambda loaded: with_expired_enabled(loaded, time.time_ns()), self._log_enabled))

    def _log_enabled(self, before: LoadedRules) -> None:
        names = sorted(set(before.disabled) - set(self.loaded.disabled))
        self._log("notice", "rules_enabled", rules=names, message=f"enabled again: {', '.join(names)}")

    def change(self, change: Callable[[LoadedRules], LoadedRules]) -> None:
        """Put changed rules in force that come from the same files, when it is their turn."""
        self._keep(self._change(change))

    async def _change(
        self,
        change: Callable[[LoadedRules], LoadedRules],
        report: Callable[[LoadedRules], None] = lambda before: None,
    ) -> RulesError | None:
        async with self._turn:
            before = self.loaded
            changed = change(before)
            if changed == before:  # a reload came first, or the clock was set back
                self.enable_expired()
            elif await self._stalls.steps("reload", self._swap(changed)):
                report(before)
        return None

    def status_line(self) -> str:
        """Return the state of the daemon in one line."""
        counts, source = self._pipeline.counts, self._pipeline.source
        rules = len(self._pipeline.matcher.rules)
        return (
            f"Watching with {rules} rule{'' if rules == 1 else 's'}: {source.events_seen} events, "
            f"{counts.matches} matches, {source.losses.total()} lost, "
            f"{self._dispatcher.status_phrase()}{self.state.phrase()}"
        )

    def _show_state(self) -> None:
        if not self._stopping.is_set():
            self._manager.status(self.status_line())

    def summary(self) -> JsonDict:
        """Return the fields of `started` and `rules_loaded` records."""
        features = self._subscription.features
        return {
            "rules": len(self._pipeline.matcher.rules),
            "files": [str(path) for path in self.loaded.files],
            "rules_hash": self.loaded.rules_hash,
            "event_mask": features.event_mask,
            "taskstats": features.taskstats,
            "table": self._subscription.plan.tracking.table,
        }

    async def _swap(self, loaded: LoadedRules) -> bool:
        """Put loaded rules in force without losing an event or matching it twice: the order decides.

        Return False if the daemon stops first.
        """
        matcher = await self._compiled(loaded.rules)
        both = self._pipeline.matcher.and_other(matcher)
        rescan = self._pipeline.prepare(both, self._subscription.use(both), matcher)
        while not (self._stopping.is_set() or rescan.go_on()):
            await asyncio.sleep(0)
        if self._stopping.is_set():
            return False
        self._pipeline.drain()  # what is queued is evaluated by the rules it happened under
        self._pipeline.use(matcher, self._subscription.use(matcher))
        resized = loaded.settings.receive_buffer_bytes != self.loaded.settings.receive_buffer_bytes
        self.loaded = loaded
        self._use_log_level(loaded.settings.log_level)
        if resized:
            self._pipeline.source.resize(loaded.settings.receive_buffer_bytes)
            log_receive_buffer(self._pipeline.source, loaded.settings.receive_buffer_bytes, self._log)
        self._dispatcher.use(loaded)
        for handler in self.on_swap:
            handler()
        self._log("notice", "rules_loaded", **self.summary())
        self.enable_expired()
        return True

    async def _compiled(self, rules: Sequence[Rule]) -> Matcher:
        """Return the matcher of rules. The loop serves others meanwhile: a rule takes up to 0.3 ms."""
        compiled, deadline_s = [], time.monotonic() + SLICE_S
        for at, rule in enumerate(rules):
            compiled.append(compile_rule(rule, at))
            if time.monotonic() >= deadline_s:
                await asyncio.sleep(0)
                deadline_s = time.monotonic() + SLICE_S
        return Matcher(compiled)

    def _use_log_level(self, level: Level) -> None:
        self._set_log_level(level)
        self._pipeline.logs_provenance = level == "debug"


def log_receive_buffer(source: Source, wanted_bytes: int, log: Log) -> None:
    """Log the size of the receive buffer; as a warning if the kernel granted less than was asked for."""
    granted = source.granted_buffer_bytes
    events = granted // QUEUED_EVENT_BYTES
    short = f"; {wanted_bytes} bytes were asked for, which needs CAP_NET_ADMIN" if granted < wanted_bytes else ""
    log(
        "warning" if short else "info",
        "receive_buffer",
        bytes=granted,
        events=events,
        message=f"the receive buffer holds {events} events{short}",
    )
