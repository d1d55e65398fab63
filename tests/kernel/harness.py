"""A real cnprocd as a process, and real processes that die in known ways: the parts of all kernel tests.

The expected values come from waitpid(), never from cnprocd. Synchronisation comes from markers: a process of a known
name fails after everything else happened. The socket is a queue, so a record of the marker means that every event
before it was evaluated.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cnprocd.control.client import Client

LIBC = ctypes.CDLL(None, use_errno=True)
# How long a test waits for anything. An emulated machine of another architecture sets the factor.
PATIENCE_S = 30.0 * float(os.environ.get("CNPTEST_PATIENCE", "1"))
SYS_EXIT = {"x86_64": 60, "aarch64": 93}[os.uname().machine]

MARKER = """
  - name: marker
    events: [nonzero_exit]
    match: {comm: cnptest-mark, exit_code: 99}
"""


class Daemon:
    """A running cnprocd with JSON records on a pipe."""

    def __init__(
        self,
        directory: Path,
        rules: str,
        *options: str,
        env: dict[str, str] | None = None,
        under: Sequence[str] = (),
        standard_files: bool = False,
    ) -> None:
        """`under`: a command that execs its arguments (unshare, prlimit, ...), so that the PID stays.

        `standard_files`: the daemon reads the standard rule files, which `under` may have replaced.
        """
        files = () if standard_files else ("--rules", str(directory / "rules.yaml"))
        self.directory = directory
        self.rules = directory / "rules.yaml"
        self.write_rules(rules)
        self.state_dir = directory / "state"
        self.program = Path()  # for fixtures: a program that the rules name
        self.records: list[dict[str, object]] = []
        self._incoming: queue.Queue[dict[str, object] | None] = queue.Queue()
        self._markers = itertools.count()
        self.process = subprocess.Popen(
            [
                *under, sys.executable, "-m", "cnprocd.cli.cnprocd", *files, "--log-format", "json",
                "--state-dir", str(self.state_dir), "--runtime-dir", str(directory / "run"), *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def write_rules(self, rules: str) -> None:
        self.rules.write_text(rules.replace("$MARKER", MARKER.strip("\n")))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._incoming.put(json.loads(line))
        self._incoming.put(None)

    def wait_for(self, event: str, patience_s: float = PATIENCE_S, **fields: object) -> dict[str, object]:
        """Return the next record of this class with these fields. Fail if the daemon ends or after PATIENCE_S."""
        deadline = time.monotonic() + patience_s
        for record in self.records:
            if _fits(record, event, fields):
                return record
        while True:
            try:
                record = self._incoming.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(
                    f"no {event} {fields} within {patience_s:g} s; there were:\n{self.tail()}"
                ) from None
            if record is None:
                raise AssertionError(f"cnprocd ended before {event} {fields}:\n{self.tail()}\n{self.stderr()}")
            self.records.append(record)
            if _fits(record, event, fields):
                return record

    def next_record(self) -> dict[str, object]:
        """Wait for the next record of any class."""
        try:
            record = self._incoming.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise AssertionError(f"no further record within {PATIENCE_S:g} s; there were:\n{self.tail()}") from None
        assert record is not None, self.stderr()
        self.records.append(record)
        return record

    def ready(self) -> Daemon:
        self.wait_for("started")
        return self

    def mark(self) -> None:
        """Return when every event before this call has been evaluated."""
        pid = child(lambda: (rename("cnptest-mark"), os._exit(99)))
        os.waitpid(pid, 0)
        self.wait_for("rule_matched", rule="marker", pid=pid)

    def mark_burst(self) -> None:
        """Return when every match before this call is in `records`. On a busy machine a burst is reported later."""
        self.mark()
        with Client(self.directory / "run", PATIENCE_S) as client:
            while (status := client.ask("status"))["events"]["deferred"] or status["jobs"]["deferred"]:
                assert status["events"]["counted"] == 0, "there were more matches than may wait"
                self.next_record()
        self.mark()

    def matches(self, rule: str | None = None, **fields: object) -> list[dict[str, object]]:
        """Return the match records so far, without those of markers."""
        return [
            record
            for record in self.records
            if _fits(record, "rule_matched", fields) and record["rule"] != "marker" and rule in (None, record["rule"])
        ]

    def reload(self, rules: str) -> dict[str, object]:
        """Write new rules and send SIGHUP. Return the record of the outcome."""
        before = len([r for r in self.records if r["event"] in ("rules_loaded", "rules_rejected")])
        self.write_rules(rules)
        self.process.send_signal(signal.SIGHUP)
        while True:
            done = [r for r in self.records if r["event"] in ("rules_loaded", "rules_rejected")]
            if len(done) > before:
                return done[-1]
            record = self._incoming.get(timeout=PATIENCE_S)
            assert record is not None, self.stderr()
            self.records.append(record)

    def stop(self) -> int:
        """Send SIGTERM. Return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE_S)
        while (record := self._incoming.get(timeout=PATIENCE_S)) is not None:
            self.records.append(record)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode() if self.process.poll() is not None else ""

    def tail(self) -> str:
        return "\n".join(json.dumps(record) for record in self.records[-15:])


def _fits(record: dict[str, object], event: str, fields: dict[str, object]) -> bool:
    return record["event"] == event and all(record.get(name) == value for name, value in fields.items())


@contextlib.contextmanager
def running(
    directory: Path, rules: str, *options: str, env: dict[str, str] | None = None, under: Sequence[str] = ()
) -> Iterator[Daemon]:
    """Run a daemon until the end of the block; it is READY at the start."""
    daemon = Daemon(directory, rules, *options, env=env, under=under)
    try:
        yield daemon.ready()
    finally:
        daemon.kill()


def child(body: Callable[[], object]) -> int:
    """Fork. The child runs `body` and must exit there (with 77 if it does not). Return its PID, unreaped."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            body()
        os._exit(77)
    return pid


def wait_status(pid: int) -> int:
    """Return the status of waitpid() for a child: the expected value."""
    return os.waitpid(pid, 0)[1]


def rename(comm: str | bytes) -> None:
    """prctl(PR_SET_NAME) for the calling thread."""
    LIBC.prctl(15, comm if isinstance(comm, bytes) else comm.encode(), 0, 0, 0)


def exit_thread(code: int) -> None:
    """Call the exit system call, which ends the calling thread only."""
    LIBC.syscall(SYS_EXIT, code)


def sleeping_threads(count: int) -> None:
    """Start threads that sleep until the process ends. Return when all are running."""
    barrier = threading.Barrier(count + 1)

    def sleep() -> None:
        barrier.wait()
        threading.Event().wait()

    for _ in range(count):
        threading.Thread(target=sleep, daemon=True).start()
    barrier.wait()


def last_thread(body: Callable[[], object]) -> None:
    """Run `body` in a second thread after the leader, which calls this, has ended with `exit_thread`.

    The end of the leader is detected by its state Z in /proc.
    """
    leader = os.getpid()

    def wait_then() -> None:
        while True:
            with open(f"/proc/{leader}/task/{leader}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    break
        body()

    threading.Thread(target=wait_then).start()


def expected_fields(status: int) -> dict[str, object]:
    """Return the fields of a record for a wait status, by Python's own decoding."""
    if os.WIFEXITED(status):
        return {"exit_code": os.WEXITSTATUS(status), "signal": None, "core_dumped": False}
    return {
        "exit_code": None,
        "signal": signal.Signals(os.WTERMSIG(status)).name,
        "core_dumped": os.WCOREDUMP(status),
    }


HOOK = """
rules:
  - name: clean
    events: [nonzero_exit]
    match: {{comm: "cnptest-*"}}
    run:
      command: [{script}, --pid, "{{pid}}", "--name={{comm}}"]
      timeout: 20s
{marker}
"""


def hook_rules(tmp_path: Path, body: str) -> str:
    """Return rules whose hook is a shell script with this body."""
    script = tmp_path / "hook"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return HOOK.format(script=script, marker="$MARKER")
