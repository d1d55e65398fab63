"""Rules read in a process of their own, which ends when it has said what they are.

What a rule file needs to be read (pydantic, YAML, the models, its own text and tree) is needed for a tenth of a second
and would stay for ever: a third of the daemon's memory. And a file of ten thousand rules takes a second or two to
check, in which nobody would read events. So a child reads and checks, and hands over plain values (ruleset.py).

fork() and not a fresh interpreter: at start the parent goes on with its own imports beside the child, and a reload
finds most modules there. Facts: the child has one thread, as the daemon has; it leaves by _exit(), so that nothing
of the parent's is flushed or closed a second time; it lets go of every descriptor but the pipe first, so that no socket
of ours outlives us in it. What comes through the pipe is unpickled: it comes of our own code under our own user.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from cnprocd.connector.status import describe
from cnprocd.errors import EX_OSERR
from cnprocd.rules.problems import LoadedRules, Problem, RulesError

LIMIT_S = 60.0  # for files on a disk that does not answer; systemd gives a start or reload 90 s
_CHUNK = 1 << 18
_Told = LoadedRules | tuple[Problem, ...]


class UnreadRulesError(RulesError):
    """Nobody could read the rules just now. They may be right, so a start is worth trying again: not EX_CONFIG."""

    exit_status = EX_OSERR


class Reading:
    """One child that reads. Ask for its result once."""

    def __init__(self, read: Callable[[], LoadedRules], file: Path) -> None:
        """`read` is carried out in the child, and raises RulesError; `file` is what to name if the child fails.

        Raises RulesError if there can be no child now.
        """
        self._file = file
        self._data = bytearray()
        self._end, writing = os.pipe()
        sys.stdout.flush()  # or the child would have our unwritten text as well
        sys.stderr.flush()
        try:
            self._pid = os.fork()
        except OSError as error:
            os.close(self._end)
            raise self._failed(f"no process to read them with: {error.strerror}") from error
        finally:
            if getattr(self, "_pid", -1) != 0:
                os.close(writing)
        if self._pid == 0:
            os._exit(_tell(read, writing))

    def result(self) -> LoadedRules:
        """Wait for it. Raises RulesError."""
        try:
            while chunk := os.read(self._end, _CHUNK):
                self._data += chunk
        finally:
            self._reap()
        return self._judge()

    async def wait(self) -> LoadedRules:
        """The same, while the event loop goes on. Raises RulesError; if cancelled, the child ends with us."""
        import asyncio  # not above: it takes longer than the child's own imports, and the child is to begin first

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
            raise self._failed(f"that took longer than {LIMIT_S:g} s") from None
        finally:
            loop.remove_reader(self._end)
            self._reap(kill=not done.done() or done.cancelled())
        return self._judge()

    def _reap(self, kill: bool = False) -> None:
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        os.close(self._end)
        self._status = os.waitpid(self._pid, 0)[1]

    def _judge(self) -> LoadedRules:
        if self._status != 0:
            raise self._failed(f"the process that read them ended with {describe(self._status)}")
        try:
            told: _Told = pickle.loads(self._data)  # noqa: S301  # of our own code, by a pipe that nobody else has
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._failed("the process that read them said nothing") from error
        if isinstance(told, tuple):
            raise RulesError(told)
        return told

    def _failed(self, why: str) -> UnreadRulesError:
        hint = "try again; `cnprocctl check` reads the same files"
        return UnreadRulesError([Problem(self._file, 0, 0, f"the rules could not be read: {why}", hint=hint)])


def _tell(read: Callable[[], LoadedRules], writing: int) -> int:
    """The child's whole life; returns its exit status."""
    try:
        signal.set_wakeup_fd(-1)  # the parent's loop must not hear of our signals
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        gc.disable()  # it would write to pages that we share with the parent, for memory that is gone in a moment
        os.closerange(3, writing)
        os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))
        told: _Told
        try:
            told = read()
        except RulesError as error:
            told = error.problems
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(told, pipe, pickle.HIGHEST_PROTOCOL)
    except BrokenPipeError:  # the parent is gone; it has said why, or was told to go
        return 1
    except BaseException:  # whatever it is, it must not go on in here as if it were the daemon
        with contextlib.suppress(OSError):
            os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
        return 1
    return 0
