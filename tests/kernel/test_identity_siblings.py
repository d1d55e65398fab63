"""clone(CLONE_PARENT): a process of a user, started by root, makes a child of root's process."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

import pytest
from kernel.blocking import NOBODY
from kernel.harness import Daemon, running

RULES = """
rules:
  - {name: died, events: [nonzero_exit], match: {comm: cnptest-sib}, record: [exe, cmdline, cgroup, euid, loginuid]}
  - {name: by-euid, events: [nonzero_exit], match: {euid: 0}}
  - {name: by-user, events: [nonzero_exit], match: {user: root}}
  - {name: forked, events: [fork], match: {any: [{user: root}, {euid: 0}]}}
$MARKER
"""
CLONE_PARENT = 0x8000
PR_SET_NAME = 15
SYS_CLONE = {"x86_64": 56, "aarch64": 220}


def sibling() -> int:
    """Return the PID of a child of this process that a process of nobody made, and that failed."""
    libc, reader_writer = ctypes.CDLL(None), os.pipe()
    caller = os.fork()
    if caller == 0:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            libc.prctl(PR_SET_NAME, b"cnptest-sib", 0, 0, 0)
            flags = ctypes.c_long(CLONE_PARENT | signal.SIGCHLD)
            pid = libc.syscall(SYS_CLONE[os.uname().machine], flags, *[ctypes.c_long(0)] * 4)
            if pid == 0:
                os._exit(3)
            os.write(reader_writer[1], str(pid).encode())
        finally:
            os._exit(0)
    os.close(reader_writer[1])
    with open(reader_writer[0]) as reader:
        pid = int(reader.read())
    os.waitpid(caller, 0)
    os.waitpid(pid, 0)
    return pid


def matches(daemon: Daemon, pid: int) -> dict[str, Any]:
    daemon.mark()
    return {str(record["rule"]): record for record in daemon.matches() if record["pid"] == pid}


@pytest.mark.parametrize("options", [[], ["--refuse=taskstats"]], ids=["records", "no records"])
def test_a_user_s_sibling_is_not_taken_for_root_s_child(tmp_path, options):
    with running(tmp_path, RULES, *options) as daemon:
        found = matches(daemon, sibling())
    assert not found.keys() & {"by-euid", "by-user", "forked"}, found
    if not options:
        died = found["died"]
        assert (died["user"], died.get("euid") in (None, NOBODY)) == ("nobody", True)
