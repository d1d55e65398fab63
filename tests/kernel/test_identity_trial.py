"""`cnprocctl test --pid` and the death itself: the same rules match, whatever the process has done to its identity."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kernel.harness import Daemon, child, rename, running
from kernel.test_ctl_daemon import options
from kernel.test_identity_cgroups import ID, hierarchy

from cnprocd.cli.cnprocctl import run

NOBODY = 65534
SLEEP = os.path.realpath("/bin/sleep")
PYTHON = os.path.realpath(sys.executable)
CONTAINER = f"/system.slice/docker-{ID}.scope"
USER_UNIT = "/user.slice/user-1000.slice/user@1000.service/app.slice/cnptest-foo.service"
LATER = "/system.slice/cnptest-later.service"
MOVED_AFTER_S = 0.3
AGES_S = (3, 6, 12)  # a process is looked at again when it is one to two seconds old, on a busy machine later
RULES = """
rules:
  - {name: name, events: [nonzero_exit], match: {signal: SIGKILL, comm: sleep}}
  - {name: odd-name, events: [nonzero_exit], match: {signal: SIGKILL, comm: "a) R*"}}
  - {name: script, events: [nonzero_exit], match: {signal: SIGKILL, comm: cnptest-script}}
  - {name: path, events: [nonzero_exit], match: {signal: SIGKILL, exe: $SLEEP}}
  - {name: python, events: [nonzero_exit], match: {signal: SIGKILL, exe: $PYTHON}}
  - {name: path-elsewhere, events: [nonzero_exit], match: {signal: SIGKILL, exe: "$TMP/*"}}
  - {name: replaced, events: [nonzero_exit], match: {signal: SIGKILL, exe: $TMP/cnptest-replaced}}
  - {name: deleted, events: [nonzero_exit], match: {signal: SIGKILL, exe: $TMP/cnptest-deleted}}
  - {name: path-else, events: [nonzero_exit], match: {signal: SIGKILL, not: {exe: ["/usr/*", "/bin/*"]}}}
  - {name: bound, events: [nonzero_exit], match: {signal: SIGKILL, exe: /usr/bin/chage}}
  - {name: other-file, events: [nonzero_exit], match: {signal: SIGKILL, not: {exe: /usr/bin/chage}}}
  - {name: neither-file, events: [nonzero_exit], match: {signal: SIGKILL, not: {exe: [$SLEEP, $PYTHON]}}}
  - {name: claimed, events: [nonzero_exit], match: {signal: SIGKILL, exe_claimed: [/usr/bin/chage, "/memfd:*"]}}
  - {name: arguments, events: [nonzero_exit], match: {signal: SIGKILL, cmdline: "*sleep 600"}}
  - {name: title, events: [nonzero_exit], match: {signal: SIGKILL, cmdline: "cnptest: checkpointer*"}}
  - {name: unit, events: [nonzero_exit], match: {signal: SIGKILL, unit: cnptest-later.service}}
  - {name: user-unit, events: [nonzero_exit], match: {signal: SIGKILL, user_unit: cnptest-foo.service}}
  - {name: container, events: [nonzero_exit], match: {signal: SIGKILL, container: 0123456789ab}}
  - {name: user, events: [nonzero_exit], match: {signal: SIGKILL, user: nobody}}
  - {name: euid, events: [nonzero_exit], match: {signal: SIGKILL, euid: nobody}}
  - {name: parent, events: [nonzero_exit], match: {signal: SIGKILL, comm: sleep, parent: {comm: cnptest-parent}}}
$MARKER
"""
TITLED = 'select undef, undef, undef, 0.2; $0 = "cnptest: checkpointer "; sleep 600'
THREAD_EXECS = "import os, threading; threading.Thread(target=os.execv, args=('/bin/sleep', ['sleep', '600'])).start()"
BOUND = "mount --bind %s /usr/bin/chage && exec /usr/bin/chage 600"


def executes(*argv: str, before: Callable[[], object] = lambda: None) -> int:
    """A process that executes a program with these arguments, found at the first."""
    return child(lambda: (before(), os.execv(argv[0], [os.path.basename(argv[0]), *argv[1:]])))


def in_group(path: str) -> Callable[[], object]:
    return lambda: (hierarchy() / path.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))


def moved() -> int:
    pid = executes("/bin/sleep", "600")
    time.sleep(MOVED_AFTER_S)
    (hierarchy() / LATER.lstrip("/") / "cgroup.procs").write_text(str(pid))
    return pid


def copied(directory: Path, name: str, afterwards: Callable[[Path], object]) -> int:
    """A process that runs a copy of sleep. `afterwards` happens to the file when it runs."""
    program = directory / name
    shutil.copy(SLEEP, program)
    pid = executes(str(program), "600")
    while os.readlink(f"/proc/{pid}/exe") != str(program):
        time.sleep(0.01)
    afterwards(program)
    return pid


def replace(program: Path) -> None:
    shutil.copy(SLEEP, program.with_suffix(".new"))
    program.with_suffix(".new").rename(program)


def in_memory() -> int:
    """A process that runs a file without a name (memfd_create(2)), whatever the kernel shows as its path."""

    def body() -> None:
        fd = os.memfd_create("cnptest", 0)
        os.write(fd, Path(SLEEP).read_bytes())
        os.execv(f"/proc/self/fd/{fd}", ["sleep", "600"])

    return child(body)


def own_program(directory: Path) -> Path:
    file = directory / "cnptest-own"
    return file if file.exists() else Path(shutil.copy(SLEEP, file))


def bound(program: str) -> int:
    """A process whose program stands at another path in its own mount namespace."""
    return executes(shutil.which("unshare") or "", "-m", "sh", "-c", BOUND % program)


def script(directory: Path) -> int:
    file = directory / "cnptest-script"
    if not file.exists():
        file.write_text(f"#!{sys.executable} -IS\nimport signal\nsignal.pause()\n")
        file.chmod(0o755)
    return executes(str(file))


def odd_name() -> int:
    return child(lambda: (rename(b"a) R 1 2\n\xff (x"), signal.pause()))


def kinds(directory: Path) -> dict[str, Callable[[], int]]:
    """Return how to start each kind of process."""
    found = {
        "plain": lambda: executes("/bin/sleep", "600"),
        "odd name": odd_name,
        "script": lambda: script(directory),
        "exec by a thread": lambda: executes(sys.executable, "-ISc", THREAD_EXECS),
        "another user": lambda: executes("/bin/sleep", "600", before=lambda: os.setuid(NOBODY)),
        "effective user": lambda: executes("/bin/sleep", "600", before=lambda: os.seteuid(NOBODY)),
        "file deleted": lambda: copied(directory, "cnptest-deleted", Path.unlink),
        "file replaced": lambda: copied(directory, "cnptest-replaced", replace),
        "file in memory": in_memory,
        "bound": lambda: bound(SLEEP),
        "own program bound": lambda: bound(str(own_program(directory))),
        "container": lambda: executes("/bin/sleep", "600", before=in_group(CONTAINER)),
        "unit of a user": lambda: executes("/bin/sleep", "600", before=in_group(USER_UNIT)),
        "moved": moved,
    }
    if perl := shutil.which("perl"):
        found["titled"] = lambda: executes(perl, "-e", TITLED)
    return found


@contextlib.contextmanager
def groups() -> Iterator[None]:
    made = []
    for path in (CONTAINER, USER_UNIT, LATER):
        group = hierarchy() / path.lstrip("/")
        for one in reversed([group, *group.parents]):
            if hierarchy() in one.parents and not one.exists():
                one.mkdir()
                made.append(one)
    yield
    for one in reversed(made):
        one.rmdir()


def ended(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def compared(daemon: Daemon, alive: dict[str, int]) -> dict[str, tuple[list[str], list[str]]]:
    """Ask which rules would match, and end the processes. Return both answers where they differ."""
    told = {}
    for kind, pid in alive.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:  # in this process: another one needs a second
            run([*options(daemon), "--json", "test", "--pid", str(pid), "--signal", "KILL"])
        told[kind] = sorted(one["rule"] for one in json.loads(out.getvalue()))
        ended(pid)
    daemon.mark()
    seen = {kind: sorted(str(record["rule"]) for record in daemon.matches(pid=pid)) for kind, pid in alive.items()}
    assert all(seen.values()) or any(told.values()), "some rule matches"
    return {kind: (told[kind], seen[kind]) for kind in alive if told[kind] != seen[kind]}


def test_test_of_a_pid_answers_as_its_death_does(tmp_path):
    """For processes older than the daemon, and for younger ones that live long enough to be looked at again."""
    rules = RULES.replace("$TMP", str(tmp_path)).replace("$SLEEP", SLEEP).replace("$PYTHON", PYTHON)
    alive: dict[str, int] = {}
    try:
        with groups():
            alive = {kind: start() for kind, start in kinds(tmp_path).items()}
            time.sleep(1)  # titles and moves come first
            with running(tmp_path, rules) as daemon:
                assert compared(daemon, alive) == {}, "older than the daemon"
                left = set(alive)
                for age_s in AGES_S:
                    alive = {kind: start() for kind, start in kinds(tmp_path).items() if kind in left}
                    time.sleep(age_s)
                    differing = compared(daemon, alive)
                    left = set(differing)
                    if not left:
                        return
                assert differing == {}, "younger than the daemon"
    finally:
        for pid in alive.values():
            ended(pid)
