"""What `record:` asks for is there: ancestors, effective user and login session too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernel.harness import Daemon, child, rename, running, wait_status

RECORD = """
{settings}
rules:
  - name: recorded
    events: [nonzero_exit]
    match: {{comm: cnptest-rec}}
    {record}
    log: {{message: "{{exe}} {{cmdline}} < {{ancestors}}"}}
$MARKER
"""
IDS = """
rules:
  - {name: became-root, events: [uid], match: {euid: root, not: {user: root}}}
  - {name: suid-failed, events: [nonzero_exit], match: {comm: cnptest-suid, euid: 0, user: nobody}}
  - {name: login-failed, events: [nonzero_exit], match: {comm: cnptest-login, loginuid: 4321}}
  - {name: no-login, events: [nonzero_exit], match: {comm: cnptest-login, loginuid: unset}}
$MARKER
"""
FIELDS = "[exe, cmdline, cgroup, ancestors, euid, loginuid]"


ROUNDS = 20  # at most: on a busy machine reads of /proc can be late
WAIT = "echo up; read x; exit 3"


def fail_after(process: subprocess.Popen[str], daemon: Daemon) -> None:
    """Let a program that runs WAIT end when its start has been evaluated."""
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "up\n"
    daemon.mark()
    process.stdin.close()
    process.wait()


def piped(*command: str | Path, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=before)


@pytest.fixture
def program(tmp_path):
    return Path(shutil.copy(os.path.realpath("/bin/sh"), tmp_path / "cnptest-rec"))


@pytest.mark.parametrize(
    ("settings", "record"),
    [("", f"record: {FIELDS}"), (f"settings: {{record: {FIELDS}}}", "description: none")],
    ids=["rule", "settings"],
)
def test_what_a_rule_asks_for_is_in_the_record(tmp_path, program, settings, record):
    """By the rule, or by the settings for every rule."""
    with running(tmp_path, RECORD.format(settings=settings, record=record)) as daemon:
        complete: list[tuple[int, dict[str, Any]]] = []
        for _ in range(ROUNDS):
            process = piped("sh", "-c", f"sh -c '{program} -c \"{WAIT}\"; exit 0'; exit 0")
            fail_after(process, daemon)
            daemon.mark()
            one = daemon.matches("recorded")[-1]
            if None not in [one.get(name) for name in ("exe", "cmdline", "cgroup", "loginuid")]:
                complete.append((process.pid, one))
            if len(complete) == 3:
                break
        assert len(complete) == 3, "reads of /proc are late on a busy machine, but not always"
        for outermost, one in complete:
            assert (one["exe"], one["cmdline"]) == (str(program), f"{program} -c {WAIT}")
            assert (one["euid"], one["uid"]) == (0, 0)
            assert one["loginuid"] == int(Path("/proc/self/loginuid").read_text())
            above = one["ancestors"]
            assert [each["comm"] for each in above[:2]] == ["sh", "sh"]
            assert [each["pid"] for each in above[:2]] == [one["ppid"], outermost]
            assert len(above) <= 16
            assert above[-1]["pid"] == 1 or len(above) == 16
            shells = f"sh[{one['ppid']}], sh[{outermost}]"
            assert str(one["message"]).startswith(f"{program} {program} -c {WAIT} < {shells}, ")


def test_more_than_16_ancestors_are_cut(tmp_path, program):
    deep = (
        f"import os, subprocess, sys; n = int(sys.argv[1]); os.execv('{program}', ['x', '-c', 'exit 3']) if not n else "
    )
    deep += "subprocess.call([*sys.orig_argv[:-1], str(n - 1)])"
    with running(tmp_path, RECORD.format(settings="", record=f"record: {FIELDS}")) as daemon:
        subprocess.call([sys.executable, "-IS", "-c", deep, "20"])
        daemon.mark()
        (match,) = daemon.matches("recorded")
        assert len(match["ancestors"]) == 16


def test_a_user_who_becomes_root_matches_at_that_event(tmp_path):
    """A program with the set-user-ID bit, as su and sudo have it; root's own runs of it do not match."""
    os.chmod(tmp_path, 0o755)
    suid = Path(shutil.copy(os.path.realpath("/bin/false"), tmp_path / "cnptest-suid"))
    os.chmod(suid, 0o4755)
    with running(tmp_path, IDS) as daemon:
        pids = []
        for _ in range(5):
            subprocess.call([suid])
            process = subprocess.Popen(["setpriv", "--reuid=nobody", "--clear-groups", suid])
            process.wait()
            pids.append(process.pid)
        daemon.mark()
        assert [one["pid"] for one in daemon.matches("suid-failed")] == pids
        ids = {one["pid"]: (one["ruid"], one["euid"], one["uid"]) for one in daemon.matches("became-root")}
        assert {pid: ids[pid] for pid in pids} == dict.fromkeys(pids, (65534, 0, 65534))
        names = {one["comm"] for one in daemon.matches("became-root") if one["pid"] in pids}
        assert names == {None}, "its name before is setpriv, and the event comes before that of its exec"


def test_without_a_table_a_uid_event_has_its_effective_user(tmp_path):
    """No attribute of the process is asked for: the event has both ids."""
    rules = "rules:\n  - {name: became-root, events: [uid], match: {euid: root, not: {user: root}}}\n$MARKER\n"
    os.chmod(tmp_path, 0o755)
    suid = Path(shutil.copy(os.path.realpath("/bin/false"), tmp_path / "cnptest-suid"))
    os.chmod(suid, 0o4755)
    with running(tmp_path, rules) as daemon:
        process = subprocess.Popen(["setpriv", "--reuid=nobody", "--clear-groups", suid])
        process.wait()
        daemon.mark()
        assert process.pid in [one["pid"] for one in daemon.matches("became-root")]


def log_in() -> None:
    """Begin a login session, as pam_loginuid(8) does."""
    Path("/proc/self/loginuid").write_text("4321")


def test_the_login_session_of_a_process_is_known(tmp_path):
    unset = Path("/proc/self/loginuid").read_text() == str(0xFFFFFFFF)
    program = Path(shutil.copy(os.path.realpath("/bin/sh"), tmp_path / "cnptest-login"))
    with running(tmp_path, IDS) as daemon:
        sessions, others = set(), set()
        for _ in range(ROUNDS):
            session, other = piped(program, "-c", WAIT, before=log_in), piped(program, "-c", WAIT)
            fail_after(session, daemon)
            fail_after(other, daemon)
            daemon.mark()
            sessions.add(session.pid)
            others.add(other.pid)
            found, without = daemon.matches("login-failed"), daemon.matches("no-login")
            if found and (without or not unset):
                break
        assert found
        assert {one["loginuid"] for one in found} == {4321}
        assert {one["pid"] for one in found} <= sessions
        assert bool(without) is unset
        assert {one["pid"] for one in without} <= others


def test_a_zombie_shows_a_session_that_began_last(tmp_path):
    """No event reports that, and /proc was read before it."""
    if Path("/proc/self/loginuid").read_text() != str(0xFFFFFFFF):
        pytest.skip("these tests run within a session already")
    program = Path(shutil.copy(os.path.realpath("/bin/sh"), tmp_path / "cnptest-login"))
    with running(tmp_path, IDS) as daemon:
        for _ in range(ROUNDS):  # events can be lost on a busy machine
            process = subprocess.Popen([program, "-c", "echo 4321 >/proc/self/loginuid; exit 3"])
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            daemon.mark()
            process.wait()
            if daemon.matches("login-failed", pid=process.pid):
                break
        assert daemon.matches("login-failed")
        assert daemon.matches("no-login") == []


def test_a_short_job_of_a_session_is_never_outside_one(tmp_path):
    """As a cron daemon does: a child begins the session, and the job that it forks inherits it."""
    if Path("/proc/self/loginuid").read_text() != str(0xFFFFFFFF):
        pytest.skip("these tests run within a session already")
    program = Path(shutil.copy(os.path.realpath("/bin/sh"), tmp_path / "cnptest-login"))

    def cron() -> None:
        log_in()
        subprocess.run([program, "-c", "exit 3"], check=False)
        rename("cnptest-login")
        os._exit(3)

    with running(tmp_path, IDS) as daemon:
        for _ in range(ROUNDS):
            wait_status(child(cron))
            subprocess.Popen([program, "-c", "exit 3"], preexec_fn=log_in).wait()
        daemon.mark()
        assert daemon.matches("no-login") == []
