"""Load rules in a child process, which sends them and exits.

Reading a rule file needs pydantic, YAML, the models, and the text and tree of the file, for a tenth of a second; in the
daemon they would take a third of its memory for ever. Ten thousand rules take a second or two to check, in which the
daemon would read no events. So a child reads and checks the files and sends plain values (ruleset.py).

It is fork(2) and not a new interpreter: at start the parent continues with its own imports meanwhile, and at a reload
most modules are loaded already. The child has one thread, as the daemon has. It leaves by _exit(2), so nothing of the
parent is flushed or closed twice. It first closes every descriptor but the pipe, so it keeps no socket of the daemon
open. Only this child, with the same code and the same user, writes to the pipe, so its data may be unpickled.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar, cast

from cnprocd.connector.status import describe
from cnprocd.rules.problems import Problem, RetryableError, RulesError

LIMIT_S = 60.0  # for files on a disk that does not respond; systemd allows 90 s for a start or reload
END_S = 0.05  # that the loop waits for a killed child, which needs far less
REAP_S = 0.5
_CHUNK = 1 << 18
T = TypeVar("T")


class LoaderFailedError(RetryableError):
    """The loader process failed. The rules may be valid, so a new start may succeed: the status is not EX_CONFIG."""


class LoaderProcess(Generic[T]):
    """One loader process. Call `result` or `wait` once."""

    def __init__(self, read: Callable[[], T], file: Path) -> None:
        """Start the child, which calls `read` and sends the result. `file` is the file of the error if the child fails.

        Raises LoaderFailedError if no child can be started.
        """
        self._start(lambda writing: _forked(read, writing), file)

    def _start(self, make: Callable[[int], int], file: Path) -> None:
        """Start the child with `make`, which gets the writing end of the pipe and returns the PID."""
        self._file = file
        self._data = bytearray()
        try:
            self._end, writing = os.pipe()
        except OSError as error:
            raise self._failed(f"cannot start the loader process: {error.strerror}") from error
        try:
            self._pid = make(writing)
        except OSError as error:
            os.close(self._end)
            raise self._failed(f"cannot start the loader process: {error.strerror}") from error
        finally:
            os.close(writing)

    def result(self) -> T:
        """Wait for the result and return it. Raises RulesError."""
        try:
            while chunk := os.read(self._end, _CHUNK):
                self._data += chunk
        finally:
            self._reap()
        return self._decode()

    async def wait(self) -> T:
        """Return the result, without blocking the event loop. Raises RulesError. If cancelled, kill the child."""
        import asyncio  # here, because it takes longer than the imports of the child, which should start first

        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def on_readable() -> None:
            chunk = os.read(self._end, _CHUNK)
            self._data += chunk
            if not chunk and not done.done():
                done.set_result(None)

        loop.add_reader(self._end, on_readable)
        try:
            await asyncio.wait_for(done, LIMIT_S)
        except TimeoutError:
            raise self._failed(f"it took longer than {LIMIT_S:g} s") from None
        finally:
            loop.remove_reader(self._end)
            self._reap(kill=not done.done() or done.cancelled())
        return self._decode()

    def _reap(self, kill: bool = False) -> None:
        os.close(self._end)
        if not kill:
            self._status = os.waitpid(self._pid, 0)[1]
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(OSError):  # without a descriptor it is reaped later
            pidfd = os.pidfd_open(self._pid)
            select.select([pidfd], [], [], END_S)
            os.close(pidfd)
        self._reap_killed()

    def _reap_killed(self) -> None:
        """Reap the killed child now or later: a disk that does not respond may keep it for a while."""
        import asyncio

        if os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            asyncio.get_running_loop().call_later(REAP_S, self._reap_killed)

    def _decode(self) -> T:
        if self._status != 0:
            raise self._failed(f"the loader process ended with {describe(self._status)}")
        try:
            result, problems = pickle.loads(self._data)  # noqa: S301  # only the child has the other end of the pipe
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._failed("the loader process exited without output") from error
        if problems:
            raise RulesError(problems)
        return cast(T, result)

    def _failed(self, cause: str) -> LoaderFailedError:
        hint = "try again; `cnprocctl check` reads the same files"
        return LoaderFailedError([Problem(self._file, 0, 0, f"cannot load the rules: {cause}", hint=hint)])


class DigestsProcess(LoaderProcess[dict[Path, str]]):
    """A process that reads the digests of the rule files (rule_files.py): a new interpreter, not a fork of the daemon.

    fork(2) copies the page tables of the daemon, for milliseconds in which it reads no event. A reload is worth that; a
    comparison once a minute and at each `status` is not. posix_spawn(3) copies nothing.
    """

    def __init__(self, main_file: Path | None, file: Path) -> None:
        """Raises LoaderFailedError if no process can be started."""
        script = Path(__file__).with_name("digests_child.py")
        command = [sys.executable, "-IS", str(script), str(script.parents[2])]
        command += [] if main_file is None else [str(main_file)]
        self._start(lambda writing: _spawned(command, writing), file)


def _spawned(command: list[str], writing: int) -> int:
    return os.posix_spawn(
        command[0],
        command,
        {"PATH": "/usr/bin:/bin"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, writing, 1),
        ],
        setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE],
        setsigmask=[],
    )


def _forked(read: Callable[[], object], writing: int) -> int:
    sys.stdout.flush()  # else the child has a copy of the unwritten text
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os._exit(_run_child(read, writing))
    return pid


def _run_child(read: Callable[[], object], writing: int) -> int:
    """Write the result of `read`, and the problems of its RulesError, to the pipe. Return the exit status."""
    try:
        signal.set_wakeup_fd(-1)  # signals of the child must not wake the loop of the parent
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        gc.disable()  # a collection writes to pages that are shared with the parent, for memory that is freed at once
        os.closerange(3, writing)
        os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))
        result: object = None
        problems: tuple[Problem, ...] = ()
        try:
            result = read()
        except RulesError as error:
            problems = error.problems
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump((result, problems), pipe, pickle.HIGHEST_PROTOCOL)
    except BrokenPipeError:  # the parent ended, for a reason that it reports itself
        return 1
    except BaseException:  # an exception must not continue in the child as if it were the daemon
        with contextlib.suppress(OSError):
            os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
        return 1
    return 0
