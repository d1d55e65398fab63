"""/proc read by the worker process: real processes, and a worker that hangs on those a test chooses."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from unit.reaping import children_reaped  # noqa: F401 (a fixture)

from cnprocd.process import lookup_child
from cnprocd.process.lookups import SEVERAL, Lookups
from cnprocd.process.model import EVERYTHING, Wanted
from cnprocd.process.procfs import read_process
from cnprocd.worker import ChildWorker

HANGING = Path(__file__).with_name("hanging_child.py")
LONG_S = 30.0


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Records(list):
    def __call__(self, level, event, **fields):
        self.append((event, fields))


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def sleepers():
    """Processes to read: `start(uid)` returns one."""
    started = []

    def start(uid=None):
        started.append(subprocess.Popen(["sleep", "1000"], user=uid))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def lookups(loop, records, hanging=()):
    script, arguments = (HANGING, (lookup_child.__file__, *map(str, hanging))) if hanging else (None, ())
    start = {"start": lambda: ChildWorker(script, *arguments)} if script else {}
    made = Lookups(loop, records, str, **start)
    made.prepare()
    return made


def put_aside(loop, made, tgid):
    """Read a hanging process until that is noticed: on a busy machine its reader may get no processor in time."""
    before = made.set_aside
    while made.set_aside == before:
        both_ready(loop, made)
        assert made.read(tgid, EVERYTHING, "procfs") is None


def run_until(loop, condition):
    async def wait():
        while not condition():
            await asyncio.sleep(0.001)

    loop.run_until_complete(asyncio.wait_for(wait(), LONG_S))


def both_ready(loop, made):
    """A late read cost a worker: wait until its replacement is there, as the loop of the daemon would."""
    run_until(loop, lambda: made.edge.ready == 2)


def test_a_process_reads_as_the_direct_way_reads_it(loop, records, sleepers):
    pid = sleepers().pid
    made = lookups(loop, records)
    for wanted in (EVERYTHING, Wanted(), Wanted(cmdline=True)):
        one, other = made.read(pid, wanted, "procfs"), read_process(pid, wanted)
        other.counted_ns = one.counted_ns
        assert abs(one.start_ns - other.start_ns) < 1_000_000  # the clocks' offset is read anew each time
        one.start_ns = other.start_ns
        assert one == other
    made.close()


def test_a_process_that_is_gone_is_none(loop, records, sleepers):
    process = sleepers()
    made = lookups(loop, records)
    process.kill()
    process.wait()
    assert made.read(process.pid, EVERYTHING, "procfs") is None
    assert not made.is_alive(process.pid)
    assert made.read(os.getpid(), EVERYTHING, "procfs").tgid == os.getpid()
    assert records == []
    made.close()


def test_a_parent_is_read_by_the_worker_once(loop, records, sleepers):
    parent = sleepers()
    made = lookups(loop, records)
    first = made.read_parent(parent.pid)
    asked = made.counters.submitted
    again = made.read_parent(parent.pid)
    assert (again.comm, again.ppid, again.start_ns) == (first.comm, first.ppid, first.start_ns)
    assert made.counters.submitted == asked
    parent.kill()
    parent.wait()
    assert made.read_parent(parent.pid) is None
    made.close()


def test_a_zombie_is_not_alive(loop, records, sleepers):
    process = sleepers()
    made = lookups(loop, records)
    assert made.is_alive(process.pid)
    assert not made.is_ending(process.pid), "it has its memory"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not made.is_alive(process.pid)
    assert not made.is_ending(process.pid)
    assert made.read(process.pid, EVERYTHING, "procfs").threads == 0
    made.close()


def test_a_hanging_process_is_set_aside_and_others_are_read(loop, records, sleepers):
    bad, good = sleepers(), sleepers()
    made = lookups(loop, records, [bad.pid])
    put_aside(loop, made, bad.pid)
    assert made.read(good.pid, EVERYTHING, "procfs").comm == "sleep"
    assert made.read(bad.pid, EVERYTHING, "procfs") is None  # without waiting again
    assert (made.skipped, made.set_aside) == (1, 1)
    assert [event for event, _ in records] == ["proc_unreadable"]
    assert records[0][1]["pids"] == [bad.pid]
    made.close()


def test_a_stopped_reader_sets_no_process_aside(loop, records, sleepers):
    """The process that was read is not to blame: another reader reads it."""
    good = sleepers()
    started = []

    def start():
        started.append(ChildWorker(Path(lookup_child.__file__)))
        return started[-1]

    made = Lookups(loop, records, str, start=start)
    made.prepare()
    both_ready(loop, made)
    for worker in started:
        os.kill(worker._pid, signal.SIGSTOP)
    assert made.read(good.pid, EVERYTHING, "procfs") is None
    assert made.set_aside == 0
    assert records[0][1]["reason"] == "starved"
    found = None
    while found is None:
        both_ready(loop, made)
        found = made.read(good.pid, EVERYTHING, "procfs")
    assert found.comm == "sleep"
    for worker in started:
        os.kill(worker._pid, signal.SIGCONT)  # those that were not asked: they end with the edge
    made.close()


def test_a_process_is_set_aside_until_it_has_ended(loop, records, sleepers):
    bad = sleepers()
    made = lookups(loop, records, [bad.pid])
    put_aside(loop, made, bad.pid)
    bad.kill()
    bad.wait()
    run_until(loop, lambda: made.set_aside == 0)
    made.close()


def test_after_exec_a_process_is_read_again(loop, records, sleepers):
    bad = sleepers()
    made = lookups(loop, records, [bad.pid])
    put_aside(loop, made, bad.pid)
    late = made.counters.late
    both_ready(loop, made)
    assert made.read(bad.pid, EVERYTHING, "exec") is None
    assert made.counters.late == late + 1 and made.skipped == 0
    made.close()


def test_a_user_with_several_hanging_processes_is_set_aside(loop, records, sleepers):
    bad = [sleepers(54321) for _ in range(SEVERAL)]
    innocent, other = sleepers(54321), sleepers(54322)
    made = lookups(loop, records, [process.pid for process in bad])
    for process in bad:
        put_aside(loop, made, process.pid)
    assert made.read(innocent.pid, EVERYTHING, "procfs") is None
    assert made.skipped == 1
    assert made.read(other.pid, EVERYTHING, "procfs").uid == 54322
    made.close()


def test_a_scan_lacks_only_exe_and_cmdline_of_hanging_ones(loop, records, sleepers):
    bad, good = sleepers(), sleepers()
    made = lookups(loop, records, [bad.pid])
    both_ready(loop, made)
    found = {process.tgid: process for process in made.scan(EVERYTHING)}
    assert found[good.pid].cmdline == "sleep 1000"
    assert (found[bad.pid].comm, found[bad.pid].uid, found[bad.pid].cmdline) == ("sleep", os.getuid(), None)
    assert found[bad.pid].start_ns is None
    (reported,) = [fields["pids"] for _, fields in records if "count" in fields and fields.get("reason") is None]
    assert bad.pid in reported  # on a busy machine perhaps others as well
    made.close()


def test_without_a_worker_nothing_is_known_and_that_is_logged(loop, records):
    def none():
        raise BlockingIOError("fork")

    made = Lookups(loop, records, str, start=none)
    made.prepare()
    assert made.read(os.getpid(), EVERYTHING, "procfs") is None
    assert [event for event, _ in records] == ["proc_unavailable", "proc_unreadable"]
    assert made.is_alive(os.getpid())


def test_a_program_in_memory_has_no_exe():
    """memfd_create(2) lets a program choose the text; it is no file of the host, whatever it is called."""
    memory = os.memfd_create("/usr/bin/chage", 0)
    os.write(memory, Path("/bin/sleep").resolve().read_bytes())
    process = subprocess.Popen(["chage", "1000"], executable=f"/proc/self/fd/{memory}", pass_fds=[memory])
    os.close(memory)
    deadline_s = time.monotonic() + 20
    while (found := read_process(process.pid)).exe_claimed is None and time.monotonic() < deadline_s:
        time.sleep(0.001)  # execve(2) is under way: the program is unknown until it has ended
    process.kill()
    process.wait()
    assert (found.exe, found.exe_claimed) == (None, "/memfd:/usr/bin/chage")
