"""Start one hook: the parent's side of starter.py.

First everything is made that can fail for lack of descriptors or memory. Then a spare is reserved and its PID announced
to the caller, which registers it *before* the hook does anything. Only then is the order sent. The exec happens in the
spare: the event loop is held for about 0.2 ms, and EOF on the report pipe means that the exec succeeded. A helper that
died is started again; if that fails, this process forks.

Standard input is a memfd, not a pipe: nothing blocks or fails if the hook reads late, does not read, or closes it. The
output pipe belongs to the hook's user; otherwise `echo >/dev/stderr` would fail with EACCES.
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cnprocd.launch import render, starter
from cnprocd.launch.request import HookUser, LaunchRequest
from cnprocd.log import Log
from cnprocd.rules.ruleset import Hook, ResourceLimits

ANSWER_TIMEOUT_S = 0.4  # the event loop waits for the helper, which takes 1 ms and at its start 50 ms
PACKAGE = str(Path(starter.__file__).parents[2])  # the directory of cnprocd
_MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3; without it vm.memfd_noexec=2 refuses a memfd


@dataclass(frozen=True, slots=True)
class Child:
    """A hook that is being started: a child of this process, not reaped. The owner closes the descriptors."""

    pid: int
    pidfd: int
    report_fd: int  # EOF: the program runs. Text: input of launch_failure()
    output_fd: int
    start_ticks: int | None  # when it started, in clock ticks since boot

    def close(self, *, but_output: bool = False) -> None:
        for fd in (self.pidfd, self.report_fd, *(() if but_output else (self.output_fd,))):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Spare:
    """A process that waits for its order and then becomes a hook."""

    pid: int
    orders: socket.socket
    start_ticks: int | None


class ReadyHook:
    """A hook that lacks only its order. Start or discard it."""

    def __init__(
        self, child: Child, spare: Spare, files: list[int], order_bytes: int, ours: ExitStack, made: ExitStack
    ) -> None:
        """`ours` closes what the spare gets, `made` the descriptors of `child`."""
        self._child = child
        self._spare = spare
        self._files = files
        self._order_bytes = order_bytes
        self._ours = ours
        self._made = made

    def start(self, announce: Callable[[int], None]) -> Child:
        """Send the order. `announce` gets the PID before. Raises OSError: nothing was started."""
        try:
            announce(self._child.pid)
            socket.send_fds(self._spare.orders, [self._order_bytes.to_bytes(8, "little")], self._files)
        except BaseException:
            self.discard()
            raise
        self._ours.close()
        return self._child

    def discard(self) -> None:
        """End the spare: the hook is not to be started."""
        _discard(self._spare)
        self._ours.close()
        self._made.close()


class Starter:
    """Keeps a spare process ready and turns it into a hook."""

    def __init__(self, log: Log, blame: Callable[[str, float], None] | None = None) -> None:
        self._log = log
        self._blame = blame
        self._forks = not sys.executable  # no Python interpreter to start the helper with
        self._helper: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._asked = False
        self._silent = False  # the helper did not answer in time: do not wait for it again

    def prepare(self, *, soon: bool = False) -> None:
        """Ask the helper for a spare if none is ready. `soon`: another hook follows at once, so do not rehearse."""
        with contextlib.suppress(OSError):
            self._ask(starter.NOW if soon else starter.LATER)

    def spawn(
        self,
        request: LaunchRequest,
        announce: Callable[[int], None],
        cgroup_procs_fd: int | None = None,
    ) -> Child:
        """Start a hook. `announce` gets its PID before the hook does anything. Raises OSError: nothing was started.

        `cgroup_procs_fd` is closed.
        """
        return self.make_ready(request, cgroup_procs_fd).start(announce)

    def make_ready(self, request: LaunchRequest, cgroup_procs_fd: int | None = None) -> ReadyHook:
        """Do all that a start takes but the order. Raises OSError. `cgroup_procs_fd` is closed."""
        with ExitStack() as ours, ExitStack() as made:
            if cgroup_procs_fd is not None:
                ours.callback(os.close, cgroup_procs_fd)
            files, report, output = _files(request, cgroup_procs_fd, ours, made)
            order = _order(request, cgroup_procs_fd)
            os.write(files[0], order)
            spare = self._reserve()
            ours.callback(spare.orders.close)
            try:
                pidfd = os.pidfd_open(spare.pid)
            except OSError:
                _discard(spare)
                raise
            made.callback(os.close, pidfd)
            child = Child(spare.pid, pidfd, report, output, spare.start_ticks)
            return ReadyHook(child, spare, files, len(order), ours.pop_all(), made.pop_all())

    def close(self) -> None:
        """End the helper and its spare."""
        self._end_spare(0.0 if self._silent else ANSWER_TIMEOUT_S)
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()
            self._helper = None
        self._end_spare(0.0)  # the helper can answer too late, just before it is killed
        self._asked = False
        if self._control is not None:
            self._control.close()
            self._control = None

    def _end_spare(self, timeout_s: float) -> None:
        """End and reap the spare that was asked for, if the helper answers within this time."""
        if self._asked and self._control is not None:
            self._control.settimeout(timeout_s)
            with contextlib.suppress(OSError):
                spare = _answer(self._control)
                self._asked = False
                spare.orders.close()
                _discard(spare)

    def _reserve(self) -> Spare:
        """Return a spare that waits for its order."""
        for _ in range(2):
            if self._forks:
                break
            try:
                spare = self._spare_of_helper()
            except (ConnectionError, TimeoutError) as error:
                self._silent = isinstance(error, TimeoutError)
                self._log("warning", "starter_lost", reason=str(error))
                self.close()
                self._silent = False
            except OSError as error:
                self._asked = False
                if error.errno not in (errno.ENOSYS, errno.EPERM):
                    raise
                # An old kernel, or a seccomp filter that does not know clone3.
                self._log("notice", "starter_lost", reason=f"clone3: {error.strerror}; cnprocd forks hooks itself")
                self._forks = True
                self.close()
            else:
                self._asked = False
                if _waits(spare):
                    return spare
                _discard(spare)  # it was killed while it waited
        return _fork()

    def _spare_of_helper(self) -> Spare:
        self._ask(starter.NOW)
        assert self._control is not None
        began_s = time.monotonic()
        try:
            return _answer(self._control)
        finally:
            if self._blame is not None:
                self._blame("hook starter", time.monotonic() - began_s)

    def _ask(self, kind: bytes) -> None:
        if self._forks or self._asked:
            return
        if self._control is None:
            self._start_helper()
        assert self._control is not None
        self._control.send(kind)
        self._asked = True

    def _start_helper(self) -> None:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.settimeout(ANSWER_TIMEOUT_S)
        try:
            self._helper = subprocess.Popen(
                [sys.executable, "-I", "-S", "-E", starter.__file__, str(theirs.fileno()), PACKAGE],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": render.PATH},
                start_new_session=True,  # Ctrl-C in the foreground is meant for the daemon alone
            )
        except OSError as error:
            control.close()
            raise ConnectionError(error.errno, f"cannot start the helper: {error.strerror}") from error
        finally:
            theirs.close()
        self._control = control


def _answer(control: socket.socket) -> Spare:
    """Return the spare that the helper made. Raises the OSError that the helper got."""
    message, fds, _, _ = socket.recv_fds(control, starter.ANSWER.size, 1)
    if not message:
        raise ConnectionResetError(errno.ECONNRESET, "the helper exited")
    pid, ticks = starter.ANSWER.unpack(message)
    if pid <= 0:
        raise OSError(-pid, f"cannot create a process: {os.strerror(-pid)}")
    if not fds:  # no descriptor was left for the spare's socket: the kernel closed it, and the spare exits
        os.waitpid(pid, 0)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    for fd in fds:
        os.set_inheritable(fd, False)
    return Spare(pid, socket.socket(fileno=fds[0]), ticks or None)


def path_of(hook: Hook) -> str:
    """Return the path of a hook's program. The rule language accepts no fields in it."""
    return "".join(part for part in hook.command[0].parts if isinstance(part, str))


def _waits(spare: Spare) -> bool:
    """Whether the spare is alive: its end of the socket is closed if it is not."""
    try:
        return spare.orders.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _discard(spare: Spare) -> None:
    with contextlib.suppress(OSError):
        os.kill(spare.pid, signal.SIGKILL)  # a child that is not reaped: its PID cannot be reused
        os.waitpid(spare.pid, 0)


def _fork() -> Spare:
    """Fork a spare from this process, for one order. This costs more than asking the helper."""
    far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)  # the event loop's wakeup pipe is shared with the parent
                far.close()
                starter.drop_inheritance()
                starter.wait_for_order(near)
            finally:
                os._exit(127)
    except BaseException:
        far.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        near.close()
    return Spare(pid, far, starter.start_ticks(pid))


def _order(request: LaunchRequest, cgroup_procs_fd: int | None) -> bytes:
    hook = request.hook
    return marshal.dumps(
        {
            "argv": render.argv(hook, request.first_record),
            "env": render.environment(request),
            "path": path_of(hook),
            "cgroup": cgroup_procs_fd is not None,
            "nice": None if hook.nice == os.getpriority(os.PRIO_PROCESS, 0) else hook.nice,
            "limits": _limits(hook.limits),
            "user": _switch(request.user),
            "directory": hook.working_directory,
            "umask": hook.umask,
        }
    )


def launch_failure(report: bytes, request: LaunchRequest) -> str:
    """Return the spare's report as a sentence."""
    stage, number, *rest = report.decode("utf-8", "replace").split(" ", 2)
    code = int(number) if number.isdigit() else 0
    cause = rest[0] if rest else os.strerror(code)
    user, hook = request.user, request.hook
    path = path_of(hook)
    if stage == "exec":
        return {
            errno.ENOEXEC: f"{path} is neither a program nor a script with a #! line",
            errno.EACCES: f"user {user.name} may not execute {path}",
            errno.EAGAIN: f"user {user.name} has too many processes to execute {path}",
        }.get(code, f"cannot execute {path}: {cause}")
    return {
        "refused": cause,
        "unavailable": f"cannot open {path}: {cause}",
        "changed": f"{path} was replaced between check and use",
        "cgroup": f"cannot enter its cgroup: {cause}",
        "nice": f"cannot set nice {hook.nice}: {cause}",
        "limits": f"cannot set its resource limits: {cause}",
        "group": f"cannot become group {user.gid}: {cause}",
        "user": f"cannot become user {user.name}: {cause}",
        "working_directory": f"cannot enter {hook.working_directory}: {cause}",
    }.get(stage, f"cannot start ({stage}): {cause}")


def _files(
    request: LaunchRequest, cgroup_procs_fd: int | None, ours: ExitStack, made: ExitStack
) -> tuple[list[int], int, int]:
    """Return the descriptors for the spare, and the read ends of report and output. `ours` and `made` close them."""
    files = [_memfd("order"), _memfd("event")]
    for fd in files:
        ours.callback(os.close, fd)
    view = memoryview(render.standard_input(request))
    while view:
        view = view[os.write(files[1], view) :]
    os.lseek(files[1], 0, os.SEEK_SET)
    ends = []
    for _ in ("output", "report"):
        reader, writer = os.pipe2(os.O_CLOEXEC)
        made.callback(os.close, reader)
        ours.callback(os.close, writer)
        os.set_blocking(reader, False)
        files.append(writer)
        ends.append(reader)
    if request.user.switch and os.geteuid() == 0:
        os.fchown(files[2], request.user.uid, request.user.gid)
    if cgroup_procs_fd is not None:
        files.append(cgroup_procs_fd)
    output, report = ends
    return files, report, output


def _memfd(name: str) -> int:
    try:
        return os.memfd_create(f"cnprocd-{name}", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(f"cnprocd-{name}", os.MFD_CLOEXEC)


def _switch(user: HookUser) -> tuple[int, int, list[int]] | None:
    return (user.uid, user.gid, list(user.groups)) if user.switch else None


def _limits(limits: ResourceLimits | None) -> list[tuple[int, int]]:
    if limits is None:
        return []
    wanted = (
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_CPU, None if limits.cpu_time_s is None else math.ceil(limits.cpu_time_s)),
        (resource.RLIMIT_CORE, limits.core_bytes),
        (resource.RLIMIT_FSIZE, limits.file_size_bytes),
        (resource.RLIMIT_AS, limits.address_space_bytes),  # last: the spare itself needs memory until the exec
    )
    return [(which, value) for which, value in wanted if value is not None]
