"""Find and end all processes that a hook started.

With a delegated cgroup, cgroup.procs lists them and cgroup.kill ends them (cgroup v2). Without one, a process belongs
to a hook if it is in the hook's session or process group, if it descends from the hook by parent PIDs, or if its
environment carries the hook's CNPROCD_ATTEMPT_ID. Children inherit those 128 random bits even through setsid and double
fork. (Jenkins' ProcessTreeKiller does the same.) Without a cgroup, a process that does all of setsid, double fork and
clearing its environment is not found.

Facts:
- A PID is safe to signal only while it cannot be reused. Processes are signalled through pidfds, and the start time is
  compared again after the pidfd is open (proc_pid_stat(5), field 22). The hook itself is not reaped before its group
  has ended, so its PID, session and process group cannot be reused meanwhile.
- kill(-pgid) is atomic against fork (both take the tasklist lock; a fork with a signal pending is restarted), so one
  call ends a fork bomb that stays in its process group. The others are stopped until no new one is found, then killed.
  A stopped process cannot fork, and RLIMIT_NPROC still counts it.
- A process can make a read of its files wait, so another process reads them (process_reader.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cnprocd.launch.process_reader import ProcessReader, Seen

MOST_ROUNDS = 50
KILL_WAIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Root:
    """Where to start looking for a hook's processes. `start_ticks` is None for an unreaped child of this process."""

    pid: int | None
    start_ticks: int | None
    attempt_id: str
    cgroup: Path | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A living process. Its start time distinguishes it from a later process with the same PID; None: unknown."""

    pid: int
    start_ticks: int | None


async def members(root: Root, reader: ProcessReader) -> list[Member]:
    """Return the living processes of the hook, including the hook itself."""
    if root.cgroup is not None:
        found = await reader.some(_cgroup_pids(root.cgroup))
        return [Member(seen.pid, seen.start_ticks) for seen in found if seen.alive]
    leader = next(iter(await reader.some([root.pid])), None) if root.pid is not None else None
    is_sure = leader is not None and root.start_ticks in (None, leader.start_ticks)
    oldest = leader.start_ticks or 0 if is_sure and leader is not None else 0
    processes = await reader.all(f"CNPROCD_ATTEMPT_ID={root.attempt_id}", oldest)
    ours = _family(root.pid if is_sure else None, processes)
    return [Member(pid, processes[pid].start_ticks) for pid in ours if processes[pid].alive]


async def end(root: Root, grace_s: float, reader: ProcessReader) -> int:
    """Send SIGTERM to all, and SIGKILL to those that live after the grace. Return how many survived."""
    found = await members(root, reader)
    if not found:
        return 0
    with await _signalled(found, signal.SIGTERM, reader) as watched:
        await watched.gone(grace_s)
    if not await members(root, reader):
        return 0
    if root.cgroup is not None:
        with contextlib.suppress(OSError):
            (root.cgroup / "cgroup.kill").write_text("1")
    if root.pid is not None and root.start_ticks is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(root.pid, signal.SIGKILL)
    stopped: set[Member] = set()
    for _ in range(MOST_ROUNDS):
        new = set(await members(root, reader)) - stopped
        if not new:
            break
        with await _signalled(new, signal.SIGSTOP, reader):
            stopped |= new
    with await _signalled(stopped, signal.SIGKILL, reader) as watched:
        await watched.gone(KILL_WAIT_S)
    return len(await members(root, reader))


async def exited(pidfd: int) -> None:
    """Wait until the process behind a pidfd has exited. It is not reaped."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(pidfd, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(pidfd)


async def _signalled(targets: Collection[Member], number: int, reader: ProcessReader) -> _Watched:
    """Signal processes through pidfds. Each is read once more behind its pidfd: its PID may have been reused."""
    watched = _Watched()
    for member in targets:
        with contextlib.suppress(OSError):
            watched.pidfds[member.pid] = os.pidfd_open(member.pid)
    now = {seen.pid: Member(seen.pid, seen.start_ticks) for seen in await reader.some(list(watched.pidfds))}
    for member in targets:
        pidfd = watched.pidfds.get(member.pid)
        if pidfd is None:
            continue
        with contextlib.suppress(OSError):
            if now.get(member.pid) == member:
                signal.pidfd_send_signal(pidfd, number)
                continue
        os.close(watched.pidfds.pop(member.pid))
    return watched


class _Watched:
    """The pidfds of processes, held until the block ends."""

    def __init__(self) -> None:
        self.pidfds: dict[int, int] = {}

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        for pidfd in self.pidfds.values():
            os.close(pidfd)

    async def gone(self, bound_s: float) -> None:
        """Wait until all have exited, at most for `bound_s`."""
        waits = [asyncio.ensure_future(exited(pidfd)) for pidfd in self.pidfds.values()]
        if waits:
            _, late = await asyncio.wait(waits, timeout=bound_s)
            for wait in late:
                wait.cancel()
            await asyncio.gather(*late, return_exceptions=True)


def _family(leader: int | None, processes: Mapping[int, Seen]) -> set[int]:
    """Return the PIDs that belong to the hook."""
    ours = {
        seen.pid
        for seen in processes.values()
        if seen.marked or (leader is not None and leader in (seen.pid, seen.session, seen.pgrp))
    }
    grown = True
    while grown:  # a parent may have a higher PID than its child: repeat until nothing is added
        children = {seen.pid for seen in processes.values() if seen.ppid in ours} - ours
        ours |= children
        grown = bool(children)
    return ours


def _cgroup_pids(cgroup: Path) -> Iterator[int]:
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError):
            yield from map(int, Path(directory, "cgroup.procs").read_text(encoding="ascii").split())
