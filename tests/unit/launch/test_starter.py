"""starter.py and spawn.py with real processes: the state of a hook at its start, by spare and by fork."""

import ctypes
import dataclasses
import errno
import gc
import itertools
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from unit.hookkit import HOOK, PATIENCE_S, Records, alive, children, launch_request, zombies

from cnprocd.launch import program, spawn
from cnprocd.launch import starter as starter_script
from cnprocd.launch.program import comm_is_kept
from cnprocd.launch.request import LaunchRequest
from cnprocd.launch.spawn import Starter, launch_failure
from cnprocd.rules.ruleset import ResourceLimits
from cnprocd.rules.values import Template

PROBE = """
import json, os, resource, signal, sys
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(json.dumps({
    "argv": sys.argv[1:], "env": dict(os.environ), "stdin": sys.stdin.read(),
    "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
    "session": os.getsid(0) == os.getpid() == os.getpgid(0),
    "umask": os.umask(0), "nice": os.getpriority(os.PRIO_PROCESS, 0), "cwd": os.getcwd(),
    "uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(),
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE), "core": resource.getrlimit(resource.RLIMIT_CORE),
    "ignored": int(status["SigIgn"], 16) & ~(1 << 12 | 1 << 24), "blocked": int(status["SigBlk"], 16),
    "ambient": int(status["CapAmb"], 16), "oom": int(open("/proc/self/oom_score_adj").read()),
    "parent": os.getppid(),
}))
"""  # Python itself ignores SIGPIPE (13) and SIGXFSZ (25) again


@pytest.fixture(params=["spare", "fork"])
def starter(request):
    one = Starter(Records())
    one._forks = request.param == "fork"
    yield one
    one.close()
    assert zombies() == []


@dataclass
class Start:
    """The arguments of spawn()."""

    request: LaunchRequest

    def spawn(self, starter, announce):
        return starter.spawn(self.request, announce)

    def failure(self, report):
        return launch_failure(report, self.request)


def start(*argv, path="/bin/sh", events=({"pid": 1},), **more):
    """Return a start of `path`. `argv` are literal."""
    command = tuple(Template((word,)) for word in (path, *argv))
    return Start(launch_request(dataclasses.replace(HOOK, command=command, **more), *events))


def run(starter, one):
    """Start, wait and reap. Return (report, output, waitid_result)."""
    announced = []
    child = one.spawn(starter, announced.append)
    assert announced == [child.pid]
    os.set_blocking(child.report_fd, True)
    os.set_blocking(child.output_fd, True)
    report = os.read(child.report_fd, 4096)
    output = b""
    while data := os.read(child.output_fd, 65536):
        output += data
    status = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
    child.close()
    return report, output, status


def probe(starter, *argv, **more):
    path = os.path.realpath(sys.executable)
    report, output, status = run(starter, start("-I", "-S", "-c", PROBE, *argv, path=path, **more))
    assert (report, status.si_status) == (b"", 0), output
    return json.loads(output)


def test_a_hook_begins_clean(starter, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    inherited, other = socket.socketpair()
    inherited.set_inheritable(True)
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    try:
        found = probe(starter, "--pid", "42", events=({"pid": 42, "comm": "a", "comm_hex": "61ff"},))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGHUP, old)
        inherited.close()
        other.close()
    assert found["argv"] == ["--pid", "42"]
    assert json.loads(found["stdin"]) == {"pid": 42, "comm": "a", "comm_hex": "61ff", "job_id": 7}
    assert found["env"]["CNPROCD_COMM"] == "a\udcff"
    assert {name for name in found["env"] if not name.startswith("CNPROCD_")} - {"LC_CTYPE"} == {
        *("PATH", "LANG", "HOME", "USER", "LOGNAME", "SHELL")
    }
    assert found["fds"] == [0, 1, 2, 3], "3 is the listing's own"
    assert found["session"]
    assert (found["umask"], found["cwd"]) == (0o077, "/")
    ignored = found["ignored"] & ~(0b11 << 31)  # glibc's own 32 and 33: inherited
    assert (ignored, found["blocked"], found["ambient"], found["oom"]) == (0, 0, 0, 0)
    assert found["parent"] == os.getpid()


def test_limits_nice_umask_and_directory_are_set(starter, tmp_path):
    limits = ResourceLimits(open_files=64, core_bytes=0, cpu_time_s=1.5)
    found = probe(starter, limits=limits, nice=7, umask=0o027, working_directory=str(tmp_path))
    assert found["nofile"] == [64, 64]
    assert found["core"] == [0, 0]
    assert (found["nice"], found["umask"], found["cwd"]) == (7, 0o027, str(tmp_path))


def test_standard_input_of_megabytes_does_not_block(starter):
    events = ({"pid": 1},) * 150_000
    report, output, status = run(starter, start("-c", "exit 0", events=events))
    assert (report, output, status.si_status) == (b"", b"", 0)
    _, output, _ = run(starter, start("-c", "wc -c", events=events))
    assert int(output) == len('{"pid": 1, "job_id": 7}\n') * len(events) > 3 << 20


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"working_directory": "/no/such"}, "cannot enter /no/such: No such file or directory"),
        ({"limits": ResourceLimits(processes=1 << 31, open_files=1 << 40)}, "cannot set its resource limits"),
    ],
)
def test_a_failure_before_the_exec_is_a_sentence(starter, more, sentence):
    one = start("-c", "exit 0", **more)
    report, _, status = run(starter, one)
    assert sentence in one.failure(report)
    assert (status.si_code, status.si_status) == (os.CLD_EXITED, 127)


def test_a_text_without_a_first_line_is_no_program(starter, tmp_path):
    path = tmp_path / "hook"
    path.write_text("echo hello\n")
    path.chmod(0o755)
    one = start(path=str(path))
    report, _, _ = run(starter, one)
    assert "neither a program nor a script" in one.failure(report)


@pytest.fixture
def swapping(monkeypatch):
    """A function that lets the check of a program in a forked spare be followed by the replacement of the program."""

    def swap(path, other):
        def open_then_swap(wanted, *depth):
            found = checked(wanted, *depth)
            if wanted == str(path):
                os.replace(other, path)
            return found

        checked = program.open_program
        monkeypatch.setattr(program, "open_program", open_then_swap)
        one = Starter(Records())
        one._forks = True
        return one

    return swap


def test_a_script_swapped_between_check_and_use_is_not_run(swapping, tmp_path):
    path = tmp_path / "hook"
    path.write_text("#!/bin/sh\necho good\n")
    path.chmod(0o755)
    one = start(path=str(path))
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho bad\n")
    other.chmod(0o755)
    report, output, _ = run(swapping(path, other), one)
    assert output == b""
    assert "was replaced between check and use" in one.failure(report)


def test_a_binary_swapped_after_its_check_runs_as_checked(swapping, tmp_path):
    path = tmp_path / "hook"
    path.write_bytes(Path("/bin/echo").read_bytes())
    path.chmod(0o755)
    one = start("checked", path=str(path))
    if not comm_is_kept(os.uname().release):
        pytest.skip("this kernel names a program executed by descriptor after the descriptor (before 6.14)")
    other = tmp_path / "other"
    other.write_bytes(Path("/bin/false").read_bytes())
    other.chmod(0o755)
    report, output, _ = run(swapping(path, other), one)
    assert (report, output) == (b"", b"checked\n")


def test_a_binary_keeps_its_name(starter):
    child = start("4", path="/bin/sleep").spawn(starter, lambda pid: None)
    os.set_blocking(child.report_fd, True)
    assert os.read(child.report_fd, 10) == b""
    assert Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n"
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
    child.close()


def test_the_caller_knows_the_pid_before_the_hook_does_anything(starter, tmp_path):
    seen = []

    def announce(pid):
        seen.append((alive(pid), os.path.realpath(f"/proc/{pid}/exe"), (tmp_path / "ran").exists()))

    one = start("-c", f"touch {tmp_path}/ran")
    child = one.spawn(starter, announce)
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
    child.close()
    assert seen == [(True, os.path.realpath(sys.executable), False)]
    assert (tmp_path / "ran").exists()


def test_descriptors_do_not_leak(starter):
    run(starter, start("-c", "exit 0"))
    gc.collect()  # close the garbage of other tests before, not during, the count
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run(starter, start("-c", "exit 0"))
        run(starter, start("-c", "exit 0", working_directory="/no/such"))
    assert sorted(os.listdir("/proc/self/fd")) == before


# -- without the helper ------------------------------------------------------------------------------------------


@pytest.fixture
def helped():
    """A starter whose helper runs: to start it can take longer than a hook waits for its answer."""
    one = Starter(Records())
    one.prepare()
    assert select.select([one._control], [], [], PATIENCE_S)[0]
    yield one
    one.close()
    assert zombies() == []


def test_a_spare_that_comes_too_late_is_reaped(helped, monkeypatch):
    """The helper, which got no processor, makes it after the daemon stopped waiting and before it kills the helper."""
    monkeypatch.setattr(spawn, "ANSWER_TIMEOUT_S", 0.01)
    run(helped, start("-c", "exit 0"))
    helper = helped._helper
    before = [pid for pid in children() if pid != helper.pid]
    os.kill(helper.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, helper.pid, os.WSTOPPED)
    helped.prepare(soon=True)
    control = helped._control.dup()

    def kill_late():
        os.kill(helper.pid, signal.SIGCONT)
        assert select.select([control], [], [], PATIENCE_S)[0]
        os.kill(helper.pid, signal.SIGKILL)

    monkeypatch.setattr(helper, "kill", kill_late)
    helped.close()
    control.close()
    assert not [pid for pid in children() if pid not in before]


def test_a_helper_that_was_killed_is_started_again(helped):
    run(helped, start("-c", "exit 0"))
    helped._helper.kill()
    helped._helper.wait()
    for _ in range(3):
        _, output, _ = run(helped, start("-c", "echo ok"))
        assert output == b"ok\n"
    assert helped._log.of("starter_lost")
    assert not helped._forks


def test_a_spare_that_was_killed_while_it_waited_is_replaced(helped):
    run(helped, start("-c", "exit 0"))
    helped.prepare()
    os.set_blocking(helped._control.fileno(), True)
    helped._control.recv(8, socket.MSG_PEEK)  # it has been made
    (spare,) = (
        int(pid)
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if int(pid) != helped._helper.pid
    )
    os.kill(spare, signal.SIGKILL)
    os.waitid(os.P_PID, spare, os.WEXITED | os.WNOWAIT)
    _, output, _ = run(helped, start("-c", "echo ok"))
    assert output == b"ok\n"


def test_no_helper_to_be_had_at_all(helped, monkeypatch):
    helped.close()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    _, output, _ = run(helped, start("-c", "echo ok"))
    assert output == b"ok\n"


def test_a_kernel_without_clone3_makes_the_daemon_fork(helped, monkeypatch):
    answer = spawn._answer

    def refuse(control):
        spare = answer(control)  # such a kernel would not have made it
        spare.orders.close()
        spawn._discard(spare)
        raise OSError(errno.ENOSYS, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(spawn, "_answer", refuse)
        _, output, _ = run(helped, start("-c", "echo ok"))
    assert output == b"ok\n"
    assert helped._forks
    assert "clone3" in helped._log.of("starter_lost")[0]["reason"]


@pytest.mark.parametrize("left", range(12))
def test_no_descriptors_left_is_an_error_before_any_start(helped, left):
    """They run out at every step of the start. With enough of them, the hook starts."""
    one = start("-c", "exit 0")
    announced, child = [], None
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # other tests' sockets
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    free = (number for number in itertools.count() if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, left, None)), old[1]))
    try:
        child = helped.spawn(one.request, announced.append)
    except OSError as error:
        assert error.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    if child is None:
        assert announced == []
    else:
        os.waitpid(child.pid, 0)
        child.close()
    _, output, _ = run(helped, start("-c", "echo ok"))
    assert output == b"ok\n"


def test_the_helper_ends_with_a_killed_daemon():
    script = (
        "import sys,os,signal; sys.path[:0]=sys.argv[1:]\n"
        "from unit.hookkit import Records\nfrom cnprocd.launch.spawn import Starter\nimport socket\n"
        "one=Starter(Records()); one.prepare()\n"
        "one._control.settimeout(60); one._control.recv(8, socket.MSG_PEEK)\n"
        "print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1)
        os.execv(sys.executable, [sys.executable, "-c", script, *sys.path])
    os.close(writer)
    with os.fdopen(reader) as file:
        left = [int(word) for word in file.readline().split()]
        assert len(left) == 2
        pidfds = [fd for fd in map(_pidfd, left) if fd is not None]
        os.waitpid(pid, 0)
        for pidfd in pidfds:
            _wait_readable(pidfd)
            os.close(pidfd)


def _pidfd(pid):
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _wait_readable(pidfd):
    import select

    assert select.select([pidfd], [], [], 60)[0]


def test_the_helper_is_small_and_imports_nothing_of_ours():
    program = "import runpy, sys; runpy.run_path(sys.argv.pop(), run_name='x')"
    command = [sys.executable, "-I", "-S", "-E", "-X", "importtime", "-c", program, starter_script.__file__]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "ctypes" in modules
    assert "cnprocd" not in modules
    assert "asyncio" not in modules


def test_ctypes_knows_the_arguments_of_clone3():
    assert ctypes.sizeof(starter_script.CloneArgs) == 88  # CLONE_ARGS_SIZE_VER2


def test_a_spare_loads_few_modules():
    """An exec first unmaps what a spare has loaded."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import cnprocd.launch.starter, cnprocd.launch.program; print(*sys.modules)"
    )
    command = [sys.executable, "-I", "-S", "-E", "-c", script, spawn.PACKAGE]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"collections", "contextlib", "dataclasses", "enum", "pathlib", "re", "signal", "typing"} & set(loaded)


@pytest.mark.parametrize("request_kind", ["LATER", "NOW"])
def test_a_waiting_spare_has_its_session_and_few_descriptors(request_kind):
    one = Starter(Records())
    try:
        one._ask(getattr(starter_script, request_kind))
        spare = spawn._answer(one._control)
        one._asked = False
        wanted = {*map(str, range(starter_script.FIRST_RECEIVED + 1))}
        until = time.monotonic() + PATIENCE_S
        while set(os.listdir(f"/proc/{spare.pid}/fd")) != wanted and time.monotonic() < until:
            time.sleep(0.001)
        assert set(os.listdir(f"/proc/{spare.pid}/fd")) == wanted
        assert os.getsid(spare.pid) == os.getpgid(spare.pid) == spare.pid
        spare.orders.close()
        assert os.waitpid(spare.pid, 0) == (spare.pid, 0)
    finally:
        one.close()
