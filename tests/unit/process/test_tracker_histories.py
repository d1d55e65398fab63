"""The tracker on random legal histories of a machine (machine.py), cut into arbitrary batches: it reports exactly what
happened to each process, and its table equals the machine.
"""

from collections import Counter
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st
from unit.process.machine import (
    INIT,
    MILLISECOND,
    SECOND,
    Machine,
    MachineProcFs,
    Unfolding,
    as_read,
    batches,
    live,
    living,
    many_steps,
    steps,
    unread,
)

from cnprocd.process.deaths import HOLD_NS
from cnprocd.process.model import EVERYTHING, Occurrence, Process
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking

KINDS = frozenset({"fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "coredump", "exit"})
OWN = 50
cuts = st.lists(st.integers(1, 200), max_size=12)
ahead = st.lists(st.integers(0, 6), max_size=4)


def machine_before_us() -> Machine:
    machine = Machine(own=OWN)
    machine.put(OWN, INIT, "cnprocd", exe="/usr/sbin/cnprocd", cgroup="/system.slice/cnprocd.service")
    machine.put(60, INIT, "java", threads=3, exe="/usr/bin/java", uid=1000, gid=1000, cgroup="/user.slice/u.scope")
    machine.put(70, 60, "sh", exe="/bin/sh", cgroup="/user.slice/u.scope")
    return machine


def said(occurrence: Occurrence) -> tuple:
    """Return an occurrence without the parts that may differ between correct answers."""
    process: Process = occurrence.process
    return (
        occurrence.kind, occurrence.of_thread, process.tgid, occurrence.tid if occurrence.of_thread else None,
        occurrence.status, process.comm, process.uid, process.gid, process.cgroup, occurrence.from_hook,
        occurrence.recovered,
    )  # fmt: skip


def played(machine: Machine, tracker: Tracker, reader: MachineProcFs, cut, more, seed=0) -> list[tuple]:
    """Return the occurrences of a log that arrives in batches, each shuffled as CPUs would."""
    told = []
    views = {entry.at_ns: entry.proc for entry in machine.log}
    shuffled = Random(seed)
    held_until = None
    for events, records, late in batches(machine.log, cut, more):
        reader.late = late
        shuffled.shuffle(events)
        batch = Unfolding([entry.said for entry in events], reader, views)
        if held_until is not None and min((entry.at_ns for entry in (*events, *records)), default=0) > held_until:
            told += map(said, tracker.take([], [], held_until))  # as the loop does for held deaths
        now_ns = max((entry.at_ns for entry in (*events, *records)), default=machine.now)
        told += map(said, tracker.take(batch, [entry.said for entry in records], now_ns))
        held_until = now_ns + HOLD_NS if tracker.deaths.has_held else None
    reader.proc = reader.late = machine.proc()
    told += map(said, tracker.take([], [], machine.now + SECOND))
    return told


def known_of(machine: Machine, cut, more) -> list[Occurrence]:
    """Return what happened, as far as drains like these can know it."""
    drains = [[entry.said for entry in events] for events, _, _ in batches(machine.log, cut, more)]
    return as_read(machine.truth, unread(drains))


@given(steps, cuts, ahead, st.integers(0, 99), st.booleans())
@example(many_steps(3311, 33), [], [], 0, False)  # one drain has the early leaders of two owners of a PID
@example(many_steps(144404, 19), [], [], 0, True)  # a thread changes its comm before an exec that is read too late
@example(many_steps(141713063, 50), [], [], 0, False)  # an unconfirmed child's exec is read too late
@settings(max_examples=300)
def test_with_records_the_tracker_tells_what_happened(operations, cut, more, seed, threads):
    machine = machine_before_us()
    reader = MachineProcFs(machine.proc())
    tracking = Tracking(True, True, EVERYTHING, KINDS, KINDS if threads else frozenset())
    tracker = Tracker(tracking, reader, OWN)
    assert tracker.adopt(reader.scan(EVERYTHING)) == []
    live(machine, operations, lone_codes=(0, 0, 5), spare=[OWN])

    told = played(machine, tracker, reader, cut, more, seed)

    truth = [said(o) for o in known_of(machine, cut, more) if threads or not o.of_thread]
    assert Counter(told) == Counter(truth)


@given(steps, cuts, ahead, st.integers(0, 99))
def test_afterwards_the_table_is_the_machine_s(operations, cut, more, seed):
    machine = machine_before_us()
    reader = MachineProcFs(machine.proc())
    tracker = Tracker(Tracking(True, True, EVERYTHING, KINDS, frozenset()), reader, OWN)
    tracker.adopt(reader.scan(EVERYTHING))
    live(machine, operations, spare=[OWN])
    played(machine, tracker, reader, cut, more, seed)
    tracker.sweep(machine.now + 5 * SECOND)

    alive = machine.alive()
    assert living(tracker.table) == set(alive)
    assert len(tracker.table) == len(alive)
    for tgid, task in alive.items():
        known = tracker.table.get(tgid)
        assert (known.comm, known.uid, known.gid, known.exe, known.cmdline, known.cgroup) == (
            task.comm, task.uid, task.gid, task.exe, task.cmdline, task.cgroup,
        )  # fmt: skip


@given(steps, cuts, ahead, st.integers(0, 99), st.sampled_from([((0,), 0), ((0, 0, 5), 10 * MILLISECOND)]))
@settings(max_examples=200)
def test_without_records_the_count_of_threads_tells_the_same(operations, cut, more, seed, lone):
    """Threads that end by themselves give 0, as pthread_exit() does, or do not end together with others: a raw exit(5)
    during an exit_group() cannot be resolved by counting.
    """
    machine = machine_before_us()
    reader = MachineProcFs(machine.proc())
    tracker = Tracker(Tracking(True, False, EVERYTHING, KINDS, frozenset()), reader, OWN)
    tracker.adopt(reader.scan(EVERYTHING))
    live(machine, operations, lone_codes=lone[0], pace_ns=lone[1], spare=[OWN])

    told = played(machine, tracker, reader, cut, more, seed)

    assert Counter(told) == Counter(said(o) for o in known_of(machine, cut, more) if not o.of_thread)
    tracker.sweep(machine.now + 5 * SECOND)
    assert living(tracker.table) == set(machine.alive())
    for tgid, task in machine.alive().items():
        assert tracker.table.get(tgid).threads == len(task.threads)
