"""What is known of running processes survives a reload and a restart."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kernel.harness import running

FEW = """
rules:
  - {name: before, events: [nonzero_exit], match: {parent: {comm: nothing}}}
$MARKER
"""
MORE = """
rules:
  - {name: exe, events: [nonzero_exit], match: {exe: "*/python3*", comm: "cnptest*"}}
  - {name: cmdline, events: [nonzero_exit], match: {cmdline: "*cnptest-argument*", comm: "cnptest*"}}
  - {name: cgroup, events: [nonzero_exit], match: {cgroup: "/*", comm: "cnptest*"}}
  - {name: user, events: [nonzero_exit], match: {user: 0, comm: "cnptest*"}}
$MARKER
"""
CODE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(15, b"cnptest-old", 0, 0, 0)
print(flush=True)
if sys.stdin.readline() == "fork\\n":
    if os.fork():
        os.wait()
os._exit(3)
"""


@pytest.mark.parametrize("before", [FEW, "rules:\n$MARKER\n"], ids=["a table before", "no table before"])
@pytest.mark.parametrize("message", ["fork\n", "end\n"], ids=["child", "itself"])
def test_rules_of_a_reload_match_older_processes(tmp_path, before, message):
    """A process older than the reload, and a child that it forks later and that executes nothing."""
    with running(tmp_path, before) as daemon:
        old = subprocess.Popen(
            [sys.executable, "-ISc", CODE, "cnptest-argument"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert old.stdout is not None
        old.stdout.readline()
        daemon.mark()
        daemon.reload(MORE)
        old.communicate(message)
        daemon.mark()
        by_pid: dict[object, list[object]] = {}
        for record in daemon.matches(comm="cnptest-old"):
            by_pid.setdefault(record["pid"], []).append(record["rule"])
        assert old.pid in by_pid
        assert len(by_pid) == (2 if message == "fork\n" else 1)
        assert all(sorted(map(str, rules)) == ["cgroup", "cmdline", "exe", "user"] for rules in by_pid.values())


WORKER = """
import os, sys
os.read(0, 1)
if os.fork() == 0:
    os.setuid(65534)
    print(os.getpid(), flush=True)
    os.read(0, 1)
    os._exit(3)
os.wait()
"""


def test_a_worker_keeps_its_cmdline_when_rules_drop_exe(tmp_path):
    """A process that root's process forks after the reload, and that changes its user and executes nothing."""
    before = 'rules:\n  - {name: exe, events: [nonzero_exit], match: {exe: "*/python3*"}}\n$MARKER'
    after = 'rules:\n  - {name: cmdline, events: [nonzero_exit], match: {cmdline: "*cnptest-argument*"}}\n$MARKER'
    with running(tmp_path, before) as daemon:
        root = subprocess.Popen(
            [sys.executable, "-ISc", WORKER, "cnptest-argument"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert root.stdin is not None and root.stdout is not None
        daemon.mark()
        daemon.reload(after)
        root.stdin.write(b"x")
        root.stdin.flush()
        worker = int(root.stdout.readline())
        daemon.mark()  # the change of the user is read
        root.communicate(b"x")
        daemon.mark()
        assert [record["pid"] for record in daemon.matches("cmdline")] == [worker]
