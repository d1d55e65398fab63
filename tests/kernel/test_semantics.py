"""One match for each process death, with the status of waitpid() and the process's own name.

Every case runs against this kernel, and against this kernel with features refused as on older ones.
"""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from pathlib import Path

import pytest
from kernel.harness import (
    child,
    exit_thread,
    expected_fields,
    last_thread,
    rename,
    running,
    sleeping_threads,
    wait_status,
)  # fmt: skip

RULES = """
rules:
  - name: died
    events: [exit]
    match: {comm: ["cnptest-*", sh]}
  - name: dumped
    events: [coredump]
    match: {comm: "cnptest-*"}
$MARKER
"""

KERNELS = {
    "this": [],
    "no-event-mask": ["--refuse=event_mask"],
    "no-taskstats": ["--refuse=taskstats"],
    "oldest": ["--refuse=event_mask", "--refuse=taskstats"],
    "no-filter": ["--refuse=socket_filter"],
}


@pytest.fixture(scope="module", params=KERNELS, ids=list(KERNELS))
def daemon(request, tmp_path_factory):
    with running(tmp_path_factory.mktemp("cnprocd"), RULES, *KERNELS[request.param]) as daemon:
        yield daemon


def dies_as(daemon, body, comm="cnptest-case"):
    """Run `body` in a child of this name. Check its one match against waitpid. Return the record."""
    pid = child(lambda: (rename(comm), body()))
    status = wait_status(pid)
    # A death can wait for the exit record of a sibling thread, while that of the mark is reported at once.
    daemon.wait_for("rule_matched", rule="died", pid=pid)
    daemon.mark()
    records = daemon.matches("died", pid=pid)
    assert len(records) == 1, records
    record = records[0]
    expected = {**expected_fields(status), "comm": comm, "ppid": os.getpid(), "uid": 0, "gid": 0, "recovered": False}
    assert {name: record[name] for name in expected} == expected
    return record, status


@pytest.mark.parametrize("code", [0, 1, 3, 255])
def test_exit_code(daemon, code):
    _, status = dies_as(daemon, lambda: os._exit(code))
    assert os.WEXITSTATUS(status) == code


@pytest.mark.parametrize("number", [9, 15, 10, 34])
def test_signal(daemon, number):
    pid = child(lambda: (rename("cnptest-case"), os.kill(os.getpid(), number)))
    status = wait_status(pid)
    daemon.mark()
    (record,) = daemon.matches("died", pid=pid)
    assert os.WTERMSIG(status) == number
    assert record["signal"] == {9: "SIGKILL", 15: "SIGTERM", 10: "SIGUSR1", 34: "SIGRTMIN"}[number]


def test_hundred_threads_and_exit_group(daemon):
    dies_as(daemon, lambda: (sleeping_threads(100), os._exit(3)))


def test_leader_ends_first_then_a_thread_exits_the_process(daemon):
    dies_as(daemon, lambda: (last_thread(lambda: (rename("other-name"), os._exit(3))), exit_thread(0)))


def test_the_last_thread_decides_over_an_early_leaders_code(daemon):
    # Apart by more than the 5 ms within which two codes count as one group exit where no record names the last thread.
    dies_as(daemon, lambda: (last_thread(lambda: (time.sleep(0.02), exit_thread(6))), exit_thread(5)))


def test_thread_ends_with_a_code_before_the_leader(daemon):
    def body():
        thread = threading.Thread(target=lambda: exit_thread(7))
        thread.start()
        path = f"/proc/self/task/{thread.native_id}"
        while os.path.exists(path):
            pass
        os._exit(5)

    dies_as(daemon, body)


def test_a_thread_that_ends_alone_is_no_death(daemon):
    pid = child(lambda: (rename("cnptest-lives"), threading.Thread(target=lambda: exit_thread(9)).start(), wait_pipe()))
    wait_gone_threads(pid)
    daemon.mark()
    assert daemon.matches("died", pid=pid) == []
    os.kill(pid, 9)
    status = wait_status(pid)
    daemon.mark()
    (record,) = daemon.matches("died", pid=pid)
    assert os.WTERMSIG(status) == 9
    assert record["signal"] == "SIGKILL"


def wait_pipe():
    read, _write = os.pipe()
    os.read(read, 1)


def wait_gone_threads(pid):
    """Wait until the process has started and lost a second thread: it has used two thread IDs."""
    while len(os.listdir(f"/proc/{pid}/task")) > 1 or Path(f"/proc/{pid}/comm").read_text() != "cnptest-lives\n":
        pass
    with open(f"/proc/{pid}/wchan") as wchan:
        while "pipe" not in wchan.read():
            wchan.seek(0)


def test_exec_from_a_thread_that_is_not_the_leader(daemon):
    read, write = os.pipe()

    def body():
        os.dup2(read, 0)
        os.close(write)
        threading.Thread(target=lambda: os.execv("/bin/sh", ["sh", "-c", "read line; exit 9"])).start()
        threading.Event().wait()

    pid = child(lambda: (rename("cnptest-exec"), body()))
    os.close(read)
    while Path(f"/proc/{pid}/comm").read_text() != "sh\n":
        pass
    daemon.mark()  # see test_vfork_and_exec
    os.close(write)
    status = wait_status(pid)
    daemon.mark()
    (record,) = daemon.matches("died", pid=pid)
    assert os.WEXITSTATUS(status) == 9 == record["exit_code"]
    assert record["comm"] == "sh"


def test_sigkill_of_a_threaded_process(daemon):
    dies_as(daemon, lambda: (sleeping_threads(5), os.kill(os.getpid(), 9)))


def test_core_dump_of_a_threaded_process(daemon, tmp_path):
    def body():
        os.chdir(tmp_path)
        resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))
        sleeping_threads(5)
        os.abort()

    record, status = dies_as(daemon, body)
    assert os.WCOREDUMP(status), "this machine did not dump core, so the case proves nothing"
    assert [r["comm"] for r in daemon.matches("dumped", pid=record["pid"])] == ["cnptest-case"]


def test_abort_without_core(daemon):
    def body():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()

    _, status = dies_as(daemon, body)
    assert not os.WCOREDUMP(status)


def test_vfork_and_exec(daemon):
    # subprocess uses vfork(): the child uses the memory of the test until it execs. Without exit records it must live
    # for a moment: a process that is gone before its exec was read has an unknown name there.
    process = subprocess.Popen(["/bin/sh", "-c", "read line; exit 4"], stdin=subprocess.PIPE)
    daemon.mark()
    process.communicate()
    status = process.returncode
    daemon.mark()
    (record,) = daemon.matches("died", pid=process.pid)
    assert (status, record["exit_code"], record["comm"], record["ppid"]) == (4, 4, "sh", os.getpid())


def test_double_fork_to_a_subreaper(daemon):
    """The grandchild's parent at its death is the process that adopted it, as in getppid()."""
    read, write = os.pipe()

    def grandchild(middle):
        rename("cnptest-orphan")
        while os.getppid() == middle:
            pass
        os.write(write, f"{os.getpid()} {os.getppid()}".encode())
        os._exit(8)

    def subreaper():
        os.setsid()
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        middle = child(lambda: (middle_of := os.getpid(), child(lambda: grandchild(middle_of)), os._exit(0)))
        os.waitpid(middle, 0)
        os.waitpid(-1, 0)
        os._exit(0)

    reaper = child(subreaper)
    orphan, adopter = map(int, os.read(read, 100).split())
    wait_status(reaper)
    daemon.mark()
    assert adopter == reaper
    (record,) = daemon.matches("died", pid=orphan)
    assert (record["exit_code"], record["ppid"], record["comm"]) == (8, reaper, "cnptest-orphan")


def test_renamed_just_before_death(daemon):
    dies_as(daemon, lambda: (rename("cnptest-old"), rename("cnptest-case"), os._exit(2)))


def test_renamed_through_proc_just_before_death(daemon):
    def body():
        with open("/proc/self/comm", "w") as comm:
            comm.write("cnptest-case")
        os._exit(2)

    dies_as(daemon, body)


def test_hostile_name_is_escaped_and_kept(daemon):
    name = b"cnptest-\n\x1b[\xff"
    pid = child(lambda: (rename(name), os._exit(1)))
    wait_status(pid)
    daemon.mark()
    (record,) = daemon.matches("died", pid=pid)
    assert record["comm"] == r"cnptest-\x0a\x1b[\xff"
    assert bytes.fromhex(record["comm_hex"]) == name
