"""Real processes that die in known ways, as the user oracle of the private machine, and a history of past matches."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from console import ORACLE

from cnprocd.json_value import JsonDict
from cnprocd.spool.rows import PastMatch
from cnprocd.spool.spool import Spool

NS = 1_000_000_000
_LIBC = ctypes.CDLL(None)
HOSTILE = {
    "markup": b"<img src=x>",
    "escapes": b"\x1b[31mred\x07",
    "right to left": "a\u202egpj.x".encode(),
    "not UTF-8": b"\xff\xfebin",
}
MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def _forked(body: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(ORACLE)
            os.setuid(ORACLE)
            body()
        finally:
            os._exit(77)
    return pid


def _named(comm: bytes) -> None:
    _LIBC.prctl(15, comm, 0, 0, 0)


def fail(comm: str | bytes, code: int = 3) -> int:
    """Let a process of this name exit. Return its PID."""
    name = comm.encode() if isinstance(comm, str) else comm

    def end() -> None:
        _named(name)
        os._exit(code)

    pid = _forked(end)
    os.waitpid(pid, 0)
    return pid


def waiting(comm: str) -> int:
    """Start a process of this name that waits for a signal. Return its PID."""
    ready, done = os.pipe()

    def wait() -> None:
        _named(comm.encode())
        os.write(done, b"x")
        signal.pause()

    pid = _forked(wait)
    os.close(done)
    os.read(ready, 1)
    os.close(ready)
    return pid


def kill(pid: int) -> float:
    """Kill a child with SIGKILL. Return the time."""
    at_s = time.time()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return at_s


def fail_with_arguments(*arguments: str) -> int:
    """Let a shell with these arguments fail, once the daemon had time to read them. Return its PID."""
    pid = _forked(lambda: os.execv("/bin/sh", ["sh", "-c", "sleep 2; exit 4", *arguments]))
    os.waitpid(pid, 0)
    return pid


def write_history(state_dir: Path, count: int, hours: float) -> None:
    """Write past matches into the spool of a daemon that does not run, spread over the last hours."""
    chance = random.Random(19)
    now_ns = time.time_ns()
    names = [
        ("oracle-process-died", "ora_pmon_PROD", "oracle.service"),
        ("worker-failed", "ora_worker", "jobs.service"),
        ("session-failed", "ora_session", None),
    ]
    times = sorted(now_ns - int(chance.random() ** 1.3 * hours * 3600 * NS) for _ in range(count))
    _record(state_dir, [_past(n, at_ns, *names[chance.choice((0, 1, 1, 1, 2, 2))]) for n, at_ns in enumerate(times)])


def write_matches(state_dir: Path, first: int, times_s: Sequence[float], comm: str, unit: str) -> None:
    """Write past matches of one unit, numbered from `first`, as write_history does."""
    matches = [
        _past(number, int(at_s * NS), "unit-failed", comm, unit) for number, at_s in enumerate(times_s, start=first)
    ]
    _record(state_dir, matches)


def _past(number: int, at_ns: int, rule: str, comm: str, unit: str | None) -> PastMatch:
    killed = rule == "oracle-process-died"
    record: JsonDict = {
        "rule": rule, "kind": "nonzero_exit", "pid": 100_000 + number, "tid": 100_000 + number, "comm": comm,
        "ppid": 1, "uid": ORACLE, "gid": ORACLE, "user": "oracle", "unit": unit, "recovered": False,
        "exit_code": None if killed else 3, "signal": "SIGKILL" if killed else None, "core_dumped": False,
        "status": "SIGKILL" if killed else "exit code 3", "kernel_time_ns": number, "boot_id": "former",
        "match_id": f"former-{number}",
    }  # fmt: skip
    return PastMatch(at_ns, rule, comm, 100_000 + number, record)


def _record(state_dir: Path, matches: list[PastMatch]) -> None:
    spool = Spool.open(state_dir, log=_silent)
    spool.record_matches(matches)
    spool.close()


def _silent(level: str, event: str, **fields: object) -> None:
    """Log nothing: what the spool reports is not of interest here."""
