"""A restart of the daemon: what it knew of processes that die meanwhile, and whose processes are those of hooks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kernel.harness import PATIENCE_S, SYS_EXIT, Daemon, child, hook_rules, rename, running, wait_status
from kernel.manager import Manager
from kernel.test_identity_cgroups import hierarchy

from cnprocd.control.client import Client

RULES = """
rules:
  - {name: comm, events: [nonzero_exit], match: {comm: cnptest-old}}
  - {name: exe, events: [nonzero_exit], match: {comm: cnptest-old, exe: "*/cnptest-python"}}
  - {name: cmdline, events: [nonzero_exit], match: {comm: cnptest-old, cmdline: "*cnptest-argument*"}}
  - {name: cgroup, events: [nonzero_exit], match: {comm: cnptest-old, cgroup: "/*"}}
  - {name: marker, events: [nonzero_exit], match: {comm: cnptest-mark, exit_code: 99}}
"""
ALL = ["cgroup", "cmdline", "comm", "exe"]
CODE = """
import ctypes, os, sys, threading
ctypes.CDLL(None).prctl(15, b"cnptest-old", 0, 0, 0)
def wait_then_end():
    print(flush=True)
    sys.stdin.readline()
    os._exit(3)
if sys.argv[1] == "leader":
    wait_then_end()
print(flush=True)
sys.stdin.readline()
threading.Thread(target=wait_then_end).start()
ctypes.CDLL(None).syscall(int(sys.argv[2]), 0)  # the leader ends early, and its record is all that has the name
"""


class Service:
    """A daemon under a service manager that keeps its sockets, with its records in a file."""

    def __init__(self, directory: Path, rules: str = RULES) -> None:
        (directory / "rules.yaml").write_text(rules)
        self.directory, self.records_path = directory, directory / "records"
        self._manager = Manager(directory, directory / "rules.yaml")
        self.start()

    def end(self, number: int) -> None:
        self.daemon.send_signal(number)
        self.daemon.wait(PATIENCE_S)

    def start(self) -> None:
        with self.records_path.open("ab") as records:
            self.daemon = self._manager.start(records)

    def records(self) -> list[dict[str, Any]]:
        whole_lines, _, _ = self.records_path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole_lines.splitlines()]

    def mark(self) -> None:
        """Return when every event before this call has been evaluated, and its record written."""
        pid = child(lambda: (rename("cnptest-mark"), os._exit(99)))
        os.waitpid(pid, 0)
        deadline = time.monotonic() + PATIENCE_S
        while not any(one.get("rule") == "marker" and one.get("pid") == pid for one in self.records()):
            assert time.monotonic() < deadline, self.records()[-5:]
            time.sleep(0.01)

    def rules_that_matched(self, pid: int) -> list[str]:
        return sorted(
            str(one["rule"]) for one in self.records() if one["event"] == "rule_matched" and one["pid"] == pid
        )


@pytest.fixture
def service(tmp_path):
    service = Service(tmp_path)
    yield service
    service.daemon.kill()
    service.daemon.wait()


def old_process(directory: Path, which: str = "leader") -> subprocess.Popen[str]:
    """A program that no other process runs, so that no other process shows the path of its file."""
    program = shutil.copy(os.path.realpath(sys.executable), directory / "cnptest-python")
    process = subprocess.Popen(
        [program, "-ISc", CODE, which, str(SYS_EXIT), "cnptest-argument"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def let_leader_end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    while Path(f"/proc/{process.pid}/task/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


@pytest.mark.parametrize("which", ["leader", "thread"])
def test_a_death_during_a_restart_is_matched_by_all_rules(service, which):
    process = old_process(service.directory, which)
    service.mark()
    if which == "thread":  # only now: of a leader that ended /proc shows no program
        let_leader_end(process)
        service.mark()
    service.end(signal.SIGTERM)
    assert (service.directory / "run" / "processes").stat().st_mode & 0o777 == 0o600
    process.communicate("\n")
    service.start()
    service.mark()
    assert service.rules_that_matched(process.pid) == ALL
    assert not (service.directory / "run" / "processes").exists(), "it holds for one start"


def test_a_death_after_a_restart_is_matched_by_all_rules(service):
    process = old_process(service.directory)
    service.mark()
    service.end(signal.SIGTERM)
    service.start()
    process.communicate("\n")
    service.mark()
    assert service.rules_that_matched(process.pid) == ALL


def test_a_death_while_the_daemon_is_killed_is_counted(service):
    """kill -9 hands nothing on: the name is in the exit record, and what is not there is counted."""
    process = old_process(service.directory)
    service.mark()
    service.end(signal.SIGKILL)
    process.communicate("\n")
    service.start()
    service.mark()
    assert service.rules_that_matched(process.pid) == ["comm"]
    with Client(service.directory / "run") as client:
        unknown = client.ask("status")["events"]["identity_unknown"]
    counted = {one["attribute"] for one in unknown if one["count"]}
    assert {"exe", "cmdline", "cgroup"} <= counted, "other processes can be unknown as well"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 5000, b'{"format": 1, "boot_id": "x", "processes": []}'])
def test_a_damaged_handover_costs_only_what_it_had(service, content):
    process = old_process(service.directory)
    service.mark()
    service.end(signal.SIGTERM)
    (service.directory / "run" / "processes").write_bytes(content)
    process.communicate("\n")
    service.start()
    service.mark()
    assert service.rules_that_matched(process.pid) == ["comm"]
    (record,) = [one for one in service.records() if one["event"] == "handover_incomplete"]
    assert record["level"] == "warning"


FAILED = """
rules:
  - {name: failed, events: [nonzero_exit], match: {exit_code: 5}}
$MARKER
"""


def stranger(gate: int) -> int:
    """A process that claims to be one of a hook, by its environment, and fails when the gate opens."""
    code = f"import os; print(flush=True); os.read({gate}, 1); os._exit(5)"
    read, write = os.pipe()

    def body():
        os.dup2(write, 1)
        os.set_inheritable(gate, True)
        os.execve(sys.executable, ["python3", "-ISc", code], {"CNPROCD_JOB_ID": "1"})

    pid = child(body)
    os.close(write)
    assert os.read(read, 1) == b"\n"
    os.close(read)
    return pid


def test_a_claim_in_the_environment_hides_no_process(tmp_path):
    """Any user can set CNPROCD_JOB_ID. Before the daemon started or after, it must not decide what is a hook."""
    gate = os.pipe()
    older = stranger(gate[0])
    with running(tmp_path, FAILED) as daemon, Client(tmp_path / "run") as client:
        assert client.ask("status")["events"]["asked"] == ["nonzero_exit"], "no forks are asked for"
        younger = stranger(gate[0])
        os.write(gate[1], b"xx")
        for pid in (older, younger):
            wait_status(pid)
        daemon.mark()
        assert {older, younger} <= {match["pid"] for match in daemon.matches("failed")}


LEAVES = """exec </dev/null >/dev/null 2>&1
setsid sh -c "(while [ ! -e {go} ]; do sleep 0.05; done; (exit 5); exit 5) & echo \\$! > {left}"
"""


@pytest.mark.parametrize("end", [Daemon.stop, Daemon.kill], ids=["stop", "kill"])
def test_what_hooks_left_is_followed_after_a_restart(tmp_path, end):
    """A program that a hook left, and the child that it forks later, trigger no rule of the next daemon."""
    go, left = tmp_path / "go", tmp_path / "left"
    rules = hook_rules(tmp_path, LEAVES.format(go=go, left=left))
    rules = rules.replace("$MARKER", FAILED.partition("rules:\n")[2])
    daemon = Daemon(tmp_path, rules).ready()
    try:
        wait_status(child(lambda: (rename("cnptest-fail"), os._exit(1))))
        daemon.wait_for("hook_finished")
        pid = int(left.read_text())
        deadline = time.monotonic() + PATIENCE_S
        while pid not in kept(tmp_path / "run" / "hooks"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        end(daemon)
        with running(tmp_path, rules) as daemon, Client(tmp_path / "run") as client:
            assert "fork" in client.ask("status")["events"]["asked"]
            go.touch()
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.01)
            own = child(lambda: os._exit(5))
            wait_status(own)
            daemon.mark()
            found = [(match["pid"], match["ppid"]) for match in daemon.matches("failed")]
            assert (own, os.getpid()) in found
            assert not [one for one in found if pid in one], "neither the program nor its child"
            while "fork" in client.ask("status")["events"]["asked"]:
                assert time.monotonic() < deadline + PATIENCE_S
                time.sleep(0.05)
    finally:
        go.touch()
        daemon.kill()


def kept(hooks: Path) -> set[int]:
    """Return the PIDs in the file by which a daemon hands on the processes of its hooks."""
    return {pid for pid, _ in json.loads(hooks.read_text())["hooks"]} if hooks.exists() else set()


def test_processes_of_the_runners_service_are_hooks(tmp_path):
    """Its cgroup is root's: a hook that a daemon left in the runner is recognized by it after a kill."""
    groups = [hierarchy() / "system.slice", hierarchy() / "system.slice" / "cnprocd-runner.service"]
    made = [group for group in groups if not group.exists() and not group.mkdir()]
    gate = os.pipe()
    try:

        def body():
            (groups[-1] / "cgroup.procs").write_text(str(os.getpid()))
            os.read(gate[0], 1)
            os._exit(5)

        hook = child(body)
        while str(hook) not in (groups[-1] / "cgroup.procs").read_text().split():
            pass
        with running(tmp_path, FAILED, "--runner", str(tmp_path / "runner.sock")) as daemon:
            own = child(lambda: os._exit(5))
            os.write(gate[1], b"x")
            for pid in (own, hook):
                wait_status(pid)
            daemon.mark()
            found = {match["pid"] for match in daemon.matches("failed")}
            assert own in found and hook not in found
    finally:
        for group in reversed(made):
            group.rmdir()
