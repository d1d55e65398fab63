"""/proc as it is read to find the processes of hooks: by a worker process, because any process can make a read wait.

A process whose files do not answer within READ_S is set aside until it ends: its parent, group and session come from
its `status`, which takes no lock; its start time and environment are unknown. One scan waits at most SCAN_S in all.
Nothing on the event loop waits for a scan.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cnprocd.edge import Edge, Limits, Missed
from cnprocd.launch import process_child
from cnprocd.process.pidfd_watch import PidfdWatch
from cnprocd.worker import ChildWorker

READ_S = 1.0  # far more than a read takes: a busy machine must hide no process
SCAN_S = 4.0
MOST_SET_ASIDE = 256
_LIMITS = Limits(deadline_s=READ_S, replacements=4)


@dataclass(frozen=True, slots=True)
class Seen:
    """A process as /proc showed it. `start_ticks` is None if its files did not answer."""

    pid: int
    alive: bool
    ppid: int
    pgrp: int
    session: int
    start_ticks: int | None
    marked: bool = False


class ProcessReader:
    """Reads /proc for group.py. The worker process starts at the first scan. Belongs to the event loop."""

    def __init__(self) -> None:
        self._edge: Edge[bytes, bytes] | None = None
        self._set_aside: dict[int, PidfdWatch] = {}
        self._turn = asyncio.Lock()  # one scan at a time: a piece that waits would be taken for one that hangs

    @property
    def edge(self) -> Edge[bytes, bytes]:
        """The worker process, of the running event loop."""
        if self._edge is None:
            script = Path(process_child.__file__)
            self._edge = Edge("hook processes", lambda: ChildWorker(script), _LIMITS, asyncio.get_running_loop())
        return self._edge

    async def all(self, mark: str = "", oldest: int = 0) -> dict[int, Seen]:
        """Return every process but this one. Those that carry `mark` in their environment are `marked`.

        No process that started before `oldest` carries it.
        """
        pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
        found = await self.some((pid for pid in pids if pid != os.getpid()), mark, oldest)
        return {seen.pid: seen for seen in found}

    async def some(self, pids: Iterable[int], mark: str = "", oldest: int = 0) -> list[Seen]:
        """Return those of these processes that exist."""
        head = process_child.REQUEST.pack(oldest, len(mark)) + mark.encode()
        async with self._turn:
            deadline_s = time.monotonic() + SCAN_S
            asked: list[int] = []
            found: list[Seen] = []
            for pid in pids:
                if self._is_set_aside(pid):
                    found += unread(pid)
                else:
                    asked.append(pid)
            for start in range(0, len(asked), process_child.MOST_PIDS):
                batch = asked[start : start + process_child.MOST_PIDS]
                rows = await self._read(batch, head, deadline_s)
                if isinstance(rows, bytes):
                    found += self._each(batch, rows)
                else:
                    found += await self._one_by_one(batch, head, deadline_s)
        return found

    def close(self) -> None:
        """End the worker process."""
        if self._edge is not None:
            self._edge.close()
        self._set_aside.clear()

    async def _one_by_one(self, pids: list[int], head: bytes, deadline_s: float) -> list[Seen]:
        """Read processes one of which hangs, and set that one aside."""
        found: list[Seen] = []
        for pid in pids:
            rows = await self._read([pid], head, deadline_s)
            if isinstance(rows, bytes):
                found += self._each([pid], rows)
                continue
            if rows is Missed.LATE:
                self._put_aside(pid)
            found += unread(pid)
        return found

    async def _read(self, pids: list[int], head: bytes, deadline_s: float) -> bytes | Missed:
        """Return the rows of these processes, or why there are none. REFUSED: SCAN_S is over, or there is no worker."""
        answered: asyncio.Future[bytes | Missed] = asyncio.get_running_loop().create_future()
        request = head + struct.pack(f"={len(pids)}I", *pids)
        if time.monotonic() >= deadline_s or not self.edge.submit(request, answered.set_result):
            return Missed.REFUSED
        return await asyncio.shield(answered)

    @staticmethod
    def _each(pids: list[int], rows: bytes) -> list[Seen]:
        return [
            Seen(pid, state not in process_child.DEAD, ppid, pgrp, session, ticks, marked)
            for pid, (state, ppid, pgrp, session, ticks, marked) in zip(
                pids, process_child.ROW.iter_unpack(rows), strict=True
            )
            if state != b"\0"
        ]

    def _is_set_aside(self, pid: int) -> bool:
        if pid in self._set_aside and not self._set_aside[pid].is_alive():
            del self._set_aside[pid]
        return pid in self._set_aside

    def _put_aside(self, pid: int) -> None:
        if len(self._set_aside) < MOST_SET_ASIDE:
            with contextlib.suppress(OSError):
                self._set_aside[pid] = PidfdWatch(pid)


def unread(pid: int) -> list[Seen]:
    """Return what `status` shows of a process whose other files do not answer; nothing if it is gone."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        return []
    fields = {key: value.split() for key, _, value in (line.partition(b":") for line in reversed(lines))}
    ppid, pgrp, session = (int(fields[key][0]) if fields.get(key) else 0 for key in (b"PPid", b"NSpgid", b"NSsid"))
    return [Seen(pid, fields[b"State"][0] not in process_child.DEAD, ppid, pgrp, session, start_ticks=None)]
