"""What changes after exec without an event: a title over the arguments, and another cgroup."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest
from kernel.harness import PATIENCE_S, Daemon, child, running
from kernel.test_identity_cgroups import hierarchy

TITLED = """
rules:
  - {name: titled, events: [nonzero_exit], match: {cmdline: "cnptest: checkpointer*"}}
  - {name: started, events: [nonzero_exit], match: {cmdline: "*cnptest-argument*"}}
$MARKER
"""
CODE = """
$| = 1;
if (fork) { wait; exit }
print "$$\n";
select undef, undef, undef, 0.2;
$0 = "cnptest: checkpointer ";
print "\n";
<STDIN>
"""


def server() -> tuple[subprocess.Popen[str], int]:
    """A server as PostgreSQL is: a child that executes nothing, and overwrites its arguments 200 ms after its start."""
    if shutil.which("perl") is None:
        pytest.skip("needs perl, which can overwrite its arguments")
    process = subprocess.Popen(
        ["perl", "-e", CODE, "cnptest-argument"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.stdout.readline()
    return process, pid


def rules_of(daemon: Daemon, pid: int) -> list[object]:
    daemon.mark()
    return [record["rule"] for record in daemon.matches(pid=pid)]


def test_a_title_counts_for_older_and_younger_processes(tmp_path):
    """The older one is read when the daemon starts, the younger one when it is a second old."""
    process, older = server()
    with running(tmp_path, TITLED) as daemon:
        os.kill(older, signal.SIGKILL)
        process.communicate()
        assert rules_of(daemon, older) == ["titled"]
        deadline, age_s = time.monotonic() + PATIENCE_S, 0.0
        while True:  # it lives longer each time, until it is old enough
            age_s += 1
            process, younger = server()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(age_s)
            os.kill(younger, signal.SIGKILL)
            process.communicate()
            if (found := rules_of(daemon, younger)) == ["titled"]:
                break
            assert found in (["started"], []), "by its arguments, or gone before they were read"
            assert time.monotonic() < deadline, f"{age_s} s old, and known by its arguments"


MOVED = """
rules:
  - {name: moved, events: [nonzero_exit], match: {comm: sleep, cgroup: "/system.slice/cnptest-after.service"}}
$MARKER
settings: {log_level: debug}
"""


def test_a_process_that_was_moved_is_known_by_its_last_cgroup(tmp_path):
    """Moved after its exec, and reaped at once, so that nothing is left to read at its death."""
    group = hierarchy() / "system.slice" / "cnptest-after.service"
    made = [one for one in (group.parent, group) if not one.exists() and not one.mkdir()]
    try:
        with running(tmp_path, MOVED) as daemon:
            deadline, age_s = time.monotonic() + PATIENCE_S, 0.0
            while True:
                age_s += 1
                pid = moved_and_killed(group, age_s)
                if rules_of(daemon, pid) == ["moved"]:
                    break
                assert time.monotonic() < deadline, f"{age_s} s after it was moved"
            assert daemon.wait_for("identity_sources", pid=pid)["cgroup"] in ("procfs", "zombie")
    finally:
        for one in reversed(made):
            one.rmdir()


def moved_and_killed(group, age_s: float) -> int:
    """Start a program, move it, and kill it when it is so old; its parent does not wait for it. Return its PID."""
    read, write = os.pipe()

    def parent():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        pid = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
        os.write(write, str(pid).encode())
        (group / "cgroup.procs").write_text(str(pid))
        time.sleep(age_s)
        os.kill(pid, signal.SIGKILL)
        os._exit(0)

    os.waitpid(child(parent), 0)
    os.close(write)
    pid = int(os.read(read, 20))
    os.close(read)
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.01)
    return pid
