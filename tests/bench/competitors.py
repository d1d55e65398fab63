"""The measured listeners: how each is installed, started, known to be ready, and stopped.

A competitor that cannot be installed or does not run here returns the reason, which is part of the results: a gap in a
table must not look like a win. The output of competitors that print goes to /dev/null, the cheapest destination.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import machine

HERE = Path(__file__).parent
TOP = HERE.parents[1]
BUILD = TOP / ".bench"
PATIENCE_S = 60.0
# The priority of cnprocd's unit, for all listeners: a late reader loses events, and on two CPUs a storm of four
# generators leaves a listener of equal priority no time to read.
NICE = -10


class Running:
    """A listener that is ready."""

    def __init__(self, argv: list[str], directory: Path, env: dict[str, str]) -> None:
        self.program = argv[0]
        self.directory = directory
        self.output = directory / "output"
        self.began = time.monotonic()
        with self.output.open("wb") as output:
            command = ["nice", "-n", str(NICE), *argv]  # nice execs, so the PID is the listener's
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **env})

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Wait until `holds`. Raise TimeoutError, or RuntimeError if the listener died."""
        deadline = time.monotonic() + patience_s
        while not holds():
            self.must_live()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.program}: timed out after {patience_s:g} s")
            time.sleep(0.005)

    def must_live(self) -> None:
        """Raise RuntimeError with the last line of output if the listener died: that is a result, too."""
        if self.process.poll() is not None:
            words = self.output.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"died with status {self.process.returncode}: {' '.join(words)[:200]}")

    def stop(self) -> str:
        """Stop the listener and return its output."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        text = self.output.read_text(errors="replace")
        shutil.rmtree(self.directory, ignore_errors=True)
        return text


@dataclass
class Competitor:
    """One competitor. `why_not` installs it if need be, and returns the reason if it cannot run."""

    name: str
    argv: list[str]
    why_not: Callable[[], str | None] = lambda: None
    says_ready: bool = True  # prints "ready"; else its socket is looked up
    prints: bool = False  # a line for each event, which is discarded
    rules: str | None = None
    most: int | None = None  # the largest storm that it survives, in processes

    def start(self, env: dict[str, str] | None = None) -> Running:
        directory = Path(tempfile.mkdtemp(prefix="cnprocd-bench-"))
        argv = self.argv
        if self.rules is not None:
            (directory / "rules.yaml").write_text(self.rules)
            places = {"--rules": "rules.yaml", "--state-dir": "state", "--runtime-dir": "run"}
            argv = [*argv, *(text for key, name in places.items() for text in (key, str(directory / name)))]
        if self.prints:
            argv = ["/bin/sh", "-c", 'exec "$@" >/dev/null', "sh", *argv]
        running = Running(argv, directory, env or {})
        if self.rules is not None:
            running.wait_for(lambda: b'"event":"started"' in running.output.read_bytes())
        elif self.says_ready:
            running.wait_for(lambda: b"ready" in running.output.read_bytes())
        else:
            running.wait_for(lambda: bool(machine.sockets(running.pid)))
            time.sleep(0.2)
        return running


def _compiled(name: str) -> str | None:
    """Compile one of the C programs here; statically if possible, which makes its exec cheap."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "no C compiler (cc) here"
    BUILD.mkdir(exist_ok=True)
    command = [compiler, "-O2", "-Wall", "-o", str(BUILD / name), str(HERE / f"{name}.c")]
    if subprocess.run([*command, "-static"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return f"{name}.c does not compile: {done.stderr[-200:]}" if done.returncode else None


def _debian(program: str) -> str | None:
    if shutil.which(program):
        return None
    if shutil.which("apt-get") is None:
        return "not installed, and no apt-get to install it with"
    print(f"installing {program} (apt-get)", flush=True)
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        return f"apt-get install {program} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return None


def _pyroute2() -> str | None:
    python = BUILD / "venv/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(BUILD / "venv")], check=True)
    if (
        subprocess.run(
            [str(python), "-c", "import pyroute2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode
        == 0
    ):
        return None
    print("installing pyroute2 (pip, into .bench/venv)", flush=True)
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "pyroute2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return f"pip install pyroute2 failed: {done.stderr.strip()[-200:]}" if done.returncode else None


# What a bpftrace user writes to count the same events. The process that causes an event pays for it, in the kernel. The
# tracepoints need tracefs. Where the system has not mounted it, bpftrace gets a mount in a namespace of its own.
BPFTRACE = " ".join(
    f"tracepoint:sched:sched_process_{what} {{ @{what} = count(); }}" for what in ("fork", "exec", "exit")
)
WITH_TRACEFS = [
    *("unshare", "--mount", "sh", "-c"),
    '[ -e /sys/kernel/tracing/events ] || mount -t tracefs none /sys/kernel/tracing; exec "$@"',
    "sh",
]


def _bpftrace() -> str | None:
    missing = _debian("bpftrace")
    if missing:
        return missing
    trial = subprocess.run(
        [*WITH_TRACEFS, "bpftrace", "-e", f"BEGIN {{ exit(); }} {BPFTRACE}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    errors = [line for line in trial.stderr.splitlines() if "ERROR" in line]
    return f"does not run on this kernel: {errors[-1].strip()}" if trial.returncode else None


# Rules. cnpb-b fails and matches. A match of cnpb-mark shows that all events before it were evaluated.
MARK = "  - {name: mark, events: [nonzero_exit], match: {comm: cnpb-mark, exit_code: 3}}\n"
FAILED = "  - {name: failed, events: [nonzero_exit], match: {comm: cnpb-b}}\n"
EVERYTHING = "  - {name: everything, events: all, match: {comm: cnpb-none}}\n"
CNPROCD = [sys.executable, "-m", "cnprocd.cli.cnprocd", "--log-format", "json"]


def rules(*texts: str) -> str:
    return "rules:\n" + "".join(texts)


def many_rules(count: int) -> str:
    """Return `count` rules on every exit, so that the kernel filters none: names, globs and lists; one matches."""
    lines = []
    for i in range(1, count):
        comm = (f"svc{i}", f"svc{i}", f"ora{i}_*", f"[w{i}, 'x{i}-*']")[i % 4]
        lines.append(f"  - {{name: r{i}, events: [exit], match: {{comm: {comm}}}}}\n")
    return rules("  - {name: mark, events: [exit], match: {comm: cnpb-mark}}\n", *lines)


def cnprocd(name: str, *texts: str, options: tuple[str, ...] = ()) -> Competitor:
    return Competitor(name, [*CNPROCD, *options], rules=rules(*texts))


C_LISTENER = Competitor("C listener", [str(BUILD / "listener")], lambda: _compiled("listener"))
ALL = cnprocd("cnprocd all", EVERYTHING, FAILED, MARK)
FAILURES = cnprocd("cnprocd failures", FAILED, MARK)
# The same matches as FAILURES: each name has a program file of its own.
BY_EXE = cnprocd("cnprocd failures by exe", FAILED.replace("comm: cnpb-b", f"exe: {BUILD / 'cnpb-b' / 'load'}"), MARK)
BY_UNIT = cnprocd("cnprocd failures by unit", FAILED.replace("comm: cnpb-b", "unit: cnpb-none.service"), MARK)
EVERY_EXIT = cnprocd(
    "cnprocd, every exit logged",
    "  - {name: failed, events: [exit], match: {comm: [cnpb-a, load]}}\n",  # load: after an exec
    MARK,
)
C_FAILURES = Competitor("C listener, failures", [str(BUILD / "listener"), "failures"], lambda: _compiled("listener"))

COMPETITORS = [
    C_LISTENER,
    C_FAILURES,
    Competitor("forkstat", ["forkstat"], lambda: _debian("forkstat"), says_ready=False, prints=True),
    Competitor("extrace", ["extrace", "-t"], lambda: _debian("extrace"), says_ready=False, prints=True),
    Competitor("pyroute2", [str(BUILD / "venv/bin/python"), str(HERE / "pyroute2_listener.py")], _pyroute2, most=4_000),
    Competitor("bpftrace", [*WITH_TRACEFS, "bpftrace", "-e", f'BEGIN {{ printf("ready\\n"); }} {BPFTRACE}'], _bpftrace),
    ALL,
    cnprocd("cnprocd all, no taskstats", EVERYTHING, FAILED, MARK, options=("--refuse=taskstats",)),
    FAILURES,
    BY_EXE,
    BY_UNIT,
]


def load_program() -> list[str] | None:
    """Return the C workload generator, or None without a compiler; tests/kernel/storm.py replaces it then."""
    return [str(BUILD / "load")] if _compiled("load") is None else None


def load_programs(names: Iterable[str]) -> dict[str, str] | None:
    """Return a file of the generator for each name, as four programs are four files. None without a compiler."""
    if load_program() is None:
        return None
    programs = {name: BUILD / name / "load" for name in names}
    for program in programs.values():
        program.parent.mkdir(exist_ok=True)
        shutil.copy(BUILD / "load", program)
    return {name: str(program) for name, program in programs.items()}


def pidfds() -> str | None:
    """Return the reason if the pidfd program cannot run."""
    return _compiled("pidfds")


def records(running: Running) -> list[dict[str, object]]:
    """Return the records that a cnprocd has written so far. The last line can be incomplete."""
    return records_of(running.output.read_text(errors="replace"))


def records_of(text: str) -> list[dict[str, object]]:
    lines = text.split("\n")[:-1]
    return [json.loads(line) for line in lines if line.startswith("{")]
