"""Hooks that misbehave: each gets its record, and the hooks of another rule are not affected."""

import os
import signal
from dataclasses import dataclass, field

import pytest
from unit.hookkit import aio, hook, request, running, shell, zombies

from cnprocd.rules.ruleset import ResourceLimits

KILL = signal.SIGKILL


@dataclass
class Hostile:
    """A hook and the fields of its record. `reason` None: it counts as success."""

    script: str
    reason: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    output: list[str] | None = None
    more: dict = field(default_factory=dict)


TABLE = {
    "hangs": Hostile("exec sleep 1000", "timed out after 0.5 s", signal=signal.SIGTERM, more={"timeout_s": 0.5}),
    "ignores TERM": Hostile(
        "trap '' TERM; while :; do sleep 1000; done", "timed out after 0.5 s", signal=KILL, more={"timeout_s": 0.5}
    ),
    "stops itself": Hostile("kill -STOP $$", "timed out after 0.5 s", signal=KILL, more={"timeout_s": 0.5}),
    "answers TERM with success": Hostile(
        "trap 'exit 0' TERM; while :; do sleep 0.01; done",
        "timed out after 0.5 s",
        exit_code=0,
        more={"timeout_s": 0.5},
    ),
    "writes 100 MB": Hostile(
        "head -c 104857600 /dev/zero",
        exit_code=0,
        output=["\\x00" * 100, f"[output limit reached: {104857600 - 100} bytes and 0 lines not shown]"],
        more={"output_limit_bytes": 100},
    ),
    "writes to standard error only": Hostile("echo oh >&2", exit_code=0, output=["oh"]),
    "writes terminal escapes": Hostile(
        r"printf '\033[2J\377\nMESSAGE_ID=x\r\n'", exit_code=0, output=["\\x1b[2J\\xff", "MESSAGE_ID=x"]
    ),
    "closes its standard input": Hostile("exec <&-; exit 0", exit_code=0),
    "closes everything": Hostile("exec <&- >&- 2>&-; sleep 0.1; exit 3", "exit code 3", exit_code=3),
    "exits 255": Hostile("exit 255", "exit code 255", exit_code=255),
    "kills itself": Hostile("kill -SEGV $$", "killed by SIGSEGV", signal=signal.SIGSEGV),
    "kills its process group": Hostile("sleep 1000 & kill -9 0", "killed by SIGKILL", signal=KILL),
    "leaves its session while it is running": Hostile(
        "setsid sleep 1000 & exec sleep 1000", "timed out after 0.5 s", signal=signal.SIGTERM, more={"timeout_s": 0.5}
    ),
    "fills its file size limit": Hostile(
        "head -c 1000000 /dev/zero >big; exit 7",
        "exit code 7",
        exit_code=7,
        more={"limits": ResourceLimits(file_size_bytes=4096)},
    ),
    "burns its CPU time": Hostile(
        "while :; do :; done", "killed by SIGKILL", signal=KILL, more={"limits": ResourceLimits(cpu_time_s=0.2)}
    ),
    "wants more files than it may": Hostile(
        "exec 3</dev/null 4</dev/null", "exit code 2", exit_code=2, more={"limits": ResourceLimits(open_files=4)}
    ),
}


@pytest.mark.parametrize("name", TABLE)
@aio
async def test_a_hostile_hook_gets_its_record_and_harms_no_other(name, tmp_path, monkeypatch):
    monkeypatch.setattr("cnprocd.launch.attempt.TERM_GRACE_S", 0.2)
    case = TABLE[name]
    hostile = shell(case.script, working_directory=str(tmp_path), **case.more)
    async with running(tmp_path, {"hostile": hostile, "good": hook("/bin/true")}, slots=2) as (
        spool,
        scheduler,
        records,
    ):
        spool.enqueue([request("hostile")] + [request("good") for _ in range(5)])
        scheduler.wake()
        await records.ended(*range(1, 7))
        assert len(records.of("hook_finished", rule="good")) == 5
        (record,) = records.of("hook_failed" if case.reason else "hook_finished", rule="hostile")
        assert (record["reason"], record["exit_code"], record["signal"]) == (case.reason, case.exit_code, case.signal)
        assert bool(records.of("job_dead")) == bool(case.reason)
        if case.output is not None:
            assert [line["line"] for line in records.of("hook_output")] == case.output
        assert scheduler.running() == []
    assert zombies() == []


def _missing(path):
    path.unlink()


def _not_executable(path):
    path.chmod(0o644)


def _world_writable(path):
    path.chmod(0o777)


def _group_writable(path):
    path.chmod(0o770)


def _under_a_writable_directory(path):
    path.parent.chmod(0o777)


def _a_directory(path):
    path.unlink()
    path.mkdir()


def _of_another_user(path):
    if os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    os.chown(path, 65534, 65534)


def _under_a_directory_of_another_user(path):
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory away")
    os.chown(path.parent, 65534, 65534)


def _empty(path):
    path.write_bytes(b"")


def _of_another_machine(path):
    path.write_bytes(b"\x7fELF" + b"\xff" * 60)


REFUSED = {
    _missing: "No such file or directory",
    _not_executable: "is not executable",
    _world_writable: "can be written by everyone",
    _group_writable: "can be written by the members of group",
    _under_a_writable_directory: "can be written by everyone",
    _a_directory: "is a directory",
    _of_another_user: "belongs to user 65534",
    _under_a_directory_of_another_user: "belongs to user 65534",
    _empty: "neither a program nor a script",
    _of_another_machine: "neither a program nor a script",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__.strip("_"))
@aio
async def test_a_program_that_cannot_run_is_reported_and_fails_alone(spoil, tmp_path):
    program = tmp_path / "programs" / "hook"
    program.parent.mkdir(mode=0o755)
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    spoil(program)
    async with running(tmp_path, {"hostile": hook(str(program)), "good": hook("/bin/true")}, slots=2) as (
        spool,
        scheduler,
        records,
    ):
        spool.enqueue([request("hostile"), request("good")])
        scheduler.wake()
        await records.ended(1, 2)
        (record,) = records.of("hook_failed", rule="hostile")
        assert REFUSED[spoil] in record["reason"]
        assert (record["exit_code"], record["will_retry"]) == (None, False)
        assert records.of("job_dead", rule="hostile")
        assert records.of("hook_finished", rule="good")
    assert zombies() == []
