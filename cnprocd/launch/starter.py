"""The helper process that keeps a spare ready to become the next hook. A script.

The spare opens and checks the program: its disk may not answer, and then the spare waits, for as long as the time limit
of its hook, and not the process that ordered it. Of cnprocd the helper imports only that check (program.py).

A helper (`main`) is started once. It is small because it imports little, and it clones *spares*. A spare waits for one
order, sets itself up as the order demands, and execs the program. It is cloned with CLONE_PARENT, so it is a child of
the daemon: for pidfd, waitid and the proc connector's real_parent. clone3 has one number on every architecture (435,
Linux 5.3). Python's at-fork handlers do not run in the child; a single-threaded process that execs needs none of them.
Without clone3 the daemon forks, and the child calls `wait_for_order`: the protocol is the same.

A fork in the daemon copies page tables, and then both sides fault on every page they touch. Time from order to exec
(p10 / p50) and time that the event loop is held, for a 35 MB Python daemon on a busy 2-core VM at real-time priority
(chrt -r 50, tests/unit/launch/measure_start.py):

    os.fork in the daemon                          7.6 / 8.4 ms   4.3 ms
    a small helper that forks on request           3.7 / 4.1 ms   2.4 ms
    a small helper that forked before (a spare)    2.3 / 2.6 ms   1.1 ms

An exec unmaps the memory of the spare first: 0.7 ms for a Python process of 5 MB, 1.2 ms for one of 9 MB. So a spare
loads no typing, dataclasses, pathlib, enum or contextlib (which saved a quarter). Before an order is waiting it
arranges its descriptors and its session, and checks a program once, so that it has its own copy of these pages.

Protocol over SOCK_SEQPACKET pairs (spawn.py has the other ends; this process exits at EOF):
    control   daemon -> helper   one byte: make a spare, LATER (it rehearses) or NOW (it does not)
              helper -> daemon   ANSWER: PID and start time of the spare, with its socket's other end; or minus an errno
    order     daemon -> spare    8 bytes: the length of the order, with descriptors: the order (a memfd, marshal),
                                 standard input, output, report, and if the order demands it cgroup.procs
    report    spare -> daemon    only EOF if the exec succeeded (it is close-on-exec), else "stage errno"
Each spare has a socket of its own. With a shared one, the next spare could receive an order of the one before it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the module in C: signal makes enums, and loads much for them
import _socket
import ctypes
import fcntl
import gc
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False  # as of typing, which loads much
if TYPE_CHECKING:
    from typing import Any, NoReturn

SYS_CLONE3 = 435
CLONE_PARENT = 0x00008000
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
MSG_CMSG_CLOEXEC = 0x40000000
MOST_FILES = 5
ANSWER = struct.Struct("=qQ")  # PID or minus an errno, and the start time; 0: unknown
NOW, LATER = b"n", b"l"

FIRST_RECEIVED = 10  # the descriptors below are taken, so that no received one is overwritten
_libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the GIL is not released around a call that returns twice


class CloneArgs(ctypes.Structure):
    """struct clone_args of linux/sched.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",  # must be 0 with CLONE_PARENT; the helper's is inherited: SIGCHLD
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    ]


def drop_inheritance() -> None:
    """Drop two attributes that an exec would keep: ambient capabilities and the OOM score."""
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"0")
        os.close(fd)
    except OSError:
        pass  # no /proc, or a read-only one: the hook keeps the daemon's OOM score


def wait_for_order(orders: _socket.socket) -> NoReturn:
    """Wait for the order of this process and become the hook. Never returns."""
    try:
        changed = _changed_signals()
        orders = _settled(orders)
        message, ancillary, _flags, _address = orders.recvmsg(8, _socket.CMSG_SPACE(4 * MOST_FILES), MSG_CMSG_CLOEXEC)
        if not message or not ancillary:
            os._exit(0)
        files = memoryview(ancillary[0][2]).cast("i").tolist()
        order = marshal.loads(os.pread(files[0], int.from_bytes(message, "little"), 0))  # noqa: S302 (from the parent)
        _become(order, files, changed)
    finally:
        os._exit(127)


def _settled(orders: _socket.socket) -> _socket.socket:
    """Do what is the same for every hook, before an order is waiting. Return the socket, which has another number.

    No other descriptor stays open but 0 to 2, and those that are opened from now on are close-on-exec.
    """
    os.setsid()
    moved = fcntl.fcntl(orders.fileno(), fcntl.F_DUPFD_CLOEXEC, FIRST_RECEIVED)
    orders.close()
    os.closerange(3, moved)
    os.closerange(moved + 1, os.sysconf("SC_OPEN_MAX"))
    for number in range(3, FIRST_RECEIVED):
        os.dup2(moved, number, inheritable=False)
    return _socket.socket(fileno=moved)


def _become(order: dict[str, Any], files: list[int], changed: list[int]) -> None:
    from cnprocd.launch.program import HookRefusedError, open_program

    report = files[3]
    stage = "cgroup"
    try:
        if order["cgroup"]:
            os.write(files[-1], b"0")
        stage = "unavailable"
        program = open_program(order["path"])
        stage = "files"
        for to, fd in enumerate((files[1], files[2], files[2])):
            os.dup2(fd, to)
        stage = "nice"
        if order["nice"] is not None:
            os.setpriority(os.PRIO_PROCESS, 0, order["nice"])
        stage = "limits"
        for which, value in order["limits"]:
            resource.setrlimit(which, (value, value))
        if order["user"] is not None:
            uid, gid, groups = order["user"]
            stage = "group"
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            stage = "user"
            os.setresuid(uid, uid, uid)
        stage = "working_directory"  # as the user: root may be refused on NFS, and the user's own permissions apply
        os.chdir(order["directory"])
        os.umask(order["umask"])
        stage = "signals"
        for number in changed:
            _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        stage = "exec"
        if program.by_fd:
            os.execve(program.fd, order["argv"], order["env"])  # noqa: S606 (without a shell, on purpose)
        found = os.stat(program.path)
        if (found.st_dev, found.st_ino) != program.inode:
            stage = "changed"
            raise OSError(0, "changed")
        os.execve(program.path, order["argv"], order["env"])  # noqa: S606
    except HookRefusedError as error:
        os.write(report, f"refused 0 {error.what}".encode("utf-8", "surrogateescape"))
    except OSError as error:  # while the program is opened: EMFILE, ENFILE, ENOMEM
        os.write(report, f"{stage} {error.errno or 0}".encode())
    except BaseException as error:
        os.write(report, f"{stage} 0 {type(error).__name__}: {error}".encode())


def _changed_signals() -> list[int]:
    """Return the signals without their default disposition: exec keeps SIG_IGN, which Python sets for SIGPIPE."""
    kept = (_signal.SIG_DFL, None)  # None: a handler in C code, which an exec resets
    return [number for number in range(1, _signal.NSIG) if _signal.getsignal(number) not in kept]


def _clone(argument: Any, size: int) -> int:  # noqa: ANN401 (ctypes has no public type for the result of byref)
    return int(_libc.syscall(SYS_CLONE3, argument, size))


def _rehearse() -> None:
    """Write to the pages that becoming a hook will write to (reference counts), before an order is waiting."""
    marshal.loads(marshal.dumps({"argv": [b"x"], "user": (0, 0, [0])}))  # noqa: S302
    _check_a_program()


def _check_a_program() -> None:
    """Check a program, so that what the check loads and compiles is there before an order is waiting."""
    from cnprocd.launch.program import open_program

    try:
        os.close(open_program("/bin/sh").fd)
    except Exception:  # as at an order: the report says it then
        return


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None if it is gone (proc_pid_stat(5), field 22).

    For a spare that waits for its order: another process could make this wait (process_reader.py).
    """
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            raw = os.read(fd, 4096)
        finally:
            os.close(fd)
        return int(raw[raw.rindex(b")") + 2 :].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _receive(control: _socket.socket) -> bytes:
    try:
        return control.recv(1)
    except OSError:  # the daemon died with an answer unread
        return b""


def main(control_fd: int) -> None:
    """Clone a spare for every request on the control socket, until EOF."""
    control = _socket.socket(fileno=control_fd)
    for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP):
        _signal.signal(number, _signal.SIG_IGN)  # meant for the daemon; when it ends, this process gets EOF
    drop_inheritance()
    os.chdir("/")
    _libc.syscall.restype = ctypes.c_long
    arguments = CloneArgs(flags=CLONE_PARENT)
    argument, size = ctypes.byref(arguments), ctypes.sizeof(arguments)
    _check_a_program()
    gc.collect()
    gc.freeze()
    gc.disable()
    while request := _receive(control):
        far, near = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        pid = _clone(argument, size)
        if pid == 0:
            control.close()
            far.close()  # otherwise the spare would never get EOF when the daemon ends
            if request == LATER:
                _rehearse()
            wait_for_order(near)
        near.close()  # now: the daemon detects by it whether the spare is alive
        answer = pid if pid > 0 else -ctypes.get_errno()
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, far.fileno().to_bytes(4, sys.byteorder))] if pid > 0 else []
        try:
            control.sendmsg([ANSWER.pack(answer, (start_ticks(pid) or 0) if pid > 0 else 0)], rights)
        except OSError:  # the daemon is gone: the next receive returns EOF
            continue
        finally:
            far.close()


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[2])

    main(int(sys.argv[1]))
