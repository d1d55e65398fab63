"""The process that stands ready to become the next hook. Run as a script of its own, it imports nothing of cnprocd.

Why not fork in the daemon? A fork copies page tables, and then both sides fault on every page they touch. From order to
exec, out of a 35 MB Python daemon on this 2-core VM under other load, interleaved in one run at real-time priority
(chrt -r 50, tests/unit/launch/measure_start.py), p10 / p50, and for how long the event loop stood still:

    os.fork in the daemon                          5.3 / 6.5 ms   3.4 ms
    a small helper that forks when asked           3.0 / 3.5 ms   2.1 ms
    a small helper that forked before (a spare)    2.2 / 2.5 ms   0.9 ms
    vfork and exec alone                           0.2 ms on a quiet machine, but without user, groups, limits, cgroup

A spare made ahead of time also rehearses: it writes to the pages it will write to, while nobody waits. That saves a
quarter of a millisecond later; in a burst it would only take time.

So: a helper (`main`) started once, small because it imports next to nothing, clones *spares*. A spare waits for one
order, makes itself what the order says and execs the program. It is cloned with CLONE_PARENT, so it is the daemon's own
child: pidfd, waitid and the proc connector's real_parent all say so. clone3 has one number on every architecture (435,
Linux 5.3), and no at-fork hooks of Python run in the child, none of which a single-threaded process that execs needs.

Where clone3 is not to be had, the daemon forks itself and the child calls `wait_for_order`: same protocol.

Protocol, over SOCK_SEQPACKET pairs (spawn.py has the other ends; EOF ends us):
    control   daemon -> helper   one byte: make a spare, LATER (it rehearses) or NOW (that would only take time)
              helper -> daemon   8 bytes, signed: its PID, with the other end of its own socket; or minus an errno
    order     daemon -> spare    8 bytes: the length of the order, with descriptors: the order (a memfd, marshal),
                                 standard input, output, report, and as the order says the program and cgroup.procs
    report    spare -> daemon    nothing but EOF when the exec has succeeded (it is close-on-exec), else "stage errno"
Each spare has a socket of its own: with a common one, the next spare could take the order of one that has not run yet.
"""

import _socket
import contextlib
import ctypes
import fcntl
import gc
import marshal
import os
import resource
import signal
import sys
from typing import Any, NoReturn

SYS_CLONE3 = 435
CLONE_PARENT = 0x00008000
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
MSG_CMSG_CLOEXEC = 0x40000000
MOST_FILES = 6
NOW, LATER = b"n", b"l"

_libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the GIL is not let go around a call that returns twice
_Files = list[int]


class CloneArgs(ctypes.Structure):
    """struct clone_args of linux/sched.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",  # must be 0 with CLONE_PARENT: ours is inherited, SIGCHLD
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    ]


def drop_inheritance() -> None:
    """What a hook must not have of the daemon and an exec would not take away: ambient capabilities, OOM protection."""
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"0")
        os.close(fd)
    except OSError:
        pass  # no /proc, or a sandbox that keeps it read-only: the hook is then as hard to kill as the daemon


def wait_for_order(orders: _socket.socket) -> NoReturn:
    """Wait for this process's order, and become the hook. Never returns."""
    try:
        changed = _changed_signals()
        message, ancillary, _flags, _address = orders.recvmsg(8, _socket.CMSG_SPACE(4 * MOST_FILES), MSG_CMSG_CLOEXEC)
        if not message or not ancillary:
            os._exit(0)
        # Out of the way first: 0..4 are about to be taken, and a received descriptor may be one of them.
        files = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in memoryview(ancillary[0][2]).cast("i")]
        order = marshal.loads(os.pread(files[0], int.from_bytes(message, "little"), 0))  # noqa: S302 (from our parent)
        _become(order, files, changed)
    finally:
        os._exit(127)


def _become(order: dict[str, Any], files: _Files, changed: list[int]) -> None:
    report = files[3]
    stage = "cgroup"
    try:
        if order["cgroup"]:
            os.write(files[-1], b"0")
        stage = "files"
        program = files[4] if order["by_fd"] else files[1]
        for to, fd in enumerate((files[1], files[2], files[2])):
            os.dup2(fd, to)
        report = os.dup2(report, 3, inheritable=False)
        os.dup2(program, 4, inheritable=False)
        os.closerange(5, os.sysconf("SC_OPEN_MAX"))
        stage = "session"
        os.setsid()
        stage = "nice"
        if order["nice"] is not None:
            os.setpriority(os.PRIO_PROCESS, 0, order["nice"])
        stage = "limits"
        for which, value in order["limits"]:
            resource.setrlimit(which, (value, value))
        if order["identity"] is not None:
            uid, gid, groups = order["identity"]
            stage = "group"
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            stage = "user"
            os.setresuid(uid, uid, uid)
        stage = "working_directory"  # as the user: where root may not go on NFS, and where the user may not go
        os.chdir(order["directory"])
        os.umask(order["umask"])
        stage = "signals"
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        stage = "exec"
        if order["by_fd"]:
            os.execve(4, order["argv"], order["env"])  # noqa: S606 (no shell: that is the point)
        found = os.stat(order["path"])
        if (found.st_dev, found.st_ino) != order["inode"]:
            stage = "changed"
            raise OSError(0, "changed")
        os.execve(order["path"], order["argv"], order["env"])  # noqa: S606
    except OSError as error:
        os.write(report, f"{stage} {error.errno or 0}".encode())
    except BaseException as error:
        os.write(report, f"{stage} 0 {type(error).__name__}: {error}".encode())


def _changed_signals() -> list[int]:
    """What has another than its default disposition: exec resets handlers, but keeps SIG_IGN (Python's for SIGPIPE)."""
    kept = (signal.SIG_DFL, None)  # None: a handler of C code, which an exec resets
    return [number for number in range(1, signal.NSIG) if signal.getsignal(number) not in kept]


def _clone(argument: Any, size: int) -> int:  # noqa: ANN401 (ctypes has no name for what byref returns)
    return int(_libc.syscall(SYS_CLONE3, argument, size))


def _rehearse() -> None:
    """Write to every page that becoming a hook will write to (reference counts), while nobody waits for it."""
    gc.unfreeze()
    for _ in gc.get_objects():
        pass
    marshal.loads(marshal.dumps({"argv": [b"x"], "identity": (0, 0, [0])}))  # noqa: S302


def _asked(control: _socket.socket) -> bytes:
    try:
        return control.recv(1)
    except OSError:  # the daemon died with an answer of ours unread
        return b""


def main(control_fd: int) -> None:
    """Clone a spare for every wish on the control socket, until EOF."""
    control = _socket.socket(fileno=control_fd)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the daemon; its end is our EOF
    drop_inheritance()
    os.chdir("/")
    _libc.syscall.restype = ctypes.c_long
    arguments = CloneArgs(flags=CLONE_PARENT)
    argument, size = ctypes.byref(arguments), ctypes.sizeof(arguments)
    gc.collect()
    gc.freeze()
    gc.disable()
    while wish := _asked(control):
        far, near = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        pid = _clone(argument, size)
        if pid == 0:
            control.close()
            far.close()  # or the daemon's going away would never be our EOF
            if wish == LATER:
                _rehearse()
            wait_for_order(near)
        near.close()  # now: the daemon tells by it whether the spare still lives
        answer = pid if pid > 0 else -ctypes.get_errno()
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, far.fileno().to_bytes(4, sys.byteorder))] if pid > 0 else []
        with contextlib.suppress(OSError):
            control.sendmsg([answer.to_bytes(8, "little", signed=True)], rights)
        far.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
