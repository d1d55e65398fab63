"""Every process is read again before other rules come into force, in slices that are short however many there are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from unit.process.machine import INIT, SECOND, Machine, MachineProcFs, Unfolding

from cnprocd.connector.event import Fork
from cnprocd.process.model import EVERYTHING, Process, Wanted
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking
from cnprocd.rescan import MOST_PASSES, SLICE_S, Rescan

OWN = 50
READ_S = 3e-5  # what it takes to read a process
MANY = 30_000
TRACKING = Tracking(True, True, EVERYTHING, frozenset({"exit"}), frozenset())


class BigProc:
    """/proc of so many processes, six in a group. Reading takes time on its own clock."""

    def __init__(self, count: int) -> None:
        self.now_s, self.reads = 100.0, Counter[int]()
        self.is_alive = self.is_ending = self.zombie = None
        self.tgids = range(100, 100 + count)
        self.files: Any = SimpleNamespace(named_paths=frozenset())

    def scan_in_groups(self, wanted, tgids=None):
        tgids = list(self.tgids if tgids is None else tgids)
        for first in range(0, len(tgids), 6):
            group = tgids[first : first + 6]
            self.now_s += len(group) * READ_S
            self.reads.update(group)
            yield [Process(tgid, INIT, 1, comm="sleep", threads=1, cgroup="/x") for tgid in group]


def test_each_slice_of_a_large_machine_is_short():
    proc: Any = BigProc(MANY)
    tracker = Tracker(TRACKING, proc, OWN)
    held: list[int] = []
    rescan = Rescan(
        proc, tracker, proc.files, lambda group: held.extend(one.tgid for one in group), lambda: proc.now_s,
        lambda: SECOND,
    )  # fmt: skip
    slices: list[float] = []
    is_done = False
    while not is_done:
        began_s = proc.now_s
        is_done = rescan.go_on()
        slices.append(proc.now_s - began_s)
    assert max(slices) <= SLICE_S + 7 * READ_S
    assert len(tracker.table) == MANY
    assert set(proc.reads.values()) == {1}
    assert held == list(proc.tgids)


def test_a_child_of_a_process_that_was_not_read_yet_is_read():
    """It takes over that nothing is known of its parent's cgroup."""
    machine = Machine(own=OWN)
    for pid in (60, 61):
        machine.put(pid, INIT, "sh", exe="/bin/sh", cgroup="/x")
    reader = MachineProcFs(machine.proc())
    tracker = Tracker(TRACKING, reader, OWN)
    tracker.adopt([replaced for process in reader.scan(EVERYTHING) if (replaced := without_cgroup(process))])
    clock = iter(range(1000))
    rescan = Rescan(reader, tracker, None, lambda group: None, lambda: next(clock), lambda: machine.now)
    assert not rescan.go_on(1), "one process was read"
    machine.fork(61, 100)
    (fork,) = [entry.said for entry in machine.log if isinstance(entry.said, Fork)]
    list(tracker.take([fork], [], machine.now))
    child = tracker.table.get(100)
    assert child is not None and child.cgroup is None
    reader.proc = reader.late = machine.proc()
    while not rescan.go_on(1000):
        pass
    child = tracker.table.get(100)
    assert child is not None and child.cgroup == "/x"


def test_an_exec_before_its_process_was_read_has_a_user():
    """User and group of a known process outlive an exec. This one is not known yet."""
    machine = Machine(own=OWN)
    machine.put(60, INIT, "sh", exe="/bin/sh", uid=1000)
    reader = MachineProcFs(machine.proc())
    tracker = Tracker(replace(TRACKING, wanted=Wanted(exe=True), kinds=frozenset({"exec"})), reader, OWN)
    Rescan(reader, tracker, None, lambda group: None, lambda: 0, lambda: machine.now)
    machine.exec(60, "/bin/cat")
    entry = machine.log[-1]
    reader.late = machine.proc()
    (occurrence,) = tracker.take(Unfolding([entry.said], reader, {entry.at_ns: entry.proc}), [], machine.now)
    assert (occurrence.process.uid, occurrence.process.exe) == (1000, "/bin/cat")


def without_cgroup(process: Process) -> Process:
    process.cgroup = None
    return process


def test_a_storm_of_forks_does_not_keep_it_going():
    proc: Any = BigProc(6)
    tracker = Tracker(TRACKING, proc, OWN)
    born = iter(range(10_000, 1_000_000))

    def hold(group) -> None:
        """Two processes are forked for each that was read."""
        for _ in group:
            for tgid in (next(born), next(born)):
                tracker.table.enter(Process(tgid, INIT, 2 * SECOND, comm="storm", threads=1))

    rescan = Rescan(proc, tracker, proc.files, hold, lambda: proc.now_s, lambda: SECOND)
    calls = 0
    while not rescan.go_on(0.0):
        calls += 1
        assert calls < 10_000
    assert rescan._passes == MOST_PASSES
