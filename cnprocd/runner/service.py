"""The runner service: starts hooks for the reader, as root, outside the reader's sandbox.

Strategy: one connection from the reader's user is served at a time; a later one (the reader was restarted) waits until
every hook of the one before it has ended, so no two tries of a job ever run at once. A connection that ends takes its
hooks with it: the reader's spool still has their jobs. When nobody has been connected for a while, serve() returns, and
systemd starts it again with the next connection, which its socket keeps meanwhile.

Trust: the kernel says who connected (SO_PEERCRED). All that is taken from the reader is a rule's name and events, as
strict.py lets through; what is run, as whom, and for how long at most comes from `specs`, the root-owned rules. No
spare process is kept ready (Here.prepare): the reader could not know it for a hook before it was one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from cnprocd.errors import CnprocdError
from cnprocd.launch.attempt import TERM_GRACE_S, Here, Running, sweep_cgroups
from cnprocd.launch.identity import resolve
from cnprocd.launch.program import HookRefusedError
from cnprocd.log import Log
from cnprocd.runner import wire
from cnprocd.runner import wire_validate as strict
from cnprocd.spool.job import HookSpec

IDLE_S = 30.0
MOST_TRIES = 1024  # at once; the reader's own slots are far fewer
MOST_READERS = 16  # connected at once: one is served, the others wait; a thousand would use up our descriptors
STOP_BOUND_S = 30.0
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid

Specs = Callable[[], Mapping[str, HookSpec]]


class Service:
    """Accepts readers on `listener` and runs what they name."""

    def __init__(
        self, listener: socket.socket, specs: Specs, allowed: Collection[int], log: Log, cgroup_dir: Path | None
    ) -> None:
        self._listener = listener
        self._specs = specs
        self._allowed = frozenset(allowed)
        self._log = log
        self._cgroup_dir = cgroup_dir
        self._here = Here(log, cgroup_dir)
        self._served: set[asyncio.Task[None]] = set()
        self._tries: set[Running] = set()
        self._stop = asyncio.Event()
        self._idle_s = IDLE_S
        self._resting: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Accept nobody more, and let serve() return when the hooks have ended."""
        self._stop.set()

    async def serve(self, idle_s: float = IDLE_S) -> None:
        """Until stop(), or until nobody has been connected for `idle_s`."""
        self._idle_s = idle_s
        self._listener.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listener, self._accept)
        self._rest()
        await self._stop.wait()
        # Who connects from now on stays in the socket's backlog, and systemd starts us again for it.
        loop.remove_reader(self._listener)
        await self._finish()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # it went away again
            return
        if len(self._served) >= MOST_READERS:
            connection.close()
            return
        if self._resting is not None:
            self._resting.cancel()
        task = asyncio.ensure_future(self._serve_one(connection, list(self._served)))
        self._served.add(task)
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._served.discard(task)
        if not self._served:
            self._rest()

    def _rest(self) -> None:
        self._resting = asyncio.get_running_loop().call_later(self._idle_s, self.stop)

    async def _finish(self) -> None:
        """Running hooks get a bound, then TERM and KILL."""
        if self._served and self._tries:
            await asyncio.wait(list(self._served), timeout=STOP_BOUND_S)
        for one in self._tries:
            one.cut(TERM_GRACE_S)
        for task in list(self._served):
            task.cancel()
        await asyncio.gather(*self._served, return_exceptions=True)
        self._here.close()
        if self._cgroup_dir is not None:
            sweep_cgroups(self._cgroup_dir)

    async def _serve_one(self, connection: socket.socket, earlier: list[asyncio.Task[None]]) -> None:
        with connection:
            uid = peer_uid(connection)
            if uid not in self._allowed:
                self._log("error", "runner_refused", uid=uid, message=f"uid {uid} may not use the runner")
                return
            if earlier:
                await asyncio.wait(earlier)
            await Session(connection, self._here, self._specs, self._tries, self._log).run()


class Session:
    """One connected reader."""

    def __init__(self, connection: socket.socket, here: Here, specs: Specs, tries: set[Running], log: Log) -> None:
        self._connection = connection
        self._here = here
        self._specs = specs
        self._all = tries
        self._log = log
        self._mine: dict[int, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the reader goes; its hooks go with it."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        buffer = bytearray()
        try:
            self._send(wire.Hello(version=wire.VERSION, pid=os.getpid()))
            while data := await reader.read(1 << 18):
                buffer += data
                for body in wire.bodies(buffer):
                    self._hear(strict.from_reader(body))
        except (wire.WireError, ConnectionError) as error:
            self._log("error", "runner_protocol", message=f"the reader was cut off: {error}")
        finally:
            await asyncio.shield(self._end())

    async def _end(self) -> None:
        for one in self._mine.values():
            one.cut(TERM_GRACE_S)
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._writer.close()

    def _hear(self, message: wire.FromReader) -> None:
        match message:
            case wire.Hello():
                if message.version != wire.VERSION:
                    raise wire.WireError(f"it speaks version {message.version}, we speak {wire.VERSION}")
            case wire.Run():
                self._begin(message)
            case wire.Cut():
                one = self._mine.get(message.try_id)
                if one is not None:
                    one.cut(message.grace_s)

    def _begin(self, wanted: wire.Run) -> None:
        """Start a hook, or say why not. The rule decides; the reader may only ask for less time."""
        try_id = wanted.try_id
        if try_id in self._mine:
            raise wire.WireError(f"try {try_id} was named twice")
        if len(self._all) >= MOST_TRIES:
            self._send(wire.NotNow(try_id=try_id, reason=f"{MOST_TRIES} hooks run already"))
            return
        try:
            spec = self._specs().get(wanted.rule)
            if spec is None:
                raise HookRefusedError(f"the runner knows no rule {wanted.rule!r} with a hook")
            one = self._here.launch(
                wanted.job(),
                spec,
                resolve(spec.user, spec.group),
                wanted.attempt_id,
                limit_s=min(wanted.limit_s, spec.timeout_s),
                announce=lambda pid: self._send(wire.Announced(try_id=try_id, hook_pid=pid)),
            )
        except CnprocdError as error:  # rules that cannot be read now, or a hook that may not be started
            self._send(wire.Ended(try_id=try_id, reason=error.what))
        except OSError as error:
            self._send(wire.NotNow(try_id=try_id, reason=str(error)))
        else:
            self._mine[try_id] = one
            self._all.add(one)
            task = asyncio.ensure_future(self._attend(try_id, one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _attend(self, try_id: int, one: Running) -> None:
        def launched(one: Running) -> None:
            self._send(wire.Launched(try_id=try_id, latency_ms=one.latency_ms))

        try:
            ending = await one.attend(lambda line: self._send(wire.Output(try_id=try_id, line=line)), launched)
        finally:
            del self._mine[try_id]
            self._all.discard(one)
        verdict = ending.attempt
        self._send(
            wire.Ended(
                try_id=try_id,
                reason=verdict.reason,
                exit_code=verdict.exit_code,
                signal=verdict.signal,
                duration_ms=verdict.duration_ms,
                latency_ms=verdict.latency_ms,
                interrupted=ending.interrupted,
            )
        )

    def _send(self, message: wire.Message) -> None:
        """Hooks' output is capped, so the writer's buffer is too. A reader that is gone is told nothing."""
        with contextlib.suppress(OSError):
            self._writer.write(wire.frame(message))


def peer_uid(connection: socket.socket) -> int:
    """Who connected, as the kernel knows it."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])


def delegated_cgroup() -> Path | None:
    """Our own cgroup, if it is delegated to us, with ourselves moved into a leaf below it; None without cgroup v2.

    Delegate=yes gives the unit's cgroup; processes may only be in its leaves (cgroups(7), "no internal processes").
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::/"):
            own = Path("/sys/fs/cgroup", line[4:])
            try:
                (own / "cgroup.procs").stat()  # on a hybrid system that directory may be no cgroup
                (own / "runner").mkdir(exist_ok=True)
                (own / "runner" / "cgroup.procs").write_text(str(os.getpid()))
            except OSError:
                return None
            return own
    return None
