"""/proc is read a moment after an event. A program that is executed in that moment is not taken for the event's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.process.machine import INIT, Entry, Machine, MachineProcFs, live, steps

from cnprocd.connector.ahead import Ahead
from cnprocd.process.model import EVERYTHING, Occurrence
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking

KINDS = frozenset({"fork", "exec", "uid", "gid", "sid", "ptrace"})
OWN = 50
FAR = 10_000  # more entries than a history has


class LateProcFs(MachineProcFs):
    """/proc as it is after the entry of the log that `now` counts, whichever event is handled."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.proc())
        self._log, self._first, self.now = machine.log, machine.proc(), 0

    def read(self, tgid, wanted, source):
        proc = self._log[self.now - 1].proc if self.now else self._first
        self.proc = self.late = self.executed = proc
        return super().read(tgid, wanted, source)


def is_event(entry: Entry) -> bool:
    return not entry.is_record


def told(machine: Machine, cuts: list[int], late: int, room: int = FAR, table: bool = True) -> list[Occurrence]:
    """Return the occurrences of a log. /proc is read `late` entries after each drain, and `room` events are seen."""
    reader, log = LateProcFs(machine), machine.log
    tracking = Tracking(table, True, EVERYTHING, KINDS if table else frozenset({"exec"}), frozenset())
    tracker = Tracker(tracking, reader, OWN)
    before = machine_before_us()
    if table:
        tracker.adopt(list(before.proc().values()))
    found: list[Occurrence] = []
    begin = 0
    for end in (*sorted(cuts), FAR):
        end = max(begin, min(end, len(log)))
        reader.now = min(len(log), max(reader.now, end + late))
        ahead = [entry.said for entry in log[end : reader.now] if is_event(entry)]
        seen = Ahead(ahead[:room], len(ahead) <= room)
        batch = [entry.said for entry in log[begin:end] if is_event(entry)]
        occurrences = tracker.take(batch, [], None, None, lambda seen=seen: seen)
        found += [replace(one, process=replace(one.process)) for one in occurrences]
        begin = end
    return found


def machine_before_us() -> Machine:
    machine = Machine(own=OWN)
    machine.put(OWN, INIT, "cnprocd", exe="/usr/sbin/cnprocd")
    machine.put(60, INIT, "java", threads=3, exe="/usr/bin/java")
    machine.put(70, 60, "sh", exe="/bin/sh")
    return machine


def wrong(machine: Machine, found: list[Occurrence]) -> list[tuple]:
    """Return the attributes that are known and differ from what they were at the event."""
    truth = {(one.kind, one.tid, one.kernel_time_ns): one.process for one in machine.truth if not one.of_thread}
    return [
        (one.kind, name, known, true)
        for one in found
        for name in ("comm", "exe", "cmdline")
        if (known := getattr(one.process, name)) is not None
        and known != (true := getattr(truth[one.kind, one.tid, one.kernel_time_ns], name))
    ]


@given(
    steps, st.lists(st.integers(1, 100), max_size=8), st.integers(0, 12), st.sampled_from([0, 1, 3, FAR]), st.booleans()
)
@settings(max_examples=400)
def test_no_program_of_a_later_moment_is_reported(operations, cuts, late, room, table):
    """Except that of an exec itself in a storm, and a comm that changes without an exec, if no table is kept."""
    machine = machine_before_us()
    live(machine, operations, spare=[OWN])
    found = wrong(machine, told(machine, cuts, late, room, table))
    assert not [
        (kind, name) for kind, name, *_ in found if (table or name != "comm") and (kind != "exec" or room == FAR)
    ]


@pytest.mark.parametrize("late", [0, 1, 2, 3])
def test_the_program_of_a_uid_event_between_two_execs(late):
    """su is executed, changes its uid and executes a shell: the event is about su."""
    machine = machine_before_us()
    machine.exec(70, "/bin/su")
    machine.set_ids(70, 7, 7)
    machine.exec(70, "/bin/bash")
    (uid,) = [one for one in told(machine, [3], late) if one.kind == "uid"]
    # A gid event, a uid event, and the second exec: /proc shows the first program until that.
    assert (uid.process.comm, uid.process.exe) == (("su", "/bin/su") if late == 0 else (None, None))


def test_an_event_after_the_read_needs_no_look_ahead():
    """In a storm a look never shows all that is queued. What happens after the read is of the program that was read."""
    machine = machine_before_us()
    machine.exec(70, "/bin/su")
    machine.setsid(70)
    machine.setsid(70)
    machine.exec(70, "/bin/bash")
    sids = [one.process.comm for one in told(machine, [1, 2, 3], 2, room=0) if one.kind == "sid"]
    assert sids == [None, "su"], "the first came before the read"


def test_a_new_comm_is_not_that_of_the_exec():
    machine = machine_before_us()
    machine.exec(70, "/bin/su")
    machine.setsid(70)
    machine.rename(70, "title")
    machine.setsid(70)
    found = {(one.kind, one.process.comm, one.process.exe) for one in told(machine, [2], 1)}
    assert found == {("exec", None, "/bin/su"), ("sid", None, "/bin/su"), ("sid", "title", "/bin/su")}
