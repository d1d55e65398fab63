"""One try of a hook, from order to exit status.

Strategy: `launch` is synchronous and short (a spare becomes the hook beside us); `attend` is a task that waits for the
report of the exec, the exit (by pidfd), the time limit, or a call to cut it short, and ends the whole group when it
must. The hook is reaped last, when its group is gone, so that no PID of it can be someone else's.

What a hook that succeeded leaves running stays (it may have restarted a service); what one that failed leaves is ended
with it, before the next try can meet it.

Latency is the time from the kernel's timestamp to the report pipe's EOF, as the event loop sees it: the exec has
succeeded, the first instruction of the hook runs. It is an upper bound, by the loop's own delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cnprocd.launch import group, render
from cnprocd.launch.output import Output
from cnprocd.launch.program import Programs
from cnprocd.launch.spawn import Child, Order, Starter, launch_failure
from cnprocd.log import Log
from cnprocd.spool.job import Attempt, HookSpec, Identity, Job

TERM_GRACE_S = 5.0
STUCK_WAIT_S = 2.0  # a process that KILL does not end sits in the kernel: its slot is given free
MS = 1_000_000
Emit = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ending:
    """How the try ended. `interrupted` and `not_started` say that `attempt` is no verdict on the hook."""

    attempt: Attempt
    interrupted: bool = False
    not_started: bool = False  # there was nobody, or nothing, to start it with
    stuck: bool = False  # not even KILL ended it: it is still to be reaped


class Running(Protocol):
    """A hook that runs, here (Try) or in the runner service (remote.py)."""

    job: Job
    spec: HookSpec
    pid: int
    latency_ms: float | None

    @property
    def running_s(self) -> float: ...
    def cut(self, grace_s: float) -> None: ...
    async def attend(self, emit: Emit, launched: Callable[[Running], None]) -> Ending: ...


class Launcher(Protocol):
    """Where hooks are started: in this process (Here), or in the runner service (remote.py)."""

    def prepare(self, *, soon: bool = False) -> None: ...
    def close(self) -> None: ...
    def launch(
        self,
        job: Job,
        spec: HookSpec,
        who: Identity,
        attempt_id: str,
        *,
        limit_s: float,
        announce: Callable[[int], None],
    ) -> Running: ...


class Here:
    """Hooks as children of this process."""

    def __init__(self, log: Log, cgroup_dir: Path | None = None) -> None:
        self._starter = Starter(log)
        self._programs = Programs()
        self._cgroup_dir = cgroup_dir
        self.prepare = self._starter.prepare
        self.close = self._starter.close

    def launch(
        self,
        job: Job,
        spec: HookSpec,
        who: Identity,
        attempt_id: str,
        *,
        limit_s: float,
        announce: Callable[[int], None],
    ) -> Try:
        return launch(
            self._starter,
            self._programs,
            job,
            spec,
            who,
            attempt_id,
            limit_s=limit_s,
            cgroup_dir=self._cgroup_dir,
            announce=announce,
        )


class Try:
    """A hook that runs. Made by launch(); attend() waits for its end; cut() ends it early."""

    def __init__(self, job: Job, spec: HookSpec, order: Order, child: Child, root: group.Root, limit_s: float) -> None:
        self.job = job
        self.spec = spec
        self.pid = child.pid
        self.started_ns = time.monotonic_ns()
        self.latency_ms: float | None = None
        self._order = order
        self._child = child
        self._root = root
        self._limit_s = limit_s
        self._grace_s = TERM_GRACE_S
        self._cut = asyncio.Event()
        self._report: bytes | None = None

    @property
    def running_s(self) -> float:
        """How long it runs by now."""
        return (time.monotonic_ns() - self.started_ns) / 1e9

    def cut(self, grace_s: float) -> None:
        """End it now: TERM, and KILL after `grace_s`."""
        self._grace_s = grace_s
        self._cut.set()

    async def attend(self, emit: Emit, launched: Callable[[Running], None]) -> Ending:
        """Wait for the end. `emit` gets each line of output, `launched` is called when the program runs."""
        loop = asyncio.get_running_loop()
        output = Output(self._child.output_fd, self.spec.output_limit_bytes, emit)
        loop.add_reader(self._child.report_fd, self._on_report, launched)
        loop.add_reader(output.fd, _on_output, output)
        try:
            overdue = await self._until_end()
            survivors = 0 if overdue is None and self._succeeded() else await group.end(self._root, self._grace_s)
            status = await self._reap()
        finally:
            loop.remove_reader(self._child.report_fd)
            loop.remove_reader(output.fd)
        if self._report is None:
            self._on_report(launched)
        output.finish()
        self._child.close()
        self._leave_cgroup()
        return self._ending(overdue, survivors, status)

    async def _until_end(self) -> str | None:
        """None when the hook exited by itself, else why it must end now."""
        exit_ = asyncio.ensure_future(group.exited(self._child.pidfd))
        cut = asyncio.ensure_future(self._cut.wait())
        await asyncio.wait({exit_, cut}, timeout=self._limit_s, return_when=asyncio.FIRST_COMPLETED)
        ended, was_cut = exit_.done(), cut.done()
        for waiting in (exit_, cut):
            waiting.cancel()
        await asyncio.gather(exit_, cut, return_exceptions=True)
        if ended:
            return None
        return "interrupted" if was_cut else f"timed out after {self._limit_s:g} s"

    def _succeeded(self) -> bool:
        """Whether the hook, which has exited and is not reaped, did so with 0."""
        status = os.waitid(os.P_PIDFD, self._child.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return status is not None and (status.si_code, status.si_status) == (os.CLD_EXITED, 0)

    async def _reap(self) -> os.waitid_result | None:
        """The exit status; None when not even KILL ended it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(group.exited(self._child.pidfd), STUCK_WAIT_S)
        return os.waitid(os.P_PIDFD, self._child.pidfd, os.WEXITED | os.WNOHANG)

    def _on_report(self, launched: Callable[[Running], None]) -> None:
        now_ns = time.monotonic_ns()
        try:
            self._report = os.read(self._child.report_fd, 4096)
        except BlockingIOError:
            return
        asyncio.get_running_loop().remove_reader(self._child.report_fd)
        if not self._report:
            if self.job.kernel_time_ns is not None:
                self.latency_ms = round((now_ns - self.job.kernel_time_ns) / MS, 3)
            launched(self)

    def _leave_cgroup(self) -> None:
        if self._root.cgroup is not None:
            with contextlib.suppress(OSError):  # something lives on in it: sweep_cgroups() tries again
                self._root.cgroup.rmdir()

    def _ending(self, overdue: str | None, survivors: int, status: os.waitid_result | None) -> Ending:
        exited = status is not None and status.si_code == os.CLD_EXITED
        code = status.si_status if status is not None and exited else None
        number = status.si_status if status is not None and not exited else None
        reason = overdue
        if self._report:
            reason = launch_failure(self._report, self._order)
            code = None  # 127 is the spare's, not the hook's
        elif overdue is None:
            reason = f"killed by {_name(number)}" if number is not None else f"exit code {code}" if code else None
        if survivors or status is None:
            reason = f"{reason}, and {max(survivors, 1)} of its processes could not be ended"
        attempt = Attempt(reason, code, number, round((time.monotonic_ns() - self.started_ns) / MS, 3), self.latency_ms)
        interrupted = overdue == "interrupted" and not self._report
        return Ending(attempt, interrupted=interrupted, stuck=status is None)


def launch(
    starter: Starter,
    programs: Programs,
    job: Job,
    spec: HookSpec,
    who: Identity,
    attempt_id: str,
    *,
    limit_s: float,
    cgroup_dir: Path | None,
    announce: Callable[[int], None],
) -> Try:
    """Start the hook of a job. Raises HookRefusedError (it may not be started) or OSError (it cannot be, now)."""
    program = programs.open(_text(spec))
    cgroup, procs_fd = None, None
    try:
        if cgroup_dir is not None:
            cgroup = cgroup_dir / cgroup_name(job)
            cgroup.mkdir(exist_ok=True)
            procs_fd = os.open(cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        order = Order(
            program=program,
            argv=render.argv(spec, job),
            env=render.environment(spec, job, who, attempt_id),
            standard_input=render.standard_input(job),
            identity=who,
            directory=spec.working_directory,
            umask=spec.umask,
            nice=spec.nice,
            limits=spec.limits,
            cgroup_procs_fd=procs_fd,
        )
        child = starter.spawn(order, announce)
    finally:
        os.close(program.fd)
        if procs_fd is not None:
            os.close(procs_fd)
    return Try(job, spec, order, child, group.Root(child.pid, None, attempt_id, cgroup), limit_s)


def cgroup_name(job: Job) -> str:
    """The cgroup of a job's current try, below the delegated one."""
    return f"job-{job.job_id}-{job.attempts}"


def sweep_cgroups(cgroup_dir: Path, running: Iterable[Job] = ()) -> None:
    """Remove the cgroups of former tries that are empty by now. One that is about to be entered is empty, too."""
    busy = {cgroup_name(job) for job in running}
    for cgroup in cgroup_dir.glob("job-*"):
        if cgroup.name not in busy:
            with contextlib.suppress(OSError):
                cgroup.rmdir()


def _text(spec: HookSpec) -> str:
    """The program: the rule language accepts no fields in it."""
    return "".join(part for part in spec.command[0].parts if isinstance(part, str))


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
