"""Everything that a hook started: finding it, ending it, reaping it.

Strategy: where a delegated cgroup is given, it knows (cgroup v2, cgroup.procs and cgroup.kill). Elsewhere a process
belongs to a hook when any of this holds: it is in the hook's session, it descends from the hook by parent PIDs, or its
environment carries the hook's CNPROCD_ATTEMPT_ID, 128 random bits that children inherit even through setsid and double
fork. (Jenkins' ProcessTreeKiller finds what builds leave behind in the same way.) A process that does all of setsid,
double fork and clearing its environment gets away; only the cgroup holds that one.

Facts:
- A PID is only safe to signal while it cannot be reused: processes are signalled through pidfds, and the start time is
  compared once more after the pidfd is open (proc_pid_stat(5), field 22). The hook itself is not reaped before its
  group is ended, so its PID, session and process group cannot be taken over meanwhile.
- kill(-pgid) is atomic against fork (both take the tasklist lock; a fork with a signal pending is restarted), so a fork
  bomb that stays in its process group dies in one call. For the rest: stop everything that is found until nothing new
  is found, then kill. What is stopped cannot fork, and RLIMIT_NPROC counts it as before.
- Reading all of /proc takes 20 to 30 microseconds a process: the loop is yielded to every 200.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_ROUNDS = 50
KILL_WAIT_S = 2.0
_SCAN_BATCH = 200


@dataclass(frozen=True, slots=True)
class Root:
    """A hook, as its group is found. `start_ticks` None: the PID is surely still its own (our child, not reaped)."""

    pid: int | None
    start_ticks: int | None
    attempt_id: str
    cgroup: Path | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A living process, and its start time that tells it from a later owner of its PID."""

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
    """Everything of the hook's that lives, the hook itself included."""
    if root.cgroup is not None:
        found = (_stat(pid) for pid in _cgroup_pids(root.cgroup))
        return [Member(stat.pid, stat.start_ticks) for stat in found if stat is not None and stat.alive]
    stats = await _scan()
    ours = _family(root, stats)
    return [Member(pid, stats[pid].start_ticks) for pid in ours if stats[pid].alive]


async def end(root: Root, grace_s: float) -> int:
    """TERM to everything, and after the grace KILL to what is left. Returns how many survived even that."""
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


def reap_strangers(known: Collection[int]) -> list[int]:
    """Reap our dead children that are not `known`: orphans handed to us as a subreaper. Returns their PIDs.

    waitid(P_ALL) would take a hook's exit status from under the runner, and with WNOWAIT always shows the same one.
    """
    try:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN: they stay zombies until we end
        return []
    reaped = []
    for pid in map(int, children):
        if pid not in known:
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None:
                    reaped.append(pid)
    return reaped


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none."""
    found = _stat(pid)
    return None if found is None else found.start_ticks


async def exited(pidfd: int) -> None:
    """Return when the process behind a pidfd has exited. It is not reaped."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(pidfd, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(pidfd)


class _Watched:
    """Processes that were sent a signal, held by pidfd until the block ends."""

    def __init__(self, targets: Iterable[Member], number: int) -> None:
        self._pidfds = [pidfd for member in targets if (pidfd := _open_and_send(member, number)) is not None]

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        for pidfd in self._pidfds:
            os.close(pidfd)

    async def gone(self, bound_s: float) -> None:
        """Wait until all have exited, or for `bound_s`."""
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
    """The PIDs that belong to the hook."""
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
    while grown:  # parents are not always older or of lower PID than their children: go on until nothing is added
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
        fields = raw[raw.rindex(b")") + 2 :].split()  # comm may hold anything, brackets and blanks too
        return _Stat(pid, fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
