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
- Reading all of /proc takes 20 to 30 microseconds a process: the scan yields to the loop every 200 processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_ROUNDS = 50
KILL_WAIT_S = 2.0
_SCAN_BATCH = 200


@dataclass(frozen=True, slots=True)
class Root:
    """Where to start looking for a hook's processes. `start_ticks` is None for an unreaped child of this process."""

    pid: int | None
    start_ticks: int | None
    attempt_id: str
    cgroup: Path | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A living process. Its start time distinguishes it from a later process with the same PID."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class _Stat:
    pid: int
    state: str
    ppid: int
    pgrp: int
    session: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        return self.state not in "ZXx"


async def members(root: Root) -> list[Member]:
    """Return the living processes of the hook, including the hook itself."""
    if root.cgroup is not None:
        found = (_stat(pid) for pid in _cgroup_pids(root.cgroup))
        return [Member(stat.pid, stat.start_ticks) for stat in found if stat is not None and stat.alive]
    stats = await _scan()
    ours = _family(root, stats)
    return [Member(pid, stats[pid].start_ticks) for pid in ours if stats[pid].alive]


async def end(root: Root, grace_s: float) -> int:
    """Send SIGTERM to all, and SIGKILL to those that live after the grace. Return how many survived."""
    found = await members(root)
    if not found:
        return 0
    with _Watched(found, signal.SIGTERM) as watched:
        await watched.gone(grace_s)
    if not await members(root):
        return 0
    if root.cgroup is not None:
        with contextlib.suppress(OSError):
            (root.cgroup / "cgroup.kill").write_text("1")
    if root.pid is not None and root.start_ticks is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(root.pid, signal.SIGKILL)
    stopped: set[Member] = set()
    for _ in range(MOST_ROUNDS):
        new = set(await members(root)) - stopped
        if not new:
            break
        for member in new:
            _send(member, signal.SIGSTOP)
        stopped |= new
    with _Watched(stopped, signal.SIGKILL) as watched:
        await watched.gone(KILL_WAIT_S)
    return len(await members(root))


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None if there is no such process."""
    found = _stat(pid)
    return None if found is None else found.start_ticks


async def exited(pidfd: int) -> None:
    """Wait until the process behind a pidfd has exited. It is not reaped."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(pidfd, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(pidfd)


class _Watched:
    """Signal processes, and hold their pidfds until the block ends."""

    def __init__(self, targets: Iterable[Member], number: int) -> None:
        self._pidfds = [pidfd for member in targets if (pidfd := _open_and_send(member, number)) is not None]

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        for pidfd in self._pidfds:
            os.close(pidfd)

    async def gone(self, bound_s: float) -> None:
        """Wait until all have exited, at most for `bound_s`."""
        waits = [asyncio.ensure_future(exited(pidfd)) for pidfd in self._pidfds]
        if waits:
            _, late = await asyncio.wait(waits, timeout=bound_s)
            for wait in late:
                wait.cancel()
            await asyncio.gather(*late, return_exceptions=True)


def _open_and_send(member: Member, number: int) -> int | None:
    try:
        pidfd = os.pidfd_open(member.pid)
    except OSError:
        return None
    if start_ticks(member.pid) == member.start_ticks:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(pidfd, number)
            return pidfd
    os.close(pidfd)
    return None


def _send(member: Member, number: int) -> None:
    pidfd = _open_and_send(member, number)
    if pidfd is not None:
        os.close(pidfd)


def _family(root: Root, stats: dict[int, _Stat]) -> set[int]:
    """Return the PIDs that belong to the hook."""
    leader = stats.get(root.pid) if root.pid is not None else None
    sure = leader is not None and root.start_ticks in (None, leader.start_ticks)
    mark = f"CNPROCD_ATTEMPT_ID={root.attempt_id}".encode()
    oldest = leader.start_ticks if sure and leader is not None else 0
    ours = {
        stat.pid
        for stat in stats.values()
        if (sure and root.pid in (stat.pid, stat.session, stat.pgrp))
        or (stat.start_ticks >= oldest and stat.alive and mark in _environment(stat.pid))
    }
    grown = True
    while grown:  # a parent may have a higher PID than its child: repeat until nothing is added
        children = {stat.pid for stat in stats.values() if stat.ppid in ours} - ours
        ours |= children
        grown = bool(children)
    return ours


async def _scan() -> dict[int, _Stat]:
    stats: dict[int, _Stat] = {}
    for index, pid in enumerate(_pids()):
        found = _stat(pid)
        if found is not None:
            stats[pid] = found
        if index % _SCAN_BATCH == _SCAN_BATCH - 1:
            await asyncio.sleep(0)
    stats.pop(os.getpid(), None)
    return stats


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _cgroup_pids(cgroup: Path) -> Iterator[int]:
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError):
            yield from map(int, Path(directory, "cgroup.procs").read_text(encoding="ascii").split())


def _stat(pid: int) -> _Stat | None:
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
        fields = raw[raw.rindex(b")") + 2 :].split()  # comm may hold anything, including brackets and blanks
        return _Stat(pid, fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
