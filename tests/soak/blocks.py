"""`soak.py --block`: one edge of the daemon after the other is blocked for ten seconds, at random.

The blockers are those of the kernel tests (tests/kernel/blocking.py). Meanwhile a process fails every 100 ms, and the
status is asked for twice a second. Each death must be reported within PROMISE_S, and each answer must come within it.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
from kernel.blocking import (
    DeafManager,
    FrozenDisk,
    SleepyNames,
    greedy_clients,
    hanging_process,
    runner_service,
    stopped,
)
from kernel.cpu_waits import CpuWaits, own_cpu_wait_s
from kernel.harness import child, rename, wait_status

from cnprocd.control.client import Client
from cnprocd.errors import CnprocdError

BLOCKED_S = 10.0
PAUSE_S = (2.0, 6.0)  # between two blocks
PROMISE_S = 1.0
EVERY_S = 0.1
ASK_EVERY_S = 0.5
UNKNOWN_UID = 54321  # its name is asked for again and again
MARK = "  - {name: mark, events: [nonzero_exit], match: {comm: cnps-mark}}\n"


class Reading:
    """Whether the standard output of the daemon is read."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()

    def wait(self) -> None:
        """Wait until it may be read."""
        self._go.wait()

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()


class Edges:
    """What can be blocked, and how the daemon is started so that it can. Close it with the stack after the daemon."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path) -> None:
        runtime = directory / "run"
        names, manager, self.reading = SleepyNames(directory), DeafManager(directory), Reading()
        self.under = ["nice", "-n", "-10", *names.under]
        self.env = {**os.environ, **names.env, **manager.env}
        self.options: list[str] = []
        self.missing: list[str] = []
        self.blockers: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
            "a process hangs in execve": lambda: hanging_process("execve"),
            "a process hangs in mmap": lambda: hanging_process("mmap"),
            "names": names.blocked,
            "standard output": self.reading.blocked,
            "service manager": manager.blocked,
            "greedy clients": lambda: greedy_clients(runtime),
        }
        try:
            disk = FrozenDisk(directory)
        except pytest.skip.Exception as reason:
            self.missing.append(f"disk: {reason}")
        else:
            stack.callback(disk.close)
            self.options += ["--state-dir", str(disk.directory / "state")]
            self.blockers["disk"] = disk.blocked
        path, runner = stack.enter_context(runner_service(directory))
        self.options += ["--runner", str(path)]
        self.blockers["runner"] = lambda: stopped(runner)

    def keep_only(self, word: str) -> None:
        """Block only the edges whose name contains this word."""
        self.blockers = {name: block for name, block in self.blockers.items() if word in name}

    def block_at_random(self, seed: int, stop: threading.Event, told: Callable[[str], None]) -> None:
        """Block one edge after the other, each once in a random order, again and again."""
        chance = random.Random(seed)
        while not stop.is_set():
            order = sorted(self.blockers)
            chance.shuffle(order)
            for name in order:
                if stop.wait(chance.uniform(*PAUSE_S)):
                    return
                told(name)
                with self.blockers[name]():
                    stop.wait(BLOCKED_S)
                told("")


@dataclass(frozen=True)
class Death:
    """A process of ours that failed. Its exit event comes after its parent was woken, so it has no end here."""

    began_ns: int  # CLOCK_MONOTONIC, before the fork
    died_s: float
    blocked: str


class Promises:
    """Deaths every 100 ms and questions for the status, with how long each took, by the edge that was blocked."""

    def __init__(self, runtime: Path) -> None:
        self.now = ""  # what is blocked
        self.blocks: Counter[str] = Counter()
        self._runtime = runtime
        self._deaths: dict[int, list[Death]] = {}  # by PID: PIDs are used again while the log is blocked
        # PID, kernel_time_ns (None if a rescan found the death), when it was written
        self._records: list[tuple[int, int | None, float]] = []
        self._waits = CpuWaits()  # of the daemon: what a busy machine takes is not counted
        self._answered: list[tuple[str, float, float]] = []  # what was blocked, when it was asked, and answered

    def block(self, name: str) -> None:
        """Note which edge is blocked from now on."""
        self.now = name
        print(time.strftime("%H:%M:%S", time.gmtime()), "blocked:", name or "nothing", flush=True)
        if name:
            self.blocks[name] += 1

    def fail(self, stop: threading.Event) -> None:
        """Let a process fail every 100 ms: root's, and of a user without a name."""
        for number in range(1 << 62):
            began_ns = time.monotonic_ns()
            pid = child(_fails_as(UNKNOWN_UID if number % 2 else 0))
            wait_status(pid)
            self._deaths.setdefault(pid, []).append(Death(began_ns, time.time(), self.now))
            if stop.wait(EVERY_S):
                return

    def ask(self, stop: threading.Event) -> None:
        """Ask for the status twice a second."""
        while not stop.wait(ASK_EVERY_S):
            began_s, waited_s, blocked = time.time(), own_cpu_wait_s(), self.now
            with contextlib.suppress(CnprocdError, OSError), Client(self._runtime, 30.0) as client:
                client.ask("status")
            self._answered.append((blocked, began_s, time.time() - (own_cpu_wait_s() - waited_s)))

    def note(self, record: dict[str, object]) -> None:
        """Take the record of a mark."""
        written_s = datetime.fromisoformat(str(record["timestamp"])).timestamp()
        pid, kernel_time_ns = record["pid"], record["kernel_time_ns"]
        assert isinstance(pid, int)
        assert kernel_time_ns is None or isinstance(kernel_time_ns, int)
        self._records.append((pid, kernel_time_ns, written_s))

    def _reported(self) -> list[tuple[str, float, float]]:
        """Return the deaths that have a record: what was blocked, when it happened, and was written."""
        found: dict[Death, float] = {}
        for pid, kernel_time_ns, written_s in self._records:
            before = [
                death
                for death in self._deaths.get(pid, ())
                if (death.died_s <= written_s if kernel_time_ns is None else death.began_ns <= kernel_time_ns)
            ]
            if before:
                found[before[-1]] = written_s
        return [(death.blocked, death.died_s, written_s) for death, written_s in found.items()]

    def sample(self, pid: int, stop: threading.Event) -> None:
        """Sample how long the daemon waits for a processor."""
        with self._waits.sampled(pid):
            stop.wait()

    def _took(self, times: list[tuple[str, float, float]]) -> list[tuple[str, float]]:
        return [(blocked, ended - began - self._waits.between_s(began, ended)) for blocked, began, ended in times]

    def figures(self) -> dict[str, object]:
        """Return the slowest report and answer for each blocked edge, in seconds, and whether all came in time."""
        reported, answered = self._took(self._reported()), self._took(self._answered)
        unreported = sum(map(len, self._deaths.values())) - len(reported)
        late_reports = sum(took > PROMISE_S for _, took in reported)
        late_answers = sum(took > PROMISE_S for _, took in answered)
        return {
            "blocks": dict(self.blocks),
            "reports": len(reported),
            "unreported": unreported,
            "slowest_report_s": _slowest(reported),
            "slowest_status_s": _slowest(answered),
            "late_reports": late_reports,
            "late_answers": late_answers,
            "kept": not (unreported or late_reports or late_answers),
        }


def _fails_as(uid: int) -> Callable[[], None]:
    def body() -> None:
        rename("cnps-mark")
        if uid:
            os.setresuid(uid, uid, uid)
        os._exit(5)

    return body


def _slowest(times: list[tuple[str, float]]) -> dict[str, float]:
    slowest: dict[str, float] = {}
    for name, took_s in times:
        slowest[name or "nothing"] = max(round(took_s, 3), slowest.get(name or "nothing", 0.0))
    return dict(sorted(slowest.items()))
