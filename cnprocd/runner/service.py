"""The runner: a service that starts hooks for the daemon, as root, outside the daemon's sandbox.

It serves one connection at a time. A later one (of a restarted daemon) waits until every hook of the one before it has
ended, so two attempts of one job never run at once. When a connection ends, its hooks are ended: their jobs are still
in the daemon's spool. After a while without a connection serve() returns. systemd's socket keeps the next connection
and starts the runner again.

Trust: SO_PEERCRED identifies the peer. From the daemon the runner takes only a rule's name and events, checked by
wire_validate.py. The program, the user and the time limit come from the root-owned rules (`hooks`). The runner keeps no
spare process ready: the daemon could not register it as a hook before it exists.
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
from cnprocd.launch.attempt import TERM_GRACE_S, Launcher, LocalLauncher, RunningAttempt, sweep_cgroups
from cnprocd.launch.program import HookRefusedError
from cnprocd.launch.request import LaunchRequest
from cnprocd.launch.user import ResolveUser, resolve_user
from cnprocd.log import Log
from cnprocd.rules.ruleset import Hook
from cnprocd.runner import wire
from cnprocd.runner.wire_validate import from_daemon

IDLE_S = 30.0
MOST_ATTEMPTS = 1024  # at once; the daemon's own slots are far fewer
MOST_CONNECTIONS = 16  # one is served, the others wait; more could exhaust the descriptors
STOP_BOUND_S = 30.0
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid

Hooks = Callable[[], Mapping[str, Hook]]


class Service:
    """Accepts connections on `listener` and runs the hooks that they name. `hooks` returns them by rule."""

    def __init__(
        self,
        listener: socket.socket,
        hooks: Hooks,
        allowed: Collection[int],
        log: Log,
        cgroup_dir: Path | None,
        resolve_user: ResolveUser = resolve_user,
    ) -> None:
        """`resolve_user` raises OSError if it has no answer now."""
        self._listener = listener
        self._hooks = hooks
        self._allowed = frozenset(allowed)
        self._log = log
        self._cgroup_dir = cgroup_dir
        self._launcher = LocalLauncher(log, cgroup_dir)
        self._resolve_user = resolve_user
        self._served: set[asyncio.Task[None]] = set()
        self._attempts: set[RunningAttempt] = set()
        self._stop = asyncio.Event()
        self._idle_s = IDLE_S
        self._idle_timer: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Accept no more connections, and let serve() return when the hooks have ended."""
        self._stop.set()

    async def serve(self, idle_s: float = IDLE_S) -> None:
        """Serve until stop(), or until `idle_s` have passed without a connection."""
        self._idle_s = idle_s
        self._listener.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listener, self._accept)
        self._start_idle_timer()
        await self._stop.wait()
        # A later connection stays in the socket's backlog, and systemd starts the runner again for it.
        loop.remove_reader(self._listener)
        await self._finish()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # the peer has closed it again
            return
        if len(self._served) >= MOST_CONNECTIONS:
            connection.close()
            return
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        task = asyncio.ensure_future(self._serve_one(connection, list(self._served)))
        self._served.add(task)
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._served.discard(task)
        if not self._served:
            self._start_idle_timer()

    def _start_idle_timer(self) -> None:
        self._idle_timer = asyncio.get_running_loop().call_later(self._idle_s, self.stop)

    async def _finish(self) -> None:
        """Wait for running hooks within STOP_BOUND_S, then end them."""
        if self._served and self._attempts:
            await asyncio.wait(list(self._served), timeout=STOP_BOUND_S)
        for attempt in self._attempts:
            attempt.terminate(TERM_GRACE_S)
        for task in list(self._served):
            task.cancel()
        await asyncio.gather(*self._served, return_exceptions=True)
        self._launcher.close()
        if self._cgroup_dir is not None:
            sweep_cgroups(self._cgroup_dir)

    async def _serve_one(self, connection: socket.socket, earlier: list[asyncio.Task[None]]) -> None:
        with connection:
            uid = peer_uid(connection)
            if uid not in self._allowed:
                message = f"refused a connection of uid {uid}: it may not use the runner"
                self._log("error", "runner_refused", uid=uid, message=message)
                return
            if earlier:
                await asyncio.wait(earlier)
            await Session(connection, self._launcher, self._hooks, self._attempts, self._log, self._resolve_user).run()


class Session:
    """One connection of the daemon. `attempts` are those of all connections."""

    def __init__(
        self,
        connection: socket.socket,
        launcher: Launcher,
        hooks: Hooks,
        attempts: set[RunningAttempt],
        log: Log,
        resolve_user: ResolveUser,
    ) -> None:
        self._connection = connection
        self._launcher = launcher
        self._hooks = hooks
        self._all = attempts
        self._resolve_user = resolve_user
        self._log = log
        self._mine: dict[str, RunningAttempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the daemon disconnects, then end its hooks."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        buffer = bytearray()
        try:
            self._send(wire.Hello(version=wire.VERSION, pid=os.getpid()))
            while data := await reader.read(1 << 18):
                buffer += data
                for body in wire.bodies(buffer):
                    self._receive(from_daemon(body))
        except (wire.WireError, ConnectionError) as error:
            self._log("error", "runner_protocol", message=f"closed the connection of the daemon: {error}")
        finally:
            await asyncio.shield(self._end())

    async def _end(self) -> None:
        for attempt in self._mine.values():
            attempt.terminate(TERM_GRACE_S)
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._writer.close()

    def _receive(self, message: wire.FromDaemon) -> None:
        match message:
            case wire.Hello():
                if message.version != wire.VERSION:
                    ours = wire.VERSION
                    raise wire.WireError(f"its version is {message.version}, the runner's is {ours}; restart both")
            case wire.Run():
                self._begin(message)
            case wire.Terminate():
                attempt = self._mine.get(message.attempt_id)
                if attempt is not None:
                    attempt.terminate(message.grace_s)

    def _begin(self, run: wire.Run) -> None:
        """Start a hook, or report why not. The rule decides; the daemon can only shorten the time limit."""
        attempt_id = run.attempt_id
        if attempt_id in self._mine:
            raise wire.WireError(f"attempt {attempt_id} is running already")
        if len(self._all) >= MOST_ATTEMPTS:
            self._send(wire.NotNow(attempt_id=attempt_id, reason=f"{MOST_ATTEMPTS} hooks are running already"))
            return

        def announce(pid: int) -> None:
            self._send(wire.Announced(attempt_id=attempt_id, hook_pid=pid))

        try:
            attempt = self._launcher.launch(self._request(run), announce)
        except CnprocdError as error:  # the rules cannot be read now, or the hook must not be started
            self._send(wire.Ended(attempt_id=attempt_id, reason=error.what))
        except OSError as error:
            self._send(wire.NotNow(attempt_id=attempt_id, reason=str(error)))
        else:
            self._mine[attempt_id] = attempt
            self._all.add(attempt)
            task = asyncio.ensure_future(self._wait(attempt_id, attempt))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _request(self, run: wire.Run) -> LaunchRequest:
        hook = self._hooks().get(run.rule)
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
        )

    async def _wait(self, attempt_id: str, attempt: RunningAttempt) -> None:
        def emit(line: str) -> None:
            self._send(wire.Output(attempt_id=attempt_id, line=line))

        def launched(attempt: RunningAttempt) -> None:
            self._send(wire.Launched(attempt_id=attempt_id, latency_ms=attempt.latency_ms))

        try:
            ending = await attempt.wait(emit, launched)
        finally:
            del self._mine[attempt_id]
            self._all.discard(attempt)
        result = ending.result
        self._send(
            wire.Ended(
                attempt_id=attempt_id,
                reason=result.reason,
                exit_code=result.exit_code,
                signal=result.signal,
                duration_ms=result.duration_ms,
                latency_ms=result.latency_ms,
                interrupted=ending.interrupted,
            )
        )

    def _send(self, message: wire.Message) -> None:
        """Send a frame; drop it if the daemon has disconnected. The output limit also bounds this buffer."""
        with contextlib.suppress(OSError):
            self._writer.write(wire.frame(message))


def peer_uid(connection: socket.socket) -> int:
    """Return the uid of the peer, as the kernel knows it (SO_PEERCRED, unix(7))."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])


def delegated_cgroup() -> Path | None:
    """Return the cgroup of this process if it is delegated, and move the process to a leaf below it.

    Return None without cgroup v2. Delegate=yes delegates the unit's cgroup; processes may only be in its leaves
    (cgroups(7), "no internal processes").
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::/"):
            own = Path("/sys/fs/cgroup", line[4:])
            try:
                (own / "cgroup.procs").stat()  # on a hybrid system that directory may not be a cgroup
                (own / "runner").mkdir(exist_ok=True)
                (own / "runner" / "cgroup.procs").write_text(str(os.getpid()))
            except OSError:
                return None
            return own
    return None
