"""The runner: a service that starts hooks for the daemon, as root, outside the daemon's sandbox.

It serves one connection at a time; a later one waits for the end of the one before it. Hooks run on when the daemon
disconnects (attempts.py). After a while without a connection, a hook or a program that a hook left behind, serve()
returns. systemd's socket keeps the next connection and starts the runner again.

Trust: SO_PEERCRED identifies the peer. From the daemon the runner takes only events and the name of a rule in a
snapshot that it made itself of root-owned files (rule_snapshots.py), checked by wire_validate.py. The program, the user
and the time limit come from there. The runner keeps no spare process ready: the daemon could not register it as a hook
before it exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Collection
from pathlib import Path

from cnprocd.errors import CnprocdError
from cnprocd.launch.attempt import LocalLauncher, sweep_cgroups
from cnprocd.launch.user import ResolveUser, resolve_user
from cnprocd.log import Log
from cnprocd.runner import wire
from cnprocd.runner.attempts import Attempts
from cnprocd.runner.results import Results
from cnprocd.runner.rule_snapshots import RuleSnapshots
from cnprocd.runner.wire_validate import from_daemon

IDLE_S = 30.0
MOST_CONNECTIONS = 16  # one is served, the others wait; more could exhaust the descriptors
STOP_BOUND_S = 30.0  # for running hooks after stop(); TimeoutStopSec= of the unit is longer
CLOSE_BOUND_S = 1.0  # for the last frames to a daemon that does not read
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class Service:
    """Accepts connections on `listener` and runs the hooks that they name."""

    def __init__(
        self,
        listener: socket.socket,
        snapshots: RuleSnapshots,
        allowed: Collection[int],
        log: Log,
        cgroup_dir: Path | None,
        resolve_user: ResolveUser = resolve_user,
        results_dir: Path | None = None,
    ) -> None:
        """`resolve_user` raises OSError if it has no answer now."""
        self._listener = listener
        self._snapshots = snapshots
        self._allowed = frozenset(allowed)
        self._log = log
        self._cgroup_dir = cgroup_dir
        self._launcher = LocalLauncher(log, cgroup_dir)
        self._results = Results(results_dir)
        self._session: Session | None = None
        self._attempts = Attempts(
            self._launcher, snapshots, self._results, log, resolve_user, self._send, self._on_attempt_end
        )
        self._served: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._retiring = False
        self._idle_s = IDLE_S
        self._idle_timer: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Accept no more connections and start no more hooks. serve() returns when those that run have ended."""
        self._attempts.accepting = False
        self._stop.set()

    def retire(self) -> None:
        """Stop at the next moment without a hook: systemd then starts the installed version, for the next hook."""
        self._retiring = True
        self._on_attempt_end()

    async def serve(self, idle_s: float = IDLE_S) -> None:
        """Serve until stop(), or until `idle_s` have passed without a connection and a hook."""
        self._idle_s = idle_s
        self._results.prune()
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
        task = asyncio.ensure_future(self._serve_one(connection, list(self._served)))
        self._served.add(task)
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._served.discard(task)
        if not self._served:
            self._start_idle_timer()

    # -- idle ----------------------------------------------------------------------------------------------------

    def _start_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = asyncio.get_running_loop().call_later(self._idle_s, self._stop_if_idle)

    def _stop_if_idle(self) -> None:
        if self._served:
            return  # the end of the connection starts the timer again
        if self._busy():
            self._start_idle_timer()
        else:
            self.stop()

    def _busy(self) -> bool:
        """Whether a hook runs, or a program that a hook left behind: systemd would end it with this service."""
        return bool(self._attempts) or self._launcher.left_behind() or _is_populated(self._cgroup_dir)

    def _on_attempt_end(self) -> None:
        if self._retiring and not self._busy():
            self.stop()

    # -- stopping ------------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Wait for running hooks within STOP_BOUND_S, then end them. Then send what is left and disconnect."""
        await self._attempts.finish(STOP_BOUND_S)
        if self._session is not None:
            await self._session.close(CLOSE_BOUND_S)
        for task in list(self._served):
            task.cancel()
        await asyncio.gather(*self._served, return_exceptions=True)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._launcher.close()
        if self._cgroup_dir is not None:
            sweep_cgroups(self._cgroup_dir)

    # -- connections ---------------------------------------------------------------------------------------------

    def _send(self, message: wire.Message) -> bool:
        return self._session is not None and self._session.send(message)

    async def _serve_one(self, connection: socket.socket, earlier: list[asyncio.Task[None]]) -> None:
        with connection:
            uid = peer_uid(connection)
            if uid not in self._allowed:
                message = f"refused a connection of uid {uid}: it may not use the runner"
                self._log("error", "runner_refused", uid=uid, message=message)
                return
            if earlier:
                await asyncio.wait(earlier)
            self._session = Session(connection, self._attempts, self._snapshots, self._log)
            try:
                await self._session.run()
            finally:
                self._session = None
                if self._cgroup_dir is not None:
                    sweep_cgroups(self._cgroup_dir, self._attempts.requests())


class Session:
    """One connection of the daemon."""

    def __init__(self, connection: socket.socket, attempts: Attempts, snapshots: RuleSnapshots, log: Log) -> None:
        self._connection = connection
        self._attempts = attempts
        self._snapshots = snapshots
        self._log = log
        self._writer: asyncio.StreamWriter | None = None
        self._taking: asyncio.Task[None] | None = None
        self._wanted = ""  # the digest that the last request named

    async def run(self) -> None:
        """Serve until the daemon disconnects."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        incoming = wire.Incoming()
        try:
            self.send(wire.Hello(version=wire.VERSION, pid=os.getpid()))
            while data := await reader.read(1 << 18):
                for body in incoming.add(data):
                    if isinstance(body, wire.TooLong):
                        self._attempts.refuse(body.attempt_id, body.reason)
                    else:
                        self._receive(from_daemon(body))
        except (wire.WireError, ConnectionError) as error:
            self._log("error", "runner_protocol", message=f"closed the connection of the daemon: {error}")
        finally:
            self._writer.close()
            if self._taking is not None:
                self._taking.cancel()

    def _receive(self, message: wire.FromDaemon) -> None:
        match message:
            case wire.Hello():
                if message.version != wire.VERSION:
                    ours = wire.VERSION
                    raise wire.WireError(f"its version is {message.version}, the runner's is {ours}; restart both")
            case wire.TakeSnapshot():
                self._take_snapshot(message)
            case wire.Run():
                self._attempts.begin(message)
            case wire.Resume():
                self._attempts.resume(message.attempt_id)
            case wire.Terminate():
                self._attempts.terminate(message.attempt_id, message.grace_s)

    def _take_snapshot(self, message: wire.TakeSnapshot) -> None:
        """Begin to read the rule files. A later request replaces an earlier one: each costs a process.

        If both want the same files, the earlier one goes on. Its answer is for both: on a machine that is too busy to
        answer in time, a daemon that asks again would otherwise never get an answer.
        """
        if self._taking is not None:
            if self._wanted == message.wanted and not self._taking.done():
                return
            self._taking.cancel()
        self._wanted = message.wanted
        self._taking = asyncio.ensure_future(self._answer_snapshot(message))

    async def _answer_snapshot(self, message: wire.TakeSnapshot) -> None:
        digest, error = None, None
        try:
            digest = await self._snapshots.take(message.wanted, message.keep)
        except CnprocdError as problem:
            error = problem.what
        self.send(wire.SnapshotTaken(wanted=message.wanted, digest=digest, error=error))

    def send(self, message: wire.Message) -> bool:
        """Send a frame, or return False: the daemon has disconnected. The output limit also bounds this buffer."""
        if self._writer is None or self._writer.is_closing():
            return False
        self._writer.write(wire.frame(message))
        return True

    async def close(self, bound_s: float) -> None:
        """Send what is left, for `bound_s` at most, and disconnect."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(self._writer.wait_closed(), bound_s)


def _is_populated(cgroup_dir: Path | None) -> bool:
    """Whether a process is in a cgroup of a hook."""
    for events in [] if cgroup_dir is None else cgroup_dir.glob("job-*/cgroup.events"):
        with contextlib.suppress(OSError):
            if "populated 1" in events.read_text():
                return True
    return False


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
