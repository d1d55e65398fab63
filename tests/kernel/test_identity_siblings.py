"""clone(CLONE_PARENT): a process of a user, started by a service of root, makes a child of the service's process.

The fork event names the service's process as the parent. The child has the user, the program and the cgroup of the
caller, and nothing of the service.
"""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
from kernel.harness import PATIENCE_S, running
from kernel.test_identity_cgroups import hierarchy, in_cgroup  # noqa: F401  # a fixture

from cnprocd.control.client import Client

PYTHON = os.path.realpath(sys.executable)
PERL = shutil.which("perl") or ""
NOBODY = 65534
UNIT, USERS = "/system.slice/cnptest-root.service", "/user.slice/cnptest-user.scope"
RULES = f"""
settings: {{record: [user, euid, loginuid, exe, cmdline, cgroup]}}
rules:
  - {{name: any, events: [nonzero_exit]}}
  - {{name: user, events: [nonzero_exit], match: {{user: root}}}}
  - {{name: euid, events: [nonzero_exit], match: {{euid: 0}}}}
  - {{name: unit, events: [nonzero_exit], match: {{unit: cnptest-root.service}}}}
  - {{name: exe, events: [nonzero_exit], match: {{exe: {PYTHON}}}}}
  - {{name: glob, events: [nonzero_exit], match: {{exe: "{os.path.dirname(PYTHON)}/pyth*"}}}}
  - {{name: exec, events: [exec], match: {{any: [{{user: root}}, {{unit: cnptest-root.service}}]}}}}
$MARKER
"""
SERVICE = f"""
import json, os, sys
group, perl, code, clone = sys.argv[1:]
caller = os.fork()
if caller == 0:
    open(group, "w").write(str(os.getpid()))
    os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
    os.execv(perl, ["perl", "-e", code, clone])
ended = {{}}
while len(ended) < 2:
    pid, status = os.wait()
    ended[pid] = status
honest = []
for _ in range(20):
    honest.append(os.fork())
    if honest[-1] == 0:
        os._exit(3)
    os.waitpid(honest[-1], 0)
del ended[caller]
print(json.dumps([*ended.items(), honest]), flush=True)
"""
CLONE_PARENT = 0x8000 | 17  # and SIGCHLD
SYS_CLONE = {"x86_64": 56, "aarch64": 220}
ROUNDS = 20
WAYS = {
    "ends": "exit 3",
    "executes": 'exec "/bin/false"',
    "executes a set-user-ID program": 'open STDERR, ">", "/dev/null"; exec "/usr/bin/su", "--no-such-option"',
}


@pytest.mark.skipif(not PERL, reason="needs perl")
@pytest.mark.parametrize("way", WAYS)
def test_a_users_sibling_matches_no_rule_of_its_parents(tmp_path, in_cgroup, way):  # noqa: F811
    """Reaped at once. The children that root's process made itself keep all that it has.

    On a busy machine a read of /proc can be late. That is counted, and the last cgroup that was seen stands.
    """
    wait_for_group = in_cgroup(USERS, lambda: os._exit(0))
    os.waitpid(wait_for_group, 0)
    with running(tmp_path, RULES) as daemon:
        for _ in range(ROUNDS):
            service, sibling, honest = family_of_a_service(in_cgroup, way)
            daemon.mark_burst()
            found = {str(record["rule"]): record for record in daemon.matches(pid=sibling)}
            assert found.keys() - ({"euid"} if "set-user-ID" in way else set()) == {"any"}, found
            assert (found["any"]["user"], found["any"]["ppid"]) == ("nobody", service)
            cgroups = set()
            for pid in honest:
                found = {str(record["rule"]): record for record in daemon.matches(pid=pid)}
                cgroups.add(found["any"]["cgroup"])
                unit = {"unit"} if found["any"]["cgroup"] == UNIT else set()
                assert found.keys() == {"any", "user", "euid", "exe", "glob"} | unit, found
            if cgroups == {UNIT}:
                return
            assert late_reads(daemon), "the cgroup of the service's process was not read"
    raise AssertionError("reads of /proc are late on a busy machine, but not always")


def late_reads(daemon) -> int:
    with Client(daemon.directory / "run", PATIENCE_S) as client:
        (proc,) = [edge for edge in client.ask("status")["edges"] if edge["name"] == "proc"]
    return int(str(proc["late"]))


def family_of_a_service(in_cgroup, way: str) -> tuple[int, int, list[int]]:  # noqa: F811
    """Return the PIDs of a service's process, of its caller's child, and of its own children, after they have ended."""
    code = f"if (syscall($ARGV[0], {CLONE_PARENT}, 0, 0, 0, 0) == 0) {{ {WAYS[way]} }}"
    group = str(hierarchy() / USERS.lstrip("/") / "cgroup.procs")
    arguments = [PYTHON, "-ISc", SERVICE, group, PERL, code, str(SYS_CLONE[os.uname().machine])]
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    service = in_cgroup(UNIT, lambda: (os.dup2(writer, 1), os.execv(PYTHON, arguments)))
    os.close(writer)
    with open(reader) as file:
        (sibling, status), honest = json.load(file)
    assert os.waitpid(service, 0)[1] == 0 and status != 0
    return service, int(sibling), honest
