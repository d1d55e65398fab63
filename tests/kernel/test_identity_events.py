"""Identity at events that are no exits: what the event itself carries is reported, without a table as with one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from kernel.harness import child, rename, running, wait_status

FORKS = """
rules:
  - name: fork
    events: [fork]
    log: {level: info, message: "{kind} {pid} {ppid}"}
$MARKER
"""
UIDS = """
rules:
  - name: uid
    events: [uid]
    log: {level: info, message: "{kind} {pid} {uid} {user}"}
$MARKER
"""
NOBODY = 65534


def daemonizing(count: int) -> list[tuple[int, int]]:
    """Fork children that fork and end at once: (parent, child) of each grandchild, which PID 1 has adopted by then."""
    read, write = os.pipe()
    pairs = []
    for _ in range(count):

        def middle():
            grandchild = child(lambda: os._exit(0))
            os.write(write, f"{os.getpid()} {grandchild}\n".encode())
            os._exit(0)

        os.waitpid(child(middle), 0)
        parent, grandchild = os.read(read, 100).split()
        pairs.append((int(parent), int(grandchild)))
    return pairs


@pytest.mark.parametrize("options", [[], ["--refuse=taskstats"]], ids=["records", "no-records"])
def test_fork_names_the_parent_of_the_event(tmp_path, options):
    with running(tmp_path, FORKS, *options) as daemon:
        pairs = daemonizing(500)
        daemon.mark()
        parents = {record["pid"]: record["ppid"] for record in daemon.matches("fork")}
        assert [(parents[grandchild], grandchild) for _, grandchild in pairs] == pairs


def test_uid_names_the_ids_of_the_event(tmp_path):
    """A process that changes its uid and ends at once: nothing can be read of it any more."""
    with running(tmp_path, UIDS) as daemon:
        pids = []
        for _ in range(200):
            pids.append(child(lambda: (os.setuid(NOBODY), os._exit(0))))
            wait_status(pids[-1])
        daemon.mark()
        found = {record["pid"]: (record["uid"], record["user"], record["euid"]) for record in daemon.matches("uid")}
        assert {found.get(pid) for pid in pids} == {(NOBODY, "nobody", NOBODY)}


def run_python(code):
    """Run a program of Python until it ends. Return its PID."""
    process = subprocess.Popen([sys.executable, "-ISc", code])
    process.wait()
    return process.pid


def test_comm_of_a_uid_event_is_that_of_its_moment(tmp_path):
    """su changes its uid and executes a shell at once: the event is about su, or its program is unknown."""
    rules = UIDS.replace("    events: [uid]\n", "    events: [uid]\n    record: [exe, cmdline]\n")
    code = f"import os; os.setuid({NOBODY}); os.execv('/bin/true', ['true'])"
    with running(tmp_path, rules) as daemon:
        pids = {run_python(code) for _ in range(100)}
        daemon.mark()
        found = [record for record in daemon.matches("uid") if record["pid"] in pids]
        assert {record["pid"] for record in found} == pids
        first = os.path.basename(os.path.realpath(sys.executable))
        assert {record["comm"] for record in found} <= {first, "python", None}
        assert {record["exe"] for record in found} <= {os.path.realpath(sys.executable), None}
        assert not [record for record in found if str(record["cmdline"]).startswith("true")]


def test_default_message_makes_the_plan_know_the_comm(tmp_path):
    """The default message names the comm, so a rule without one of its own asks for it."""
    rules = "rules:\n  - {name: uid, events: [uid], log: {level: info}}\n$MARKER\n"
    with running(tmp_path, rules) as daemon:
        pids = []
        for _ in range(50):
            pids.append(child(lambda: (rename("cnptest-su"), os.setuid(NOBODY), rename("other"), os._exit(0))))
            wait_status(pids[-1])
        daemon.mark()
        assert {record["comm"] for record in daemon.matches("uid") if record["pid"] in pids} == {"cnptest-su"}


@pytest.mark.parametrize("named", ["record: [exe, cmdline]", ""], ids=["named", "not named"])
def test_program_of_a_comm_event_is_that_of_its_moment(tmp_path, named):
    """A process changes its comm and executes a program at once: the event is about the first program."""
    rules = f"rules:\n  - {{name: comm, events: [comm], match: {{comm: cnptest-new}}, {named}}}\n$MARKER\n"
    code = "import ctypes, os; ctypes.CDLL(None).prctl(15, b'cnptest-new', 0, 0, 0); os.execv('/bin/true', ['true'])"
    with running(tmp_path, rules) as daemon:
        pids = {run_python(code) for _ in range(100)}
        daemon.mark()
        found = [record for record in daemon.matches("comm") if record["pid"] in pids]
        assert {record["pid"] for record in found} == pids
        assert {record["exe"] for record in found} <= {os.path.realpath(sys.executable), None}
        assert not [record for record in found if str(record["cmdline"]).startswith("true")]
