"""Blockers: everything outside the daemon that can make it wait, each done for real and undone whatever happens.

Each blocker is a context manager that is in force inside the `with` block. `Endurance` runs a daemon beside it: while
the block lasts, a process fails every 100 ms, and its truth is waitpid(). See test_edges.py for what must hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from kernel.cpu_waits import EVERY_S as EVERY_SAMPLE_S
from kernel.cpu_waits import CpuWaits, own_cpu_wait_s, owner_of
from kernel.harness import LIBC, PATIENCE_S, Daemon, child, rename, wait_status

from cnprocd.control.client import Client
from cnprocd.control.protocol import Call, method_of, pack
from cnprocd.errors import CnprocdError
from cnprocd.spool.rows import PastMatch
from cnprocd.spool.spool import Spool

HERE = Path(__file__).parent / "blockers"
BLOCKED_S = float(os.environ.get("CNPTEST_BLOCKED_S", "3"))  # CNPTEST_BLOCKED_S=60 for the long run
EVERY_S = 0.1
PROMISE_S = 1.0
STOP_BOUND_S = 12.0
NOBODY = 65534
MNT_DETACH = 2
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878


def compiled(directory: Path, source: str, *options: str) -> Path:
    """Compile a C source of blockers/. Skips the test where there is no compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    target = directory / Path(source).stem
    subprocess.run(["gcc", "-O1", *options, "-o", str(target), str(HERE / source)], check=True)
    return target


# -- /proc -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hanging_process(kind: str) -> Iterator[int]:
    """A process of the user `nobody` that hangs in execve(2) or mmap(2), and whose children fail. Yields its PID."""
    with tempfile.TemporaryDirectory(prefix="cnptest-") as directory:
        os.chmod(directory, 0o755)
        device, mount = Path(directory, "fuse"), Path(directory, "mount")
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(10, 229))
        device.chmod(0o666)
        mount.mkdir()
        os.chown(mount, NOBODY, NOBODY)
        server = subprocess.Popen(
            [sys.executable, "-IS", str(HERE / "unanswered_fuse.py"), kind, str(device), str(mount)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdin is not None and server.stdout is not None
        victim = 0
        try:
            victim = int(server.stdout.readline())
            while not _waits_for_ever(victim, {"execve": "stat", "mmap": "cmdline"}[kind]):
                assert server.poll() is None
            yield victim
        finally:
            server.stdin.close()
            server.wait(PATIENCE_S)
            if victim:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)


def _waits_for_ever(pid: int, name: str) -> bool:
    """Whether a file of a process cannot be read."""
    reader = subprocess.Popen(["cat", f"/proc/{pid}/{name}"], stdout=subprocess.DEVNULL)
    try:
        reader.wait(0.1)
    except subprocess.TimeoutExpired:
        return True
    finally:
        reader.kill()  # the wait is killable
        reader.wait()
    return False


# -- names -------------------------------------------------------------------------------------------------------


class SleepyNames:
    """A name service for a daemon that is started `under` it with `env`; it answers except in `with blocked():`."""

    def __init__(self, directory: Path) -> None:
        library = compiled(directory, "sleepy_nss.c", "-shared", "-fPIC")
        library.rename(directory / "libnss_sleepy.so.2")
        self._switch = directory / "nsswitch.conf"
        self._switch.write_text("passwd: files sleepy\ngroup: files sleepy\n")
        self._asleep = directory / "asleep"
        self.env = {"LD_LIBRARY_PATH": str(directory), "SLEEPY_NSS": str(self._asleep)}
        mounts = f'mount --bind {self._switch} /etc/nsswitch.conf && exec "$@"'
        self.under = ("unshare", "--mount", "sh", "-c", mounts, "sh")

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        self._asleep.touch()
        try:
            yield
        finally:
            self._asleep.unlink(missing_ok=True)


# -- the log -----------------------------------------------------------------------------------------------------


class StoppedJournal:
    """Both sockets of journald, in a mount namespace of the daemon's own; read except in `with blocked():`."""

    def __init__(self, directory: Path) -> None:
        run = directory / "journal"
        run.mkdir()
        self.records: list[bytes] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(run / "socket"))
        self._stream = socket.socket(socket.AF_UNIX)
        self._stream.bind(str(run / "stdout"))
        self._stream.listen(1)
        self._go = threading.Event()
        self._go.set()
        mounts = f"mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind {run} /run/systemd/journal"
        self.under = ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            self._go.wait()
            datagram = self._socket.recv(1 << 20)
            self.records.append(datagram)

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        self._go.clear()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, contextlib.suppress(BlockingIOError):
            filler.setblocking(False)
            while True:  # what systemd's queue takes is taken, as it is soon after journald stops
                filler.sendto(b"MESSAGE=filler\n", self._socket.getsockname())
        try:
            yield
        finally:
            self._go.set()


class UnreadPipe:
    """A standard output that is read except in `with blocked():`, and is small, so that it is full at once."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        self._go = threading.Event()
        self._go.set()
        self.lines: list[bytes] = []
        self._rest = b""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        while True:
            self._go.wait()
            data = os.read(self.reader, 1 << 16)
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            self.lines += lines

    def records(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines]

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()


@contextlib.contextmanager
def small_disk(directory: Path, size: str = "64k") -> Iterator[Path]:
    """A tiny tmpfs."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)], check=True)
    try:
        yield directory
    finally:
        LIBC.umount2(str(directory).encode(), MNT_DETACH)


# -- the disk ----------------------------------------------------------------------------------------------------


class FrozenDisk:
    """An ext4 file system on a loop device; frozen in `with blocked():`."""

    def __init__(self, directory: Path) -> None:
        image = directory / "disk.img"
        self.directory = directory / "disk"
        self.directory.mkdir()
        with image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        mounted = subprocess.run(["mount", "-o", "loop", str(image), str(self.directory)], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"no loop mount here: {mounted.stderr.decode().strip()}")

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        fd = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FIFREEZE, 0)
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, FITHAW, 0)
            os.close(fd)

    def close(self) -> None:
        LIBC.umount2(str(self.directory).encode(), MNT_DETACH)


# -- the service manager, the control socket, the runner ---------------------------------------------------------


class DeafManager:
    """A NOTIFY_SOCKET that is read except in `with blocked():`."""

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self.env = {"NOTIFY_SOCKET": self._path, "WATCHDOG_USEC": "2000000"}
        self.messages: list[bytes] = []
        self._go = threading.Event()
        self._go.set()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            self._go.wait()
            self.messages.append(self._socket.recv(4096))

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        self._go.clear()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, contextlib.suppress(BlockingIOError):
            filler.setblocking(False)
            while True:
                filler.sendto(b"STATUS=filler", self._path)
        try:
            yield
        finally:
            self._go.set()


@contextlib.contextmanager
def greedy_clients(runtime_dir: Path, count: int = 3) -> Iterator[None]:
    """Clients that ask for a thousand past matches again and again, and read nothing."""
    clients = [Client(runtime_dir) for _ in range(count)]
    try:
        for client in clients:
            client._socket.setblocking(False)
            with contextlib.suppress(OSError, CnprocdError):
                for _ in range(100):
                    client._socket.send(pack(Call(method_of("history"), {"limit": 1000})))
        yield
    finally:
        for client in clients:
            client._socket.close()


@contextlib.contextmanager
def runner_service(directory: Path) -> Iterator[tuple[Path, int]]:
    """The runner as its socket unit starts it, on rules.yaml of the directory. Yields its socket and its PID."""
    path = directory / "runner.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        options = f"--rules {directory}/rules.yaml --state-dir {directory}/runner --user nobody --idle 600"
        move = f"exec 3<&{listener.fileno()}; LISTEN_PID=$$ exec {sys.executable} -m cnprocd.cli.runner"
        with (directory / "runner.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    "bash",
                    "-c",
                    f"{move} {options}",
                ],
                pass_fds=[listener.fileno()],
                env={**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "runner"},
                stdout=log,
                stderr=log,
            )
    try:
        yield path, process.pid
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP for a process."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# -- storms ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fork_storm(directory: Path, *arguments: str, loops: int = 2, source: str = "fork_storm.c") -> Iterator[list[int]]:
    """Loops of vfork and _exit(1) by an unprivileged user. Yields a list that holds their counts after the end."""
    with tempfile.TemporaryDirectory(prefix="cnptest-") as public:  # the user may not enter the test's own directory
        os.chmod(public, 0o755)
        command = [str(compiled(Path(public), source)), *arguments]
        outputs = [directory / f"storm-{number}" for number in range(loops)]
        processes = []
        for output in outputs:
            with output.open("wb") as file:
                processes.append(subprocess.Popen(command, stdout=file, user=NOBODY, group=NOBODY, extra_groups=[]))
    counts: list[int] = []
    try:
        yield counts
        for process in processes:
            process.terminate()
            process.wait(PATIENCE_S)
        counts += [int(output.read_bytes()) for output in outputs]
    finally:
        for process in processes:
            process.kill()
            process.wait()


# -- what must hold ----------------------------------------------------------------------------------------------


RULES = """
rules:
  - name: seen
    events: [nonzero_exit]
    match: {{comm: cnptest-by, exit_code: 5}}
    run: {{command: [{hook}, "{{pid}}"], timeout: 20s}}
{more}
$MARKER
"""


class Timed(Daemon):
    """A daemon whose records have the moment at which they were written, in seconds since 1970, as `written`."""

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            record = json.loads(line)
            written = datetime.fromisoformat(str(record["timestamp"])).timestamp()
            self._incoming.put(record | {"written": written})
        self._incoming.put(None)

    def read_rest(self) -> None:
        """Take the records up to the end of the process, which has ended."""
        while (record := self._incoming.get(timeout=PATIENCE_S)) is not None:
            self.records.append(record)


class Endurance:
    """Lives through a block beside a daemon: deaths every 100 ms, questions for its status, and what became of them."""

    def __init__(self, directory: Path, more: str = "") -> None:
        self.directory = directory
        self.ran = directory / "ran"
        self.ran.touch()
        self.ran.chmod(0o666)
        hook = directory / "hook"
        hook.write_text(f'#!/bin/sh\necho "$1" >> {self.ran}\n')
        hook.chmod(0o755)
        self.rules = RULES.format(hook=hook, more=more)
        self.died_at: dict[int, float] = {}
        self.slowest_status_s = 0.0  # without what a busy machine took
        self.waits = CpuWaits()
        self.status: dict[str, object] = {}

    def fail(self, uid: int | None = None) -> int:
        """One process that fails now; its PID."""

        def body() -> None:
            if os.getpid() in self.died_at:
                os._exit(0)  # in a minute of a storm PIDs are used again
            rename("cnptest-by")
            if uid is not None:
                os.setresuid(uid, uid, uid)
            os._exit(5)

        while True:
            pid = child(body)
            code = os.waitstatus_to_exitcode(wait_status(pid))
            if pid not in self.died_at:
                assert code == 5, code
                self.died_at[pid] = time.time()
                return pid

    def fill_history(self, state_dir: Path, size: int) -> None:
        """A history of so many bytes, before the daemon starts."""
        count = 1000
        record: dict[str, object] = {"rule": "old", "comm": "old", "cmdline": "x" * (size // count)}
        spool = Spool.open(state_dir, log=lambda *_, **__: None)
        spool.record_matches([PastMatch(time.time_ns(), "old", "old", number, record) for number in range(count)])
        spool.close()

    def live(self, runtime_dir: Path, for_s: float = BLOCKED_S, uid: int | None = None) -> None:
        """A death every 100 ms for so long, and a status all the time."""
        over = threading.Event()
        asking = threading.Thread(target=self._ask, args=(runtime_dir, over))
        with self.waits.sampled(owner_of(runtime_dir / "control.sock")):
            asking.start()
            end = time.monotonic() + for_s
            while time.monotonic() < end:
                self.fail(uid)
                time.sleep(EVERY_S)
            over.set()
            asking.join(PATIENCE_S)
            time.sleep(PROMISE_S)  # in which the last death must be reported

    def _ask(self, runtime_dir: Path, over: threading.Event) -> None:
        while True:
            began, waited_s = time.time(), own_cpu_wait_s()
            try:
                with Client(runtime_dir, timeout_s=5.0) as client:
                    status = client.ask("status")
                assert isinstance(status, dict)
                self.status = dict(status)
            except CnprocdError:
                self.slowest_status_s = float("inf")
            ended = time.time()
            time.sleep(2 * EVERY_SAMPLE_S)  # the wait of this time is in the next sample
            waited_s = own_cpu_wait_s() - waited_s + self.waits.between_s(began, ended)
            self.slowest_status_s = max(self.slowest_status_s, ended - began - waited_s)
            if over.wait(0.2):
                return

    # What must hold.

    def assert_answered(self) -> None:
        assert self.slowest_status_s < PROMISE_S, f"status took {self.slowest_status_s:.1f} s"

    def assert_reported(self, records: list[dict[str, object]]) -> float:
        """Each death so far was reported within the promised time. `records` have `written`. Returns the slowest."""
        print(f"\n{self.figures(records)}")
        after_s = self.reported_after_s(records)
        missing = len(self.died_at) - len(after_s)
        assert not missing, f"{missing} of {len(self.died_at)} deaths are not reported"
        assert max(after_s) < PROMISE_S, f"a death was reported after {max(after_s):.1f} s"
        return max(after_s)

    def reported_after_s(self, records: list[dict[str, object]]) -> list[float]:
        """How long after each death its match was reported, without the time that the daemon waited for a CPU."""
        written: dict[object, float] = {}
        for record in records:
            died_at, at = self.died_at.get(int(str(record.get("pid") or 0))), float(str(record["written"]))
            if record.get("rule") == "seen" and died_at is not None and at > died_at - PROMISE_S:
                written.setdefault(record["pid"], at)  # a later one is of another process with this PID
        times = [(at, written[pid]) for pid, at in self.died_at.items() if pid in written]
        return [reported - at - self.waits.between_s(at, reported) for at, reported in times]

    def figures(self, records: list[dict[str, object]]) -> str:
        """The figures of what must hold, for the long forms."""
        after_s = sorted(self.reported_after_s(records)) or [float("nan")]
        ran = set(self.hooks_ran()) & set(self.died_at)
        return (
            f"{len(after_s)} of {len(self.died_at)} deaths reported, after {after_s[-1]:.2f} s at most and"
            f" {after_s[len(after_s) // 2]:.2f} s in the median; {len(ran)} of their hooks ran;"
            f" status within {self.slowest_status_s:.2f} s"
        )

    def hooks_ran(self) -> Counter[int]:
        return Counter(map(int, self.ran.read_text().split()))

    def assert_hooks_ran(self, patience_s: float = PATIENCE_S) -> None:
        """Each hook has run, at most so long after now."""
        missing = self.wait_for_hooks(patience_s)
        assert not missing, f"the hooks of {len(missing)} of {len(self.died_at)} deaths did not run"

    def wait_for_hooks(self, patience_s: float = PATIENCE_S) -> set[int]:
        """Wait until each hook has run, at most so long. Return the PIDs whose hook has not."""
        deadline = time.monotonic() + patience_s
        while (missing := set(self.died_at) - set(self.hooks_ran())) and time.monotonic() < deadline:
            time.sleep(0.01)
        return missing

    def assert_nothing_doubled(self) -> None:
        doubled = {pid: count for pid, count in self.hooks_ran().items() if count > 1}
        assert not doubled, f"hooks ran more than once: {doubled}"

    def assert_stops(self, process: subprocess.Popen[bytes]) -> float:
        """SIGTERM ends the daemon within its bound. Returns how long it took."""
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_BOUND_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"SIGTERM did not end the daemon within {STOP_BOUND_S:g} s") from None
        took_s = time.monotonic() - began
        assert status == 0, f"exit status {status} after {took_s:.1f} s"
        return took_s
