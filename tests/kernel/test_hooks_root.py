"""Properties of hooks that need root and a real kernel: users, capabilities, cgroups, failing disks."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from unit.hookkit import Records, aio, alive, hook, request, running, searched, shell, zombies

from cnprocd.connector.decode import decode
from cnprocd.connector.event import Exec, Fork
from cnprocd.connector.listener import Listener
from cnprocd.launch.starter import start_ticks
from cnprocd.rules.ruleset import ResourceLimits
from cnprocd.spool.job import State
from cnprocd.spool.spool import FILE_NAME, Spool

REPO = Path(__file__).parents[2]
NOBODY = 65534
LONER = 100_000 + os.getpid()  # an unused user ID: all its processes belong to this test


async def output_of(tmp_path, spec):
    """Run one hook. Return (its lines, its record)."""
    async with running(tmp_path, {"r": spec}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        (record,) = records.of("hook_finished") or records.of("hook_failed")
        return [fields["line"] for fields in records.of("hook_output")], record


# -- users -------------------------------------------------------------------------------------------------------


@aio
async def test_a_hook_has_its_users_groups_and_no_privileges(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 4, 24])
    script = "id -u; id -g; id -G; grep -E '^Cap(Eff|Prm|Inh|Amb)' /proc/self/status; echo $HOME $USER $LOGNAME $SHELL"
    lines, record = await output_of(tmp_path, shell(script, user="nobody"))
    assert record["reason"] is None
    assert lines[:3] == [str(NOBODY), str(NOBODY), f"{NOBODY} 4 24"]
    assert {re.sub(r"\s+", " ", line).split()[1] for line in lines[3:7]} == {"0" * 16}
    assert lines[7] == "/nonexistent nobody nobody /usr/sbin/nologin"


@aio
async def test_a_group_alone_and_a_number_without_an_entry(tmp_path):
    lines, _ = await output_of(tmp_path, shell("id -u; id -g; id -G", group=NOBODY))
    assert (lines[0], lines[1]) == ("0", str(NOBODY))
    (tmp_path / "b").mkdir()
    lines, _ = await output_of(tmp_path / "b", shell("id -u; id -g; id -G", user=LONER, group=LONER))
    assert lines == [str(LONER)] * 3


@aio
async def test_a_number_without_an_entry_needs_a_group(tmp_path):
    _, record = await output_of(tmp_path, shell("true", user=LONER))
    assert "not in the user database" in record["reason"]


@aio
async def test_a_hook_of_another_user_can_reopen_what_it_was_given(tmp_path):
    lines, record = await output_of(tmp_path, shell("echo out >/dev/stdout; cat /dev/stdin", user="nobody"))
    assert record["reason"] is None, lines
    assert lines[0] == "out"
    assert lines[1].startswith("{")


@aio
async def test_the_directory_is_entered_as_the_user(tmp_path):
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    _, record = await output_of(tmp_path, shell("true", user="nobody", working_directory=str(private)))
    assert record["reason"] == f"cannot enter {private}: Permission denied"


@aio
async def test_a_program_that_the_user_may_not_execute(tmp_path):
    program = tmp_path / "hook"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    _, record = await output_of(tmp_path, hook(str(program), user="nobody"))
    assert record["reason"] == f"user nobody may not execute {program}"


@aio
async def test_a_hook_does_not_inherit_the_oom_score_of_the_daemon(tmp_path):
    mine = Path("/proc/self/oom_score_adj")
    before = mine.read_text()
    mine.write_text("300")  # a negative one needs CAP_SYS_RESOURCE, which even root may lack
    try:
        lines, _ = await output_of(tmp_path, shell("cat /proc/self/oom_score_adj"))
    finally:
        mine.write_text(before)
    assert lines == ["0"]


def as_nobody(user, script, *setpriv):
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK):
        pytest.skip("no interpreter that an ordinary user can run")
    result = subprocess.run(
        [
            *("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", *setpriv),
            *(python, str(REPO / "tests" / "kernel" / "nobody_driver.py"), user, script),
        ],
        env={"PYTHONPATH": f"{REPO}:{REPO}/tests", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_an_unprivileged_daemon_runs_hooks_only_as_itself():
    assert as_nobody("", "id -u") == [str(NOBODY)]
    assert as_nobody("nobody", "id -u") == [str(NOBODY)]
    (line,) = as_nobody("root", "id -u")
    assert line.startswith("failed: cannot become")


def test_a_hook_has_nothing_of_the_daemons_ambient_capabilities():
    lines = as_nobody(
        *("", "grep -E '^Cap(Eff|Prm|Amb)' /proc/self/status"), "--inh-caps=+net_admin", "--ambient-caps=+net_admin"
    )
    assert {line.split("\\x09")[-1].split()[-1] for line in lines} == {"0" * 16}


# -- running away ------------------------------------------------------------------------------------------------


def of_user(uid):
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.stat().st_uid == uid and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


@aio
async def test_a_fork_bomb_within_its_limit_is_ended_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("cnprocd.launch.attempt.TERM_GRACE_S", 0.2)
    bomb = shell(
        "trap '' TERM; b() { b & b & while :; do sleep 1000; done; }; b",
        user=LONER,
        group=LONER,
        timeout_s=1.0,
        limits=ResourceLimits(processes=40),
    )
    async with running(tmp_path, {"bomb": bomb, "good": hook("/bin/true")}, slots=2) as (spool, scheduler, records):
        spool.enqueue([request("bomb")] + [request("good") for _ in range(5)])
        scheduler.wake()
        await records.ended(*range(1, 7))
        # Some shells exit when fork fails; the bomb is then left behind by the failed hook.
        assert records.of("hook_failed", rule="bomb")[0]["reason"] in ("timed out after 1 s", "exit code 2")
        assert len(records.of("hook_finished", rule="good")) == 5
    assert of_user(LONER) == []
    assert zombies() == []


@pytest.fixture
def cgroup():
    for mounted in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        directory = Path(mounted, f"cnprocd-test-{os.getpid()}")
        with contextlib.suppress(OSError):
            directory.mkdir()
            if (directory / "cgroup.kill").exists():
                break
            directory.rmdir()
    else:
        pytest.skip("no cgroup v2 with cgroup.kill that we may write")
    yield directory
    directory.rmdir()


ESCAPE = "setsid env -i sh -c 'sleep 1000 & echo $!'"  # without session, parent and environment, only the cgroup has it


@aio
async def test_a_cgroup_keeps_processes_that_leave_their_session(tmp_path, cgroup, monkeypatch):
    monkeypatch.setattr("cnprocd.launch.attempt.TERM_GRACE_S", 0.2)
    spec = shell(f"cat /proc/self/cgroup; {ESCAPE}; sleep 1000", timeout_s=0.5)
    async with running(tmp_path, {"r": spec}, cgroup_dir=cgroup) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        *membership, pid = [fields["line"] for fields in records.of("hook_output")]
        assert any(line.endswith("/job-1-1") for line in membership)
        assert not alive(int(pid))
        assert list(cgroup.glob("job-*")) == []


@aio
async def test_an_emptied_cgroup_is_removed_later(tmp_path, cgroup, monkeypatch):
    monkeypatch.setattr("cnprocd.spool.scheduler.HOUSEKEEPING_S", 0.01)
    spec = shell("sleep 1000 & echo $!")
    async with running(tmp_path, {"r": spec}, cgroup_dir=cgroup) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        assert [path.name for path in cgroup.glob("job-*")] == ["job-1-1"]
        pid = int(records.of("hook_output")[0]["line"])
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while list(cgroup.glob("job-*")):
                scheduler.wake()
                await asyncio.sleep(0.01)


@aio
async def test_without_a_cgroup_only_that_one_gets_away(tmp_path, monkeypatch):
    """A limit in group.py. If this test begins to fail, the docstring there can promise more."""
    monkeypatch.setattr("cnprocd.launch.attempt.TERM_GRACE_S", 0.2)
    lines, _ = await output_of(tmp_path, shell(f"{ESCAPE}; sleep 1000", timeout_s=0.5))
    assert alive(int(lines[0]))
    os.kill(int(lines[0]), signal.SIGKILL)


# -- what the kernel sees ----------------------------------------------------------------------------------------


@aio
async def test_a_hook_is_known_before_its_exec_and_is_a_direct_child(tmp_path):
    listener = Listener.open(1 << 20)
    listener.subscribe(2.0)
    known: dict[int, int] = {}
    before: list[int] = []
    try:
        async with running(
            tmp_path,
            {"r": hook("/bin/true")},
            before_start=lambda: before.append(time.monotonic_ns()),
            on_started=lambda pid, _: known.update({pid: time.monotonic_ns()}),
        ) as (spool, scheduler, records):
            spool.enqueue([request("r") for _ in range(5)])
            scheduler.wake()
            await records.ended(*range(1, 6))
        events = list(drained(listener))
    finally:
        listener.unsubscribe()
    execs = {event.process_tgid: event.timestamp_ns for event in events if isinstance(event, Exec)}
    forks = {event.child_tgid: event.parent_tgid for event in events if isinstance(event, Fork)}
    assert len(known) == len(before) == 5
    for (pid, known_ns), before_ns in zip(known.items(), before, strict=True):
        assert before_ns <= known_ns < execs[pid]
        assert forks[pid] == os.getpid()


def drained(listener):
    while (batch := listener.receive()) is not None:
        yield from decode(batch, listener.rejects)


# -- disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k,mode=700", "test", directory], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


@aio
async def test_a_full_disk_stops_no_cleanup_and_durability_returns(small_disk, monkeypatch):
    monkeypatch.setattr("cnprocd.spool.scheduler.HOUSEKEEPING_S", 0.01)
    monkeypatch.setattr("cnprocd.spool.scheduler.DURABLE_RETRY_S", 0.0)
    async with running(small_disk, {"r": hook("/bin/true")}) as (spool, scheduler, records):
        spool.enqueue([request("r")])
        scheduler.wake()
        await records.ended(1)
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        ids = spool.enqueue([request("r", {"pid": n, "filler": "y" * 2000}) for n in range(50)]).job_ids
        scheduler.wake()
        await records.until(lambda: records.of("spool_not_durable"))
        await records.ended(*ids)
        filler.unlink()
        scheduler.wake()
        await records.until(lambda: records.of("spool_durable"))
        assert spool.counts().done == 51
    again = Spool.open(small_disk, log=Records())
    assert again.durable
    assert again.counts().done == 51
    again.close()


@aio
async def test_jobs_in_a_file_that_cannot_be_written_still_run(small_disk):
    spool = Spool.open(small_disk, log=Records())
    spool.enqueue([request("r"), request("r")])
    spool.close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    async with running(small_disk, {"r": hook("/bin/true")}) as (spool, _, records):
        assert not spool.durable
        assert "Read-only file system" in spool.why
        await records.ended(1, 2)
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        assert spool.try_durable()
    again = Spool.open(small_disk, log=Records())
    assert [job.state for job in searched(again.find_jobs()).value] == [State.DONE] * 2
    assert (small_disk / FILE_NAME).exists()
    again.close()


def test_a_start_time_is_the_kernels(tmp_path):
    assert start_ticks(os.getpid()) == int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
