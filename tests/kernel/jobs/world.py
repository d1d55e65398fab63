"""The parts of a random run: the journal of what happened, a small disk, failing processes, the daemon and the runner.

The journal is one file to which the hooks and this process append lines (O_APPEND), so its order needs no clock:

    F SERIAL RULE COMM         a process failed: waitpid(2) has returned. SERIAL is its group ID
    S ATTEMPT JOB RULE SERIALS PARENT    a hook started, for these processes
    E ATTEMPT                  it ended with 0; X: with 1
    > WORD ...                 what was done to cnprocd, and what was observed
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from kernel.blocking import FrozenDisk
from kernel.harness import PATIENCE_S
from kernel.jobs import schedule
from kernel.manager import Manager

from cnprocd.control.client import Client
from cnprocd.errors import CnprocdError

HERE = Path(__file__).parent
FIRST_SERIAL = 200_000
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
LONG_S = 3 * PATIENCE_S  # a failed disk is tried every 30 s


def until(what: str, holds: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"waited {patience_s:g} s for: {what}")
        time.sleep(0.01)


class Journal:
    """Appends lines to the journal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def add(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def close(self) -> None:
        os.close(self._fd)


class Records:
    """The log of one daemon: what the schedule waits for, and the phases in which jobs are in memory only."""

    def __init__(self, process: subprocess.Popen[bytes], journal: Journal, log: Path) -> None:
        self.reloads: list[str] = []
        self.marks: set[int] = set()
        self.bugs: list[str] = []
        self._process = process
        self._journal = journal
        self._log = log
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("ab") as log:
            for line in self._process.stdout:
                log.write(line)
                record = json.loads(line)
                event = record["event"]
                if event in ("spool_not_durable", "spool_durable"):
                    self._journal.add("> volatile" if event == "spool_not_durable" else "> durable")
                elif event in ("rules_loaded", "rules_rejected"):
                    self.reloads.append(event)
                elif event == "rule_matched" and record["rule"] == schedule.MARK:
                    self.marks.add(record["gid"])
                elif event in ("event_failed", "runner_protocol", "job_of_no_rule", "spool_damaged"):
                    self.bugs.append(line.decode())


FAILER = """
import os, sys
for line in sys.stdin:
    gid, comm = line.split()
    pid = os.fork()
    if pid == 0:
        with open("/proc/self/comm", "w") as file: file.write(comm)
        os.setresgid(int(gid), int(gid), int(gid))
        os._exit(1)
    os.waitpid(pid, 0)
    print(pid, flush=True)
"""


class Failer:
    """Lets processes fail, one after the other. Each has a group ID of its own, its serial."""

    def __init__(self, journal: Journal, prefix: str) -> None:
        self._journal = journal
        self._prefix = prefix
        self._serial = FIRST_SERIAL
        self._process = subprocess.Popen(
            [sys.executable, "-IS", "-c", FAILER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self, comm: str) -> int:
        """Let a process fail some time soon. Return its serial."""
        self._serial += 1
        assert self._process.stdin is not None
        print(self._serial, comm.replace("cnpj", self._prefix), file=self._process.stdin, flush=True)
        return self._serial

    def ended(self, rule: str, comm: str, serial: int) -> None:
        """Wait for its end."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline()
        self._journal.add(f"F {serial} {rule} {comm}")

    def fail(self, rule: str, comm: str) -> int:
        serial = self.begin(comm)
        self.ended(rule, comm, serial)
        return serial

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class World:
    """cnprocd with its disk, its rules and its clock, in one directory."""

    def __init__(self, directory: Path, *, apart: bool) -> None:
        self.directory = directory
        self.apart = apart
        self._prefix = f"j{os.getpid() % 100_000:05d}"
        self.journal = Journal(directory / "journal")
        self.hook = directory / "hook"
        shutil.copy(HERE / "hook", self.hook)
        self.hook.chmod(0o755)
        self.rules = directory / "rules.yaml"
        self.clock = directory / "clock"
        self.set_clock(0)
        self.version = 0
        self.accepted = self.rules_text()
        self.rules.write_text(self.accepted)
        self.disk = FrozenDisk(directory)
        self.state = self.disk.directory / "state"
        self.bugs: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "runner.sock"))
        self._listener.listen(64)
        runner_state = self.disk.directory / "runner"
        options = ["--state-dir", str(self.state)]
        if apart:
            options += ["--runner", str(directory / "runner.sock"), "--snapshot-dir", str(runner_state / "rules")]
        program = (str(HERE / "wrong_clock.py"), str(self.clock), "cnprocd.cli.cnprocd")
        self.manager = Manager(directory, self.rules, *options, program=program)
        self.daemon: subprocess.Popen[bytes] | None = None
        self.runner: subprocess.Popen[bytes] | None = None
        self.records: Records | None = None
        self.failer = Failer(self.journal, self._prefix)
        self._runner_state = runner_state

    def rules_text(self, *, without: str | None = None) -> str:
        self.version += 1
        text = schedule.rules(str(self.hook), str(self.journal.path), self.version, without=without)
        return text.replace("cnpj", self._prefix)

    def set_clock(self, wrong_s: int) -> None:
        """Let the wall clock of daemon and runner be wrong by so many seconds."""
        new = self.clock.with_suffix(".new")
        new.write_text(str(wrong_s))
        new.replace(self.clock)
        self.journal.add(f"> clock {wrong_s}")

    # -- daemon and runner ---------------------------------------------------------------------------------------

    def start_daemon(self) -> None:
        self.daemon = self.manager.start(subprocess.PIPE)
        self.records = Records(self.daemon, self.journal, self.directory / "daemon.log")
        self.journal.add(f"> started daemon {self.daemon.pid}")

    def end_daemon(self, number: signal.Signals) -> None:
        """Kill or stop the daemon, and wait until its process for the spool has ended. Note what is finished."""
        assert self.daemon is not None
        spool = spool_process(self.daemon.pid)
        self.daemon.send_signal(number)
        self.daemon.wait(LONG_S)
        assert self.records is not None
        self.records.thread.join(PATIENCE_S)
        self.bugs += self.records.bugs
        self.journal.add(f"> {'killed' if number is signal.SIGKILL else 'stopped'} daemon {self.daemon.pid}")
        self.daemon = None
        self._spool = spool

    def await_spool_closed(self) -> None:
        """Wait until the process of the spool of the ended daemon has written all that it was given."""
        until("the end of the spool's process", lambda: not is_process(self._spool, b"disk_child"))
        finished = self.finished()
        if finished:
            self.journal.add("> finished " + ",".join(map(str, finished)))

    def finished(self) -> list[int]:
        """Return the serials of the processes whose jobs have ended, as the file has it."""
        with tempfile.TemporaryDirectory() as copy:
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(f"{self.state}/spool.sqlite3{suffix}", copy)
            with contextlib.closing(sqlite3.connect(f"{copy}/spool.sqlite3")) as db:
                rows = db.execute("SELECT record FROM events JOIN jobs USING (job_id) WHERE +state IN ('done', 'dead')")
                return sorted(json.loads(record)["gid"] for (record,) in rows)

    def start_runner(self) -> None:
        if not self.apart:
            return
        program = f"{HERE}/wrong_clock.py {self.clock} cnprocd.cli.runner --rules {self.rules}"
        options = f"--state-dir {self._runner_state} --user nobody --idle 600"
        command = f"exec 3<&{self._listener.fileno()}; LISTEN_PID=$$ exec {sys.executable} {program} {options}"
        with (self.directory / "runner.log").open("ab") as log:
            self.runner = subprocess.Popen(
                ["bash", "-c", command],
                pass_fds=[self._listener.fileno()],
                env={**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "runner"},
                stdout=log,
                stderr=log,
            )
        self.journal.add(f"> started runner {self.runner.pid}")

    def end_runner(self, number: signal.Signals) -> None:
        if self.runner is None:
            return
        self.runner.send_signal(number)
        self.runner.wait(LONG_S)
        self.journal.add(f"> {'killed' if number is signal.SIGKILL else 'stopped'} runner {self.runner.pid}")
        self.runner = None

    # -- rules ---------------------------------------------------------------------------------------------------

    def reload(self, text: str) -> str:
        """Write the rules and send SIGHUP. Return the record's name of the outcome."""
        assert self.daemon is not None and self.records is not None
        reloads = self.records.reloads
        before = len(reloads)
        self.rules.write_text(text)
        self.daemon.send_signal(signal.SIGHUP)
        until("the outcome of a reload", lambda: len(reloads) > before)
        return reloads[-1]

    def load_new_rules(self) -> None:
        text = self.rules_text()
        outcome = self.reload(text)
        assert outcome == "rules_loaded", outcome
        self.accepted = text

    def mark(self) -> None:
        """Return when all processes that failed before have been matched. The event of a mark may be lost as well."""
        assert self.records is not None
        marks = self.records.marks
        for _ in range(20):
            serial = self.failer.fail(schedule.MARK, schedule.MARK_COMM)
            with contextlib.suppress(AssertionError):
                until("the mark", lambda serial=serial: serial in marks, 5.0)
                return
        raise AssertionError("no mark was matched")

    # -- disk ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def frozen_disk(self):
        with self.disk.blocked():
            self.journal.add("> frozen")
            yield
        self.journal.add("> thawed")

    @contextlib.contextmanager
    def full_disk(self):
        """No block of the disk is free."""
        filler = self.disk.directory / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))
        self.journal.add("> full")
        try:
            yield
        finally:
            filler.unlink()
            self.journal.add("> free")

    def await_durable(self) -> None:
        until("a durable spool", lambda: self.status().get("durable"), LONG_S)
        self.journal.add("> durable")

    # -- questions -----------------------------------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """Return the counts of jobs, or nothing if the daemon does not answer."""
        with contextlib.suppress(CnprocdError, OSError), Client(self.directory / "run", PATIENCE_S) as client:
            jobs = client.ask("status")["jobs"]
            assert isinstance(jobs, dict)
            return jobs
        return {}

    def note_drops(self) -> None:
        self.journal.add(f"> drops {self.manager.drops()}")

    def close(self) -> None:
        self.failer.close()
        for process in (self.daemon, self.runner):
            if process is not None:
                process.kill()
                process.wait()
        self._listener.close()
        self.journal.close()
        with contextlib.suppress(OSError):
            fd = os.open(self.disk.directory, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, FITHAW, 0)
            os.close(fd)
        end_hooks(str(self.journal.path))
        self.disk.close()


def end_hooks(journal: str) -> None:
    """End what is left of hooks that write to this journal."""
    wanted = f"JOURNAL={journal}".encode()
    for pid in _numbers(Path("/proc").iterdir()):
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)


def _numbers(paths: Iterable[Path]) -> list[int]:
    return [int(path.name) for path in paths if path.name.isdecimal()]


def spool_process(parent: int) -> int:
    """Return the PID of the daemon's process for the spool, or 0."""
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if is_process(int(pid), b"disk_child"):
                return int(pid)
    return 0


def is_process(pid: int, word: bytes) -> bool:
    """Whether a process has this word in its command line."""
    with contextlib.suppress(OSError):
        return pid > 0 and word in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
