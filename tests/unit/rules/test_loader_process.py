"""A child process reads the rules: the result is the same as here, and every failure is reported and leaves nothing."""

import asyncio
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from cnprocd.errors import EX_OSERR
from cnprocd.rules import loader_process
from cnprocd.rules.language.load import load
from cnprocd.rules.loader_process import DigestsProcess, LoaderFailedError, LoaderProcess
from cnprocd.rules.problems import Problem, RulesError
from cnprocd.rules.rule_files import file_digests, rule_files

FILE = Path("/etc/cnprocd/rules.yaml")
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")


@pytest.fixture
def rules(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(
        "rules:\n  - {name: one, events: [nonzero_exit], match: {comm: 'a*'}, run: {command: [/bin/true]}}\n"
    )
    return file


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Check that no descriptor and no child, dead or alive, is left."""
    before, children = set(os.listdir("/proc/self/fd")), CHILDREN.read_text().split()
    yield
    assert set(os.listdir("/proc/self/fd")) <= before  # others' may have been collected meanwhile
    assert set(CHILDREN.read_text().split()) <= set(children)


def both(read):
    """Return the result of each way to wait."""

    async def there():
        return await LoaderProcess(read, FILE).wait()

    for way in (lambda: LoaderProcess(read, FILE).result(), lambda: asyncio.run(there())):
        try:
            yield way()
        except RulesError as error:
            yield error


async def reaped(before):
    """Let the loop go on until it has reaped the killed child. On a busy machine it does not wait for its end."""
    async with asyncio.timeout(30):
        while not set(CHILDREN.read_text().split()) <= set(before):
            await asyncio.sleep(0.01)


def test_the_result_is_what_reading_here_gives(rules):
    assert list(both(lambda: load(rules))) == [load(rules)] * 2


def test_ten_thousand_rules_come_through(tmp_path):
    many = tmp_path / "rules.yaml"
    many.write_text(
        "rules:\n" + "".join(f"  - {{name: r{i}, events: [exit], match: {{comm: c{i}}}}}\n" for i in range(10_000))
    )
    assert [len(found.rules) for found in both(lambda: load(many))] == [10_000] * 2


def test_problems_come_through_whole(rules):
    rules.write_text("rules:\n  - {name: one, evnts: [exit]}\n")
    with pytest.raises(RulesError) as here:
        load(rules)
    for error in both(lambda: load(rules)):
        assert isinstance(error, RulesError)
        assert (error.problems, error.render(), str(error)) == (
            here.value.problems, here.value.render(), str(here.value)
        )  # fmt: skip


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: os._exit(0), "exited without output"),
        (lambda: 1 / 0, "code 1"),
    ],
)
def test_a_child_that_fails_is_a_reason_to_keep_the_old_rules(read, said, capfd):
    for error in both(read):
        assert isinstance(error, LoaderFailedError)
        assert error.exit_status == EX_OSERR  # EX_CONFIG is what systemd does not restart after
        (problem,) = error.problems
        assert problem.file == FILE
        assert said in problem.message
        assert "cnprocctl" in problem.hint
    assert ("ZeroDivisionError" in capfd.readouterr().err) == (said == "code 1")


def test_the_child_keeps_no_descriptors_and_no_signals():
    def read():
        found = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        raise RulesError([Problem(FILE, 0, 0, f"{len(found)} {handlers == [signal.SIG_DFL] * 3}")])

    with open("/dev/null"):
        for error in both(read):
            # 0, 1, 2, the pipe, and that of listdir()
            assert str(error.problems[0].message) == "5 True"


def test_the_loop_goes_on_meanwhile():
    def held():
        time.sleep(0.3)  # what a large file takes; the parent's turns are counted, not timed
        raise RulesError([Problem(FILE, 0, 0, "released")])

    async def scene():
        turns = 0
        waiting = asyncio.create_task(LoaderProcess(held, FILE).wait())
        while not waiting.done():
            await asyncio.sleep(0)
            turns += 1
        with pytest.raises(RulesError, match="released"):
            waiting.result()
        return turns

    assert asyncio.run(scene()) > 10


def test_cancellation_ends_the_child():
    async def scene():
        before = CHILDREN.read_text().split()
        waiting = asyncio.create_task(LoaderProcess(signal.pause, FILE).wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await reaped(before)

    asyncio.run(scene())


def test_a_child_that_takes_forever_is_killed(monkeypatch):
    monkeypatch.setattr(loader_process, "LIMIT_S", 0.05)

    async def scene():
        before = CHILDREN.read_text().split()
        with pytest.raises(RulesError, match=r"longer than 0\.05 s"):
            await LoaderProcess(signal.pause, FILE).wait()
        await reaped(before)

    asyncio.run(scene())


def test_a_failed_fork_is_an_error(monkeypatch):
    def fork():
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(RulesError, match="Resource temporarily unavailable"):
        LoaderProcess(lambda: None, FILE)


@pytest.mark.parametrize("start", [lambda: LoaderProcess(lambda: None, FILE), lambda: DigestsProcess(None, FILE)])
def test_without_a_descriptor_the_error_is_reported(start):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(LoaderFailedError, match="Too many open files"):
            start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_another_program_reads_the_same_digests(rules, monkeypatch):
    """Without fork(2), so that the daemon does not wait for a copy of its page tables."""
    monkeypatch.setattr(os, "fork", None)
    found = DigestsProcess(rules, rules).result()
    assert found == file_digests(rule_files(rules))
    rules.write_text("rules: []\n")
    assert DigestsProcess(rules, rules).result() != found
