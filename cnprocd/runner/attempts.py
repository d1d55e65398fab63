"""The attempts that run in the runner. They outlive the connection that started them.

When the daemon disconnects (it was restarted, upgraded or killed), its hooks run on. The next daemon asks for each by
its attempt id (wire.Resume) and gets its frames, or its result. Meanwhile the runner logs the hooks' output itself. An
attempt that this runner does not know was started by a runner that died: what is left of it is ended before the answer,
so two attempts of one job never run at once. For the same reason a second attempt of a running job is not started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from cnprocd.errors import CnprocdError
from cnprocd.launch import group
from cnprocd.launch.attempt import TERM_GRACE_S, Launcher, RunningAttempt
from cnprocd.launch.program import HookRefusedError
from cnprocd.launch.request import Ending, LaunchRequest
from cnprocd.launch.user import ResolveUser
from cnprocd.log import Log
from cnprocd.runner import wire
from cnprocd.runner.results import Results
from cnprocd.runner.rule_snapshots import Hooks, RuleSnapshots

MOST_ATTEMPTS = 1024  # at once; the daemon's own slots are far fewer

Send = Callable[[wire.Message], bool]


@dataclass(slots=True)
class _Attempt:
    """An attempt from its request to its end. `running` is None until its rules have been read."""

    run: wire.Run
    running: RunningAttempt | None = None
    grace_s: float | None = None  # it is to be ended

    def terminate(self, grace_s: float) -> None:
        self.grace_s = grace_s
        if self.running is not None:
            self.running.terminate(grace_s)


class Attempts:
    """Starts attempts, and keeps them and their results. `send` sends to the daemon; False: none is connected."""

    def __init__(
        self,
        launcher: Launcher,
        snapshots: RuleSnapshots,
        results: Results,
        log: Log,
        resolve_user: ResolveUser,
        send: Send,
        on_end: Callable[[], None],
    ) -> None:
        self.accepting = True
        self._launcher = launcher
        self._snapshots = snapshots
        self._results = results
        self._log = log
        self._resolve_user = resolve_user
        self._send = send
        self._on_end = on_end
        self._attempts: dict[str, _Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._attempts)

    def requests(self) -> list[LaunchRequest]:
        """Return the requests of the attempts that run."""
        return [one.running.request for one in self._attempts.values() if one.running is not None]

    def begin(self, run: wire.Run) -> None:
        """Start a hook, or report why not. The rule decides; the daemon can only shorten the time limit."""
        if run.attempt_id in self._attempts:
            raise wire.WireError(f"attempt {run.attempt_id} is running already")
        refusal = self._refusal(run)
        if refusal is not None:
            self._send(refusal)
            return
        one = self._attempts[run.attempt_id] = _Attempt(run)
        hooks = self._snapshots.loaded(run.snapshot)
        if hooks is not None:
            self._launch(one, hooks)
        else:
            self._keep(self._find_and_launch(one))

    def resume(self, attempt_id: str) -> None:
        """Report about an attempt of an earlier connection: that it runs, how it ended, or that it was interrupted."""
        one, ended = self._attempts.get(attempt_id), self._results.find(attempt_id)
        if one is not None:
            if one.running is not None:
                self._send(wire.Announced(attempt_id=attempt_id, hook_pid=one.running.pid))
        elif ended is not None:
            self._send(ended)
        else:
            self._keep(self._end_unknown(attempt_id))

    def terminate(self, attempt_id: str, grace_s: float) -> None:
        """End an attempt: SIGTERM, and SIGKILL after `grace_s`."""
        one = self._attempts.get(attempt_id)
        if one is not None:
            one.terminate(grace_s)

    async def finish(self, bound_s: float) -> None:
        """Start nothing more, wait for what runs, and end what runs longer than `bound_s`."""
        self.accepting = False
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=bound_s)
        for one in self._attempts.values():
            one.terminate(TERM_GRACE_S)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def refuse(self, attempt_id: str, reason: str) -> None:
        """Report that an attempt is refused for good."""
        self._send(wire.Ended(attempt_id=attempt_id, reason=reason))

    # -- one attempt ---------------------------------------------------------------------------------------------

    def _refusal(self, run: wire.Run) -> wire.NotNow | None:
        if not self.accepting:
            return wire.NotNow(attempt_id=run.attempt_id, reason="the runner is stopping")
        if len(self._attempts) >= MOST_ATTEMPTS:
            return wire.NotNow(attempt_id=run.attempt_id, reason=f"{MOST_ATTEMPTS} hooks are running already")
        if any(one.run.job_id == run.job_id for one in self._attempts.values()):
            reason = f"an earlier attempt of job {run.job_id} is still running"
            return wire.NotNow(attempt_id=run.attempt_id, reason=reason, this_job=True)
        return None

    async def _find_and_launch(self, one: _Attempt) -> None:
        attempt_id, digest = one.run.attempt_id, one.run.snapshot
        try:
            hooks = await self._snapshots.find(digest)
        except CnprocdError as error:
            self._drop(wire.NotNow(attempt_id=attempt_id, reason=error.what))
            return
        if one.grace_s is not None:
            self._drop(wire.NotNow(attempt_id=attempt_id, reason="interrupted"))
        elif hooks is None:
            reason = f"the runner has no snapshot {digest[:12]} of the rules, and the rule files differ; reload them"
            self._drop(wire.NotNow(attempt_id=attempt_id, reason=reason, no_snapshot=True))
        else:
            self._launch(one, hooks)

    def _drop(self, message: wire.OfAttempt) -> None:
        del self._attempts[message.attempt_id]
        self._send(message)
        self._on_end()

    def _launch(self, one: _Attempt, hooks: Hooks) -> None:
        attempt_id = one.run.attempt_id

        def announce(pid: int) -> None:
            self._send(wire.Announced(attempt_id=attempt_id, hook_pid=pid))

        try:
            one.running = self._launcher.launch(self._request(one.run, hooks), announce)
        except CnprocdError as error:  # the hook must not be started
            self._drop(wire.Ended(attempt_id=attempt_id, reason=error.what))
        except OSError as error:
            self._drop(wire.NotNow(attempt_id=attempt_id, reason=str(error)))
        else:
            self._keep(self._wait(one, one.running))

    def _request(self, run: wire.Run, hooks: Hooks) -> LaunchRequest:
        hook = hooks.get(run.rule)
        if hook is None:
            raise HookRefusedError(f"the runner has no rule {run.rule!r} with a hook")
        return LaunchRequest(
            rule=run.rule,
            hook=hook,
            user=self._resolve_user(hook.user, hook.group),
            job_id=run.job_id,
            attempt=run.attempt,
            attempt_id=run.attempt_id,
            events=tuple(run.events),
            limit_s=min(run.limit_s, hook.timeout_s),
            kernel_time_ns=run.kernel_time_ns,
            snapshot=run.snapshot,
            events_left_out=run.events_left_out,
        )

    async def _wait(self, one: _Attempt, running: RunningAttempt) -> None:
        run = one.run

        def emit(line: str) -> None:
            if not self._send(wire.Output(attempt_id=run.attempt_id, line=line)):
                self._log("info", "hook_output", job_id=run.job_id, rule=run.rule, hook_pid=running.pid, line=line)

        def launched(attempt: RunningAttempt) -> None:
            self._send(wire.Launched(attempt_id=run.attempt_id, latency_ms=attempt.latency_ms))

        ending: Ending | None = None
        try:
            ending = await running.wait(emit, launched)
        finally:
            del self._attempts[run.attempt_id]
            if ending is not None and ending.not_started:
                self._send(wire.NotNow(attempt_id=run.attempt_id, reason=ending.result.reason or "not started"))
            elif ending is not None:
                ended = _ended(run.attempt_id, ending)
                self._results.add(ended, delivered=self._send(ended))
            self._on_end()

    async def _end_unknown(self, attempt_id: str) -> None:
        def report() -> None:
            self._log("warning", "hook_leftover", message="ended a hook whose runner was killed", attempt_id=attempt_id)

        await self._launcher.end_leftover(group.Root(None, None, attempt_id), report)
        reason = "interrupted: the runner that started it is gone"
        self._send(wire.Ended(attempt_id=attempt_id, reason=reason, interrupted=True))

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _ended(attempt_id: str, ending: Ending) -> wire.Ended:
    result = ending.result
    return wire.Ended(
        attempt_id=attempt_id,
        reason=result.reason,
        exit_code=result.exit_code,
        signal=result.signal,
        duration_ms=result.duration_ms,
        latency_ms=result.latency_ms,
        interrupted=ending.interrupted,
    )
