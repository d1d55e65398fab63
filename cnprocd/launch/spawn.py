"""Starting one hook: the daemon's side of starter.py.

Strategy: everything that can fail for want of a descriptor or memory is made first; then a spare is reserved, its PID
told to the caller (who may have to tell the kernel filter and the process table *before* the hook does anything), and
only then is the order handed over. The exec happens beside us: the event loop is held for about 0.2 ms, and the report
pipe tells when it has succeeded. A helper that dies is started again; if it cannot be, the daemon forks.

Standard input is a memfd, not a pipe: nothing blocks or breaks when the hook reads late, not at all, or closes it. The
output pipe belongs to the hook's user, or `echo >/dev/stderr` would be refused to it.
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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from cnprocd.launch import starter
from cnprocd.launch.program import Program
from cnprocd.launch.render import PATH
from cnprocd.log import Log
from cnprocd.spool.job import Identity, Limits

ANSWER_TIMEOUT_S = 2.0
_MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3; without it vm.memfd_noexec=2 refuses a memfd


@dataclass(frozen=True, slots=True)
class Order:
    """All that a spare needs to become a hook."""

    program: Program
    argv: list[bytes]
    env: dict[bytes, bytes]
    standard_input: bytes
    identity: Identity
    directory: str
    umask: int
    nice: int
    limits: Limits
    cgroup_procs_fd: int | None = None


@dataclass(frozen=True, slots=True)
class Child:
    """A hook on its way: our child, not reaped. The owner closes the descriptors."""

    pid: int
    pidfd: int
    report_fd: int  # EOF: the program runs. Text: see launch_failure()
    output_fd: int

    def close(self) -> None:
        for fd in (self.pidfd, self.report_fd, self.output_fd):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Spare:
    """A process that waits for its order."""

    pid: int
    orders: socket.socket


class Starter:
    """Keeps a spare process ready and turns it into a hook on order."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._forks = not sys.executable  # no interpreter to start a helper with
        self._helper: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._asked = False

    def prepare(self, *, soon: bool = False) -> None:
        """Have a spare made ready, if there is none: when nothing is urgent, or `soon` when another order follows."""
        with contextlib.suppress(OSError):
            self._ask(starter.NOW if soon else starter.LATER)

    def spawn(self, order: Order, announce: Callable[[int], None]) -> Child:
        """Start a hook. `announce` gets its PID before it does anything. Raises OSError: nothing was started."""
        with ExitStack() as ours, ExitStack() as made:
            files, report, output = _files(order, ours, made)
            spare = self._reserve()
            ours.callback(spare.orders.close)
            try:
                pidfd = os.pidfd_open(spare.pid)
            except OSError:
                _discard(spare)
                raise
            made.callback(os.close, pidfd)
            announce(spare.pid)
            try:
                _hand_over(spare, order, files)
            except OSError:
                _discard(spare)
                raise
            made.pop_all()
            return Child(spare.pid, pidfd, report, output)

    def close(self) -> None:
        """Let the helper and its spare go."""
        if self._asked and self._control is not None:
            with contextlib.suppress(OSError):
                spare = _answer(self._control)
                spare.orders.close()
                _discard(spare)
        self._asked = False
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()
            self._helper = None

    def _reserve(self) -> Spare:
        """A spare that waits for its order."""
        for _ in range(2):
            if self._forks:
                break
            try:
                self._ask(starter.NOW)
                assert self._control is not None
                spare = _answer(self._control)
            except (ConnectionError, TimeoutError) as error:
                self._log("warning", "starter_lost", reason=str(error))
                self.close()
            except OSError as error:
                self._asked = False
                if error.errno not in (errno.ENOSYS, errno.EPERM):
                    raise
                # An old kernel, or a seccomp filter that has never heard of clone3.
                self._log("notice", "starter_lost", reason=f"clone3: {error.strerror}; cnprocd forks hooks itself")
                self._forks = True
                self.close()
            else:
                self._asked = False
                if _waits(spare):
                    return spare
                _discard(spare)  # someone killed it while it waited
        return _fork()

    def _ask(self, wish: bytes) -> None:
        if self._forks or self._asked:
            return
        if self._control is None:
            self._start_helper()
        assert self._control is not None
        self._control.send(wish)
        self._asked = True

    def _start_helper(self) -> None:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.settimeout(ANSWER_TIMEOUT_S)
        try:
            self._helper = subprocess.Popen(
                [sys.executable, "-I", "-S", "-E", starter.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": PATH},
                start_new_session=True,  # a Ctrl-C in the foreground is for the daemon
            )
        except OSError as error:
            control.close()
            raise ConnectionError(error.errno, f"cannot start the helper: {error.strerror}") from error
        finally:
            theirs.close()
        self._control = control


def _answer(control: socket.socket) -> Spare:
    """The helper's answer to our asking; raises the OSError that it met."""
    message, fds, _, _ = socket.recv_fds(control, 8, 1)
    if not message:
        raise ConnectionResetError(errno.ECONNRESET, "the helper is gone")
    pid = int.from_bytes(message, "little", signed=True)
    if pid <= 0:
        raise OSError(-pid, f"cannot make a process: {os.strerror(-pid)}")
    if not fds:  # we have no descriptor left for its socket, so that is closed and the spare ends
        os.waitpid(pid, 0)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    for fd in fds:
        os.set_inheritable(fd, False)
    return Spare(pid, socket.socket(fileno=fds[0]))


def _waits(spare: Spare) -> bool:
    """Whether the spare is still there: its end is closed when it is not."""
    try:
        return spare.orders.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _discard(spare: Spare) -> None:
    with contextlib.suppress(OSError):
        os.kill(spare.pid, signal.SIGKILL)  # our child, not reaped: the PID is its own
        os.waitpid(spare.pid, 0)


def _fork() -> Spare:
    """The dear way: a spare made of ourselves, for one order."""
    far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)  # the event loop's pipe is shared with the parent
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
    return Spare(pid, far)


def _hand_over(spare: Spare, order: Order, files: list[int]) -> None:
    message = marshal.dumps(
        {
            "argv": order.argv,
            "env": order.env,
            "path": order.program.path,
            "inode": order.program.inode,
            "by_fd": order.program.by_fd,
            "cgroup": order.cgroup_procs_fd is not None,
            "nice": None if order.nice == os.getpriority(os.PRIO_PROCESS, 0) else order.nice,
            "limits": _limits(order.limits),
            "identity": _switch(order.identity),
            "directory": order.directory,
            "umask": order.umask,
        }
    )
    os.write(files[0], message)
    socket.send_fds(spare.orders, [len(message).to_bytes(8, "little")], files)


def launch_failure(report: bytes, order: Order) -> str:
    """The spare's report as a sentence."""
    stage, number, *rest = report.decode("utf-8", "replace").split(" ", 2)
    code = int(number) if number.isdigit() else 0
    cause = rest[0] if rest else os.strerror(code)
    path = order.program.path
    if stage == "exec":
        return {
            errno.ENOEXEC: f"{path} is neither a program nor a script with a #! line",
            errno.EACCES: f"{path} may not be executed by user {order.identity.name}",
            errno.EAGAIN: f"user {order.identity.name} has too many processes to execute {path}",
        }.get(code, f"cannot execute {path}: {cause}")
    return {
        "changed": f"{path} was replaced between check and use",
        "cgroup": f"cannot enter its cgroup: {cause}",
        "nice": f"cannot set nice {order.nice}: {cause}",
        "limits": f"cannot set its resource limits: {cause}",
        "group": f"cannot become group {order.identity.gid}: {cause}",
        "user": f"cannot become user {order.identity.name}: {cause}",
        "working_directory": f"cannot enter {order.directory}: {cause}",
    }.get(stage, f"cannot start ({stage}): {cause}")


def _files(order: Order, ours: ExitStack, made: ExitStack) -> tuple[list[int], int, int]:
    """The descriptors for the spare (closed with `ours`), and the reading ends of report and output (with `made`)."""
    files = [_memfd("order"), _memfd("event")]
    for fd in files:
        ours.callback(os.close, fd)
    view = memoryview(order.standard_input)
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
    if order.identity.switch and os.geteuid() == 0:
        os.fchown(files[2], order.identity.uid, order.identity.gid)
    if order.program.by_fd:
        files.append(order.program.fd)
    if order.cgroup_procs_fd is not None:
        files.append(order.cgroup_procs_fd)
    output, report = ends
    return files, report, output


def _memfd(name: str) -> int:
    try:
        return os.memfd_create(f"cnprocd-{name}", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(f"cnprocd-{name}", os.MFD_CLOEXEC)


def _switch(who: Identity) -> tuple[int, int, list[int]] | None:
    return (who.uid, who.gid, list(who.groups)) if who.switch else None


def _limits(limits: Limits) -> list[tuple[int, int]]:
    wanted = (
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_CPU, None if limits.cpu_time_s is None else math.ceil(limits.cpu_time_s)),
        (resource.RLIMIT_CORE, limits.core_bytes),
        (resource.RLIMIT_FSIZE, limits.file_size_bytes),
        (resource.RLIMIT_AS, limits.address_space_bytes),  # last: the spare itself needs memory until the exec
    )
    return [(which, value) for which, value in wanted if value is not None]
