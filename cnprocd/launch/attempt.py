"""One attempt to run a hook, from its request to its exit status.

`launch` is synchronous and short: a spare process becomes the hook while this process goes on. `wait` is a task that
waits for the report of the exec, the exit (by pidfd), the time limit, or `terminate`, and ends the whole group if it
must. The hook is reaped last, when its group is gone, so none of its PIDs can be reused meanwhile.

Processes that a successful hook leaves behind keep running: it may have restarted a service. Their output is read until
they close it (left_behind.py). Processes that a failed hook leaves behind are ended with it, before the next attempt
can meet them.

Latency is the time from the kernel's timestamp to the report pipe's EOF as the event loop sees it: the exec succeeded.
It is an upper bound, by the loop's own delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from cnprocd.edge import EdgeState
from cnprocd.launch import group
from cnprocd.launch.left_behind import LeftBehind
from cnprocd.launch.output import Output
from cnprocd.launch.process_reader import ProcessReader
from cnprocd.launch.request import AttemptResult, Ending, LaunchRequest
from cnprocd.launch.spawn import Child, ReadyHook, Starter, launch_failure
from cnprocd.log import Log

TERM_GRACE_S = 5.0
STUCK_WAIT_S = 2.0  # a process that survives SIGKILL so long is blocked in the kernel: its slot is freed
MS = 1_000_000
Emit = Callable[[str], None]
Announce = Callable[[int], None]


class RunningAttempt(Protocol):
    """A hook that runs: in this process (LocalAttempt), or in the runner (runner/client.py)."""

    request: LaunchRequest
    pid: int
    start_ticks: int | None  # of its process; None: unknown
    latency_ms: float | None
    silent: bool  # the runner owes an answer about it, so it takes no slot

    @property
    def running_s(self) -> float: ...
    def terminate(self, grace_s: float) -> None: ...
    async def wait(self, emit: Emit, launched: Callable[[RunningAttempt], None]) -> Ending: ...


class Launcher(Protocol):
    """Starts hooks: as children of this process (LocalLauncher), or in the runner (runner/client.py).

    If they outlive the daemon, close() leaves them running, and the next daemon resumes them.
    """

    on_ready: Callable[[], None]  # called when `ready` becomes true

    @property
    def edges(self) -> list[EdgeState]: ...

    @property
    def ready(self) -> bool: ...
    @property
    def outlives_daemon(self) -> bool: ...
    @property
    def observes_only(self) -> bool: ...
    def resume(self, request: LaunchRequest, announce: Announce) -> RunningAttempt: ...
    async def end_leftover(self, root: group.Root, found: Callable[[], None]) -> None: ...
    def prepare(self, *, soon: bool = False) -> None: ...
    def close(self) -> None: ...
    def make_ready(self, request: LaunchRequest) -> ReadyHook | None: ...
    def launch(self, request: LaunchRequest, announce: Announce, ready: ReadyHook | None = None) -> RunningAttempt: ...


class LocalLauncher:
    """Starts hooks as children of this process. `cgroup_dir` is a delegated cgroup v2 directory, if there is one."""

    outlives_daemon = False
    observes_only = False
    ready = True

    def __init__(
        self, log: Log, cgroup_dir: Path | None = None, blame: Callable[[str, float], None] | None = None
    ) -> None:
        """`blame` gets the times for which the event loop waited for an edge."""
        self._starter = Starter(log, blame)
        self._processes = ProcessReader()
        self._cgroup_dir = cgroup_dir
        self._log = log
        self._left_behind = LeftBehind()
        self.prepare = self._starter.prepare
        self.on_ready: Callable[[], None] = lambda: None

    def close(self) -> None:
        """End the spare process. Programs that hooks left behind keep running; what they write is discarded."""
        self._starter.close()
        self._left_behind.hand_over()
        self._processes.close()

    async def end_leftover(self, root: group.Root, found: Callable[[], None]) -> None:
        """End what is left of an attempt of an earlier process. Call `found` before, if there is any."""
        if await group.members(root, self._processes):
            found()
            await group.end(root, TERM_GRACE_S, self._processes)

    def resume(self, request: LaunchRequest, announce: Announce) -> LocalAttempt:
        """Raise OSError: hooks of an earlier daemon are not children of this process."""
        raise OSError("cannot resume a hook of an earlier daemon")

    @property
    def edges(self) -> list[EdgeState]:
        """The work beside the running event loop."""
        return [self._processes.edge]

    def left_behind(self) -> bool:
        """Whether a program that a hook left behind still has the hook's output."""
        return len(self._left_behind) > 0

    def make_ready(self, request: LaunchRequest) -> ReadyHook:
        """Do all of a launch that may be done before it is certain. Raises as launch() does."""
        procs_fd = None
        cgroup = self._cgroup(request)
        if cgroup is not None:
            cgroup.mkdir(exist_ok=True)
            procs_fd = os.open(cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        return self._starter.make_ready(request, procs_fd)

    def launch(self, request: LaunchRequest, announce: Announce, ready: ReadyHook | None = None) -> LocalAttempt:
        """Start a hook. `announce` gets its PID before the hook does anything. `ready` is of make_ready().

        Raises HookRefusedError if its arguments cannot be used, and OSError if it cannot be started now. The program is
        opened and checked in the process that becomes the hook: its disk may not answer.
        """
        child = (ready or self.make_ready(request)).start(announce)
        root = group.Root(child.pid, None, request.attempt_id, self._cgroup(request))
        return LocalAttempt(
            request, child, root, self._processes, lambda output: self._keep(request, child.pid, output)
        )

    def _cgroup(self, request: LaunchRequest) -> Path | None:
        return None if self._cgroup_dir is None else self._cgroup_dir / cgroup_name(request)

    def _keep(self, request: LaunchRequest, hook_pid: int, output: Output) -> None:
        """Log the output of a program that the hook left behind. The attempt has ended, so it gets no more of it."""
        output.emit = lambda line: self._log(
            "info", "hook_output", job_id=request.job_id, rule=request.rule, hook_pid=hook_pid, line=line
        )
        self._left_behind.keep(output)


class ObservingLauncher(LocalLauncher):
    """Starts no hook, for --observe-only: it is never ready. Jobs that an earlier daemon left keep waiting."""

    observes_only = True
    ready = False

    def __init__(self, log: Log, blame: Callable[[str, float], None] | None = None) -> None:
        super().__init__(log, blame=blame)
        self.prepare = lambda *, soon=False: None

    def launch(self, request: LaunchRequest, announce: Announce, ready: ReadyHook | None = None) -> LocalAttempt:
        """Raise OSError."""
        raise OSError("hooks are refused: --observe-only is in effect")


class LocalAttempt:
    """A hook that runs as a child of this process. `wait` must be called once."""

    def __init__(
        self,
        request: LaunchRequest,
        child: Child,
        root: group.Root,
        processes: ProcessReader,
        leave_behind: Callable[[Output], None],
    ) -> None:
        self.request = request
        self.pid = child.pid
        self.start_ticks = child.start_ticks
        self.started_ns = time.monotonic_ns()
        self.latency_ms: float | None = None
        self.silent = False
        self._child = child
        self._root = root
        self._processes = processes
        self._leave_behind = leave_behind
        self._grace_s = TERM_GRACE_S
        self._terminated = asyncio.Event()
        self._report: bytes | None = None

    @property
    def running_s(self) -> float:
        """The time since the start, in seconds."""
        return (time.monotonic_ns() - self.started_ns) / 1e9

    def terminate(self, grace_s: float) -> None:
        """End the attempt now: SIGTERM, and SIGKILL after `grace_s`."""
        self._grace_s = grace_s
        self._terminated.set()

    async def wait(self, emit: Emit, launched: Callable[[RunningAttempt], None]) -> Ending:
        """Wait for the end. `emit` gets each line of output, `launched` is called when the program runs."""
        loop = asyncio.get_running_loop()
        output = Output(self._child.output_fd, self.request.hook.output_limit_bytes, emit)
        loop.add_reader(self._child.report_fd, self._on_report, launched)
        loop.add_reader(output.fd, _on_output, output)
        try:
            overdue = await self._until_end()
            succeeded = overdue is None and self._succeeded()
            survivors = 0 if succeeded else await group.end(self._root, self._grace_s, self._processes)
            status = await self._reap()
        finally:
            loop.remove_reader(self._child.report_fd)
            loop.remove_reader(output.fd)
        if self._report is None:
            self._on_report(launched)
        output.finish()
        is_left_behind = succeeded and not output.ended
        self._child.close(but_output=is_left_behind)
        if is_left_behind:
            self._leave_behind(output)
        self._leave_cgroup()
        return self._ending(overdue, survivors, status)

    async def _until_end(self) -> str | None:
        """Return None if the hook exited by itself, else the reason to end it now."""
        exit_ = asyncio.ensure_future(group.exited(self._child.pidfd))
        terminated = asyncio.ensure_future(self._terminated.wait())
        limit_s = self.request.limit_s
        await asyncio.wait({exit_, terminated}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        has_exited, was_terminated = exit_.done(), terminated.done()
        for waiting in (exit_, terminated):
            waiting.cancel()
        await asyncio.gather(exit_, terminated, return_exceptions=True)
        if has_exited:
            return None
        return "interrupted" if was_terminated else f"timed out after {limit_s:g} s"

    def _succeeded(self) -> bool:
        """Whether the hook, which has exited and is not reaped, exited with 0."""
        status = os.waitid(os.P_PIDFD, self._child.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return status is not None and (status.si_code, status.si_status) == (os.CLD_EXITED, 0)

    async def _reap(self) -> os.waitid_result | None:
        """Return the exit status, or None if the hook survived SIGKILL."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(group.exited(self._child.pidfd), STUCK_WAIT_S)
        return os.waitid(os.P_PIDFD, self._child.pidfd, os.WEXITED | os.WNOHANG)

    def _on_report(self, launched: Callable[[RunningAttempt], None]) -> None:
        now_ns = time.monotonic_ns()
        try:
            self._report = os.read(self._child.report_fd, 4096)
        except BlockingIOError:
            return
        asyncio.get_running_loop().remove_reader(self._child.report_fd)
        if not self._report:
            if self.request.kernel_time_ns is not None:
                self.latency_ms = round((now_ns - self.request.kernel_time_ns) / MS, 3)
            launched(self)

    def _leave_cgroup(self) -> None:
        if self._root.cgroup is not None:
            with contextlib.suppress(OSError):  # a process lives on in it: sweep_cgroups() tries again
                self._root.cgroup.rmdir()

    def _ending(self, overdue: str | None, survivors: int, status: os.waitid_result | None) -> Ending:
        exited = status is not None and status.si_code == os.CLD_EXITED
        code = status.si_status if status is not None and exited else None
        number = status.si_status if status is not None and not exited else None
        reason = overdue
        if self._report:
            reason = launch_failure(self._report, self.request)
            code = None  # 127 is the spare's, not the hook's
        elif overdue is None:
            reason = f"killed by {_name(number)}" if number is not None else f"exit code {code}" if code else None
        if survivors or status is None:
            reason = f"{reason}; {max(survivors, 1)} of its processes survived SIGKILL"
        duration_ms = round((time.monotonic_ns() - self.started_ns) / MS, 3)
        result = AttemptResult(reason, code, number, duration_ms, self.latency_ms)
        interrupted = overdue == "interrupted" and not self._report
        not_started = self._report is not None and self._report.startswith(b"unavailable ")
        return Ending(result, interrupted=interrupted, not_started=not_started, stuck=status is None)


def cgroup_name(request: LaunchRequest) -> str:
    """Return the name of the attempt's cgroup below the delegated one."""
    return f"job-{request.job_id}-{request.attempt}"


def sweep_cgroups(cgroup_dir: Path, running: Iterable[LaunchRequest] = ()) -> None:
    """Remove the empty cgroups of former attempts. The cgroup of a running attempt may be empty for a moment."""
    busy = {cgroup_name(request) for request in running}
    for cgroup in cgroup_dir.glob("job-*"):
        if cgroup.name not in busy:
            with contextlib.suppress(OSError):
                cgroup.rmdir()


def _on_output(output: Output) -> None:
    try:
        more = output.read()
    except BlockingIOError:
        return
    if not more:
        asyncio.get_running_loop().remove_reader(output.fd)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
