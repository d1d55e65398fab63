"""Every event type of cn_proc.h, caused by a real process, gives one match with the right fields."""

from __future__ import annotations

import ctypes
import os
import resource

import pytest
from kernel.harness import LIBC, child, rename, running, wait_status

NOBODY = 65534

RULES = """
rules:
  - {name: forked, events: [fork], match: {comm: cnptest-ev}}
  - {name: execed, events: [exec], match: {comm: sleep}}
  - {name: uid-changed, events: [uid], match: {comm: cnptest-ev}}
  - {name: gid-changed, events: [gid], match: {comm: cnptest-ev}}
  - {name: session, events: [sid], match: {comm: cnptest-ev}}
  - {name: traced, events: [ptrace], match: {comm: cnptest-ev}}
  - {name: renamed, events: [comm], match: {comm: cnptest-ev2}}
  - {name: dumped, events: [coredump], match: {comm: cnptest-ev}}
  - {name: ended, events: [exit], match: {comm: cnptest-ev}}
  - {name: failed, events: [nonzero_exit], match: {comm: cnptest-ev}}
  - {name: as-nobody, events: [nonzero_exit], match: {user: "65534", comm: "cnptest-*"}}
  - {name: in-group, events: [nonzero_exit], match: {group: "65534", comm: "cnptest-*"}}
  - {name: of-parent, events: [nonzero_exit], match: {comm: cnptest-child, parent: {comm: cnptest-ev}}}
  - {name: not-mine, events: [nonzero_exit], match: {comm: "cnptest-*", not: {comm: cnptest-ev}}}
  - {name: either, events: [nonzero_exit], match: {any: [{comm: cnptest-a}, {comm: cnptest-b}], exit_code: "2-5"}}
  - {name: cored, events: [nonzero_exit], match: {comm: cnptest-ev, core_dumped: true}}
$MARKER
"""


@pytest.fixture(scope="module", params=[[], ["--refuse=event_mask", "--refuse=taskstats"]], ids=["this", "oldest"])
def daemon(request, tmp_path_factory):
    with running(tmp_path_factory.mktemp("cnprocd"), RULES, *request.param) as daemon:
        yield daemon


def run(daemon, body, comm="cnptest-ev"):
    pid = child(lambda: (rename(comm), body(), os._exit(0)))
    status = wait_status(pid)
    daemon.mark()
    return pid, status


def names(daemon, pid):
    return sorted(record["rule"] for record in daemon.matches(pid=pid))


def test_fork_is_about_the_child(daemon):
    read, write = os.pipe()
    pid, _ = run(daemon, lambda: os.write(write, str(child(lambda: os._exit(0))).encode()))
    born = int(os.read(read, 20))
    (record,) = daemon.matches("forked", pid=born)
    assert (record["kind"], record["ppid"], record["comm"]) == ("fork", pid, "cnptest-ev")


def test_exec_tells_the_new_name(daemon):
    pid = child(lambda: os.execv("/bin/sleep", ["sleep", "60"]))
    try:
        record = daemon.wait_for("rule_matched", rule="execed", pid=pid)
        assert (record["kind"], record["comm"], record["cmdline"]) == ("exec", "sleep", "sleep 60")
        assert record["exe"] == os.path.realpath("/bin/sleep")
    finally:
        os.kill(pid, 9)
        wait_status(pid)


def test_user_and_group_change(daemon):
    pid, _ = run(daemon, lambda: (os.setgid(NOBODY), os.setuid(NOBODY)))
    (gid_record,), (uid_record,) = daemon.matches("gid-changed", pid=pid), daemon.matches("uid-changed", pid=pid)
    assert (uid_record["kind"], uid_record["ruid"], uid_record["euid"]) == ("uid", NOBODY, NOBODY)
    assert (gid_record["kind"], gid_record["rgid"], gid_record["egid"]) == ("gid", NOBODY, NOBODY)


def test_failure_of_another_user(daemon):
    pid, _ = run(daemon, lambda: (os.setgid(NOBODY), os.setuid(NOBODY), os._exit(1)), "cnptest-u")
    assert names(daemon, pid) == ["as-nobody", "in-group", "not-mine"]
    (record,) = daemon.matches("as-nobody", pid=pid)
    assert (record["uid"], record["gid"]) == (NOBODY, NOBODY)


def test_new_session(daemon):
    pid, _ = run(daemon, os.setsid)
    (record,) = daemon.matches("session", pid=pid)
    assert record["kind"] == "sid"


def test_ptrace_names_the_tracer(daemon):
    read, write = os.pipe()

    def body():
        traced = os.fork()
        if traced == 0:
            while True:
                os.read(read, 1)
        if LIBC.ptrace(16, traced, 0, 0) != 0:  # PTRACE_ATTACH
            os._exit(ctypes.get_errno())
        os.waitpid(traced, 0)
        os.kill(traced, 9)

    pid, _ = run(daemon, body)
    records = [record for record in daemon.matches("traced") if record["tracer_pid"] == pid]
    assert [record["ppid"] for record in records] == [pid]
    assert write


def test_rename(daemon):
    pid, _ = run(daemon, lambda: rename("cnptest-ev2"))
    (record,) = daemon.matches("renamed", pid=pid)
    assert (record["kind"], record["comm"]) == ("comm", "cnptest-ev2")


def test_core_dump(daemon, tmp_path):
    def body():
        os.chdir(tmp_path)
        resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))
        os.abort()

    pid, status = run(daemon, body)
    assert os.WCOREDUMP(status), "this machine did not dump core, so the case proves nothing"
    assert names(daemon, pid) == ["cored", "dumped", "ended", "failed"]


def test_success_and_failure(daemon):
    fine, _ = run(daemon, lambda: os._exit(0))
    broken, _ = run(daemon, lambda: os._exit(255))
    assert (names(daemon, fine), names(daemon, broken)) == (["ended"], ["ended", "failed"])
    assert daemon.matches("failed", pid=broken)[0]["kind"] == "nonzero_exit"
    assert daemon.matches("ended", pid=fine)[0]["kind"] == "exit"


def test_parent_by_name(daemon):
    read, write = os.pipe()

    def body():
        pid = child(lambda: (rename("cnptest-child"), os._exit(1)))
        os.waitpid(pid, 0)
        os.write(write, str(pid).encode())

    run(daemon, body)
    pid = int(os.read(read, 20))
    assert names(daemon, pid) == ["forked", "not-mine", "of-parent"]
    assert daemon.matches("of-parent", pid=pid)[0]["parent_comm"] == "cnptest-ev"


@pytest.mark.parametrize(("comm", "code", "expected"), [("cnptest-a", 2, True), ("cnptest-b", 6, False)])
def test_any_and_range(daemon, comm, code, expected):
    pid, _ = run(daemon, lambda: os._exit(code), comm)
    assert ("either" in names(daemon, pid)) is expected
