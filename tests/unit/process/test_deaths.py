"""The join of exit records and exit events, for every end of a threaded process that was measured on a kernel.

A case is a list of groups of thread ends. The kernel orders the groups. Within a group, hypothesis permutes what is not
ordered (records and events of different threads), then cuts it all into drains, records drained after events. In every
order, each process death is reported once, with the status of waitpid() and the name of its leader.
"""

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.process.machine import Entry, batches

from cnprocd.connector.event import Exit
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.death import COUNTED, PASSED, Death
from cnprocd.process.deaths import HOLD_NS, MOST_LOOKED_FOR, Deaths

P = 100  # the process of every case; its leader has this thread id


@dataclass(frozen=True)
class End:
    """The end of one thread."""

    tid: int
    status: int
    last: bool = False
    comm: str = "leader"
    tgid: int = P
    threaded: bool | None = None  # default: it is the last one of several


def record(end: End) -> TaskRecord:
    threaded = end.last if end.threaded is None else end.threaded
    return TaskRecord(
        end.tid, end.tgid, 1, end.status, end.last, threaded, end.comm, 10, 20, 0, 5_000_000, 0, 0, 0, 0, 0, 0, 0, 0
    )


def event(end: End, at: int) -> Exit:
    return Exit(0x80000000, 0, at, end.tid, end.tgid, end.status, 17, 1, 1)


def group(status: int, tids, last: int, dumper: int | None = None) -> list[End]:
    """Return the ends of an exit_group() or a fatal signal."""
    return [
        End(tid, status | (0x80 if tid == dumper else 0), tid == last, "leader" if tid == P else f"thread {tid}")
        for tid in tids
    ]


# name: (groups of ends, the status of waitpid)
CASES = {
    "a plain exit": ([[End(P, 3 << 8, True, threaded=False)]], 3 << 8),
    "a plain success": ([[End(P, 0, True, threaded=False)]], 0),
    "a plain core dump": ([[End(P, 0x8B, True, threaded=False)]], 0x8B),
    "exit_group(3), the leader last": ([group(3 << 8, range(P, P + 5), last=P)], 3 << 8),
    "exit_group(3), a thread last": ([group(3 << 8, range(P, P + 5), last=P + 3)], 3 << 8),
    "exit_group(0), a thread last": ([group(0, range(P, P + 4), last=P + 1)], 0),
    "SIGKILL": ([group(9, range(P, P + 4), last=P + 2)], 9),
    "leader pthread_exit, then exit(3)": ([[End(P, 0)], group(3 << 8, [P + 1, P + 2], last=P + 1)], 3 << 8),
    "leader pthread_exit, then all success": ([[End(P, 0)], group(0, [P + 1, P + 2], last=P + 2)], 0),
    "leader raw exit(5), the last thread 0": ([[End(P, 5 << 8)], [End(P + 1, 0, True, "t")]], 0),
    "leader raw exit(7), the last thread 5": ([[End(P, 7 << 8)], [End(P + 1, 5 << 8, True, "t")]], 5 << 8),
    "a thread alone, then exit(3)": ([[End(P + 1, 9 << 8, comm="t")], [End(P, 3 << 8, True)]], 3 << 8),
    "a thread alone with 0, then exit(3)": ([[End(P + 1, 0, comm="t")], group(3 << 8, [P, P + 2], last=P + 2)], 3 << 8),
    "exec by a thread, then exit(3)": (
        [[End(P, 0, comm="old name"), End(P + 2, 0, comm="t")], [End(P, 3 << 8, True)]], 3 << 8,
    ),
    "exec by a thread, then exit(3), another thread last": (
        [[End(P, 0, comm="old name"), End(P + 2, 0, comm="t")], group(3 << 8, [P, P + 1], last=P + 1)], 3 << 8,
    ),
    "exec by a thread, then success": ([[End(P, 0, comm="old name")], [End(P, 0, True)]], 0),
    "exec by a thread after the leader ended": (
        [[End(P, 0, comm="old name")], [End(P + 1, 0, comm="t")], [End(P, 4 << 8, True)]], 4 << 8,
    ),
    "core dump by the leader, a thread last": ([group(6, range(P, P + 4), P + 1, dumper=P)], 0x86),
    "core dump by a thread, the leader last": ([group(6, range(P, P + 4), P, dumper=P + 2)], 0x86),
    "core dump by the last thread": ([group(11, range(P, P + 3), P + 2, dumper=P + 2)], 0x8B),
    "SIGABRT without a core": ([group(6, range(P, P + 3), last=P + 1)], 6),
}  # fmt: skip


def told_by(deaths: Deaths, drains) -> list[Death]:
    """Take the drains as the tracker does, all within HOLD_NS, then one after that time."""
    told = []
    for events, records, now_ns in [*((*drain, 50) for drain in drains), ([], [], HOLD_NS + 50)]:
        for entry in records:
            deaths.record(entry)
        told += deaths.release_held(now_ns)
        for one in events:
            _, death = deaths.exit(one)
            told += [death] if death else []
    assert not deaths.has_held
    return told


def arrival(groups, seed: int) -> list[Entry]:
    """Return one order in which the kernel may send the records and events of these ends."""
    chance, log = Random(seed), []
    for ends in groups:
        queue = [end for end in ends for _ in range(2)]
        chance.shuffle(queue)
        begun = set()
        for end in queue:
            at = len(log) + 1
            log.append(Entry(event(end, at) if end.tid in begun else record(end), at, {}))
            begun.add(end.tid)
    return log


def drained(log: list[Entry], cuts, ahead) -> list[tuple[list[Exit], list[TaskRecord]]]:
    return [([e.said for e in events], [r.said for r in records]) for events, records, _ in batches(log, cuts, ahead)]


seeds, cut_lists = st.integers(0, 10_000), st.lists(st.integers(1, 14), max_size=6)
aheads = st.lists(st.integers(0, 4), max_size=3)


@pytest.mark.parametrize("case", CASES)
@given(seed=seeds, cuts=cut_lists, ahead=aheads)
def test_each_death_is_told_once_with_the_status_of_waitpid(case, seed, cuts, ahead):
    groups, status = CASES[case]
    (death,) = told_by(Deaths(lambda tgid: False), drained(arrival(groups, seed), cuts, ahead))
    assert (death.tgid, death.status, death.leader.comm) == (P, status, "leader")
    assert death.record.last
    assert death.event.process_pid == death.record.pid


def asked_for(entry: Entry) -> bool:
    """Return what the filters of a plan for failures pass: see connector/filter.py."""
    said = entry.said
    if isinstance(said, TaskRecord):
        return said.status != 0 or (said.pid == said.tgid and not said.last)
    return said.exit_code != 0


@pytest.mark.parametrize("case", [name for name, (_, status) in CASES.items() if status])
@given(seed=seeds, cuts=cut_lists, ahead=aheads)
def test_so_it_is_when_only_failures_are_asked_for(case, seed, cuts, ahead):
    groups, status = CASES[case]
    log = [entry for entry in arrival(groups, seed) if asked_for(entry)]
    (death,) = told_by(Deaths(lambda tgid: False), drained(log, cuts, ahead))
    assert (death.status, death.leader.comm) == (status, "leader")


@pytest.mark.parametrize("case", [name for name, (_, status) in CASES.items() if status])
@given(seed=seeds, cuts=cut_lists, ahead=aheads)
def test_so_it_is_when_events_cannot_be_filtered_but_records_are(case, seed, cuts, ahead):
    """A kernel without a filter on the connector: exits arrive whose records were filtered long ago."""
    groups, status = CASES[case]
    log = [entry for entry in arrival(groups, seed) if not entry.is_record or asked_for(entry)]
    told = told_by(Deaths(lambda tgid: False), drained(log, cuts, ahead))
    failed = [(death.status, death.leader and death.leader.comm) for death in told if death.status]
    assert failed == [(status, "leader")]


def test_a_thread_that_ends_alone_is_no_death():
    deaths = Deaths(lambda tgid: True)
    deaths.record(record(End(P + 1, 9 << 8, comm="t")))
    its, death = deaths.exit(event(End(P + 1, 9 << 8), 1))
    assert death is None
    assert its.comm == "t"


@given(st.lists(st.sampled_from(sorted(CASES)), max_size=6), seeds, cut_lists, aheads)
def test_processes_of_one_pid_after_another_are_told_apart(names, seed, cuts, ahead):
    deaths, told = Deaths(lambda tgid: True), []
    for name in names:
        told += told_by(deaths, drained(arrival(CASES[name][0], seed), cuts, ahead))
    assert [(death.status, death.leader.comm) for death in told] == [(CASES[name][1], "leader") for name in names]


# --- what comes late


def held_death(last: End) -> Deaths:
    """Return a death whose last thread ended at 1 ns, with more information still to come."""
    deaths = Deaths(lambda tgid: True)
    deaths.record(record(last))
    assert deaths.exit(event(last, 1))[1] is None
    assert deaths.has_held
    return deaths


def test_the_core_flag_is_waited_for():
    """The dumping thread is slow, and its record arrives a moment after the last one."""
    deaths = held_death(End(P, 6, last=True))
    assert deaths.release_held(2) == []
    deaths.record(record(End(P + 1, 0x86, comm="t")))
    (death,) = deaths.release_held(3)
    assert death.status == 0x86
    assert not deaths.has_held


def test_the_leader_s_record_is_waited_for():
    deaths = held_death(End(P + 1, 3 << 8, last=True, comm="t"))
    assert deaths.release_held(HOLD_NS) == []
    deaths.record(record(End(P, 3 << 8)))
    (death,) = deaths.release_held(HOLD_NS)
    assert death.leader.comm == "leader"


@pytest.mark.parametrize("last", [End(P, 6, last=True), End(P + 1, 3 << 8, last=True)], ids=["core", "leader"])
def test_what_never_comes_is_waited_for_only_so_long(last):
    deaths = held_death(last)
    assert deaths.release_held(HOLD_NS) == []
    assert [death.status for death in deaths.release_held(HOLD_NS + 1)] == [last.status]
    assert not deaths.has_held


def test_without_a_clock_it_is_waited_for_by_one_drain():
    assert [death.status for death in held_death(End(P, 6, last=True)).release_held(None)] == [6]


def test_a_process_without_threads_never_waits():
    deaths = Deaths(lambda tgid: True)
    only = End(P, 6, last=True, threaded=False)
    deaths.record(record(only))
    assert deaths.exit(event(only, 1))[1].status == 6
    assert not deaths.has_held


def test_the_core_flag_of_another_signal_is_not_taken_over():
    deaths = held_death(End(P, 6, last=True))
    deaths.record(record(End(P + 1, 0x8B, comm="t")))
    assert [death.status for death in deaths.release_held(None)] == [6]


@pytest.mark.parametrize("status", [0, 0x0B, 0x8B])
def test_the_core_flag_is_not_taken_by_a_former_owner_of_the_pid(status):
    """Behind a standstill one drain has the ends of both. Found by test_reload.py."""
    former, leader = End(P, status, last=True, threaded=False), End(P, 0x8B)
    last = End(P + 1, 0x0B, last=True, comm="t")
    deaths = Deaths(lambda tgid: False)
    for end in (former, leader, last):
        deaths.record(record(end))
    told = [deaths.exit(event(end, at))[1] for at, end in enumerate((former, leader, last))]
    told += deaths.release_held(None)
    assert [death.status for death in told if death is not None] == [status, 0x8B]


# --- losses


def test_a_lost_record_leaves_the_status_of_the_event():
    deaths = Deaths(lambda tgid: False)
    _, death = deaths.exit(event(End(P, 3 << 8), 1))
    assert (death.status, death.record, death.leader) == (3 << 8, None, None)
    assert deaths.without_record == 1


def test_without_records_a_process_that_lives_on_is_not_dead():
    assert Deaths(lambda tgid: True).exit(event(End(P + 1, 3 << 8), 1))[1] is None


def test_without_records_a_process_dies_once_for_all_its_threads():
    deaths = Deaths(lambda tgid: False)
    told = [deaths.exit(event(End(P + n, 3 << 8), n))[1] for n in range(5)]
    assert [death is not None for death in told] == [True, False, False, False, False]


def test_without_records_a_pid_can_die_again_later():
    deaths = Deaths(lambda tgid: False)
    assert deaths.exit(event(End(P, 3 << 8), 1))[1] is not None
    assert deaths.exit(event(End(P, 4 << 8), 1_000_000_002))[1].status == 4 << 8


def test_a_lost_event_leaves_the_record_without_its_time():
    deaths = Deaths(lambda tgid: False)
    deaths.record(record(End(P, 3 << 8, last=True, threaded=False)))
    deaths.record(record(End(200, 0, tgid=200)))  # the early end of a leader is not a death
    (death,) = deaths.without_event(deaths.waiting())
    assert (death.tgid, death.status, death.event) == (P, 3 << 8, None)
    assert deaths.without_event(deaths.waiting()) == []


# --- kill -9


def told_by_lives(lives) -> list[Death]:
    """Take the drains of each life. Between two lives the daemon is killed, and what it needed comes again first."""
    told, events, records = [], [], []
    for drains, is_last in lives:
        deaths = Deaths(lambda tgid: False)
        drains = [(events + drains[0][0], records + drains[0][1]), *drains[1:]]
        events, records = [], []
        if is_last:
            return told + told_by(deaths, drains)
        for now, its_records in drains:
            for entry in its_records:
                deaths.record(entry)
            told += deaths.release_held(50)
            told += [death for one in now if (death := deaths.exit(one)[1]) is not None]
            needed = deaths.take_needed()
            newest = {one.process_pid: one for one in events + now if one.process_pid in needed.events}
            events = sorted(newest.values(), key=lambda one: one.timestamp_ns)
            records += its_records
            for tid in needed.decided:
                records.remove(next(one for one in records if one.pid == tid))
            # The log looks only at those that are said to have left (record_log.py).
            left = None if needed.left is None else {*needed.left, *(one.process_pid for one in now)}
            records = [one for one in records if one.pid in needed.records or not (left is None or one.pid in left)]
    return told


@pytest.mark.parametrize("case", CASES)
@given(seed=seeds, cuts=cut_lists, ahead=aheads, kills=st.lists(st.integers(1, 6), max_size=3))
def test_a_kill_between_batches_changes_no_death(case, seed, cuts, ahead, kills):
    """One part of a process has ended before the kill, and another after it: name, status and core flag are whole."""
    groups, status = CASES[case]
    drains = drained(arrival(groups, seed), cuts, ahead)
    ends = sorted({kill for kill in kills if kill < len(drains)})
    lives = zip([0, *ends], [*ends, len(drains)], strict=True)
    told = told_by_lives([(drains[begin:end], end == len(drains)) for begin, end in lives])
    assert {(death.tgid, death.status, death.leader.comm) for death in told} == {(P, status, "leader")}
    assert len(told) == 1, "its record and its event are needed no more"


def test_the_record_of_a_former_owner_of_a_pid_is_decided():
    """Behind a standstill a PID can have two records. If the first one came again, it would take the second's event."""
    deaths = Deaths(lambda tgid: False)
    first, second = End(P, 256, True, "first", threaded=False), End(P, 256, True, "second", threaded=False)
    for end in (first, second):
        deaths.record(record(end))
    assert deaths.take_needed()[:3] == (set(), {P}, [])
    assert deaths.exit(event(first, 1))[1].leader.comm == "first"
    assert deaths.take_needed()[:3] == (set(), {P}, [P])
    assert deaths.take_needed()[:3] == (set(), {P}, []), "named once"


# --- memory


def test_abandoned_records_are_dropped_after_an_empty_queue():
    """exit_group(0) usually leaves one: the leader's record passes the filter, its event does not."""
    deaths = Deaths(lambda tgid: False)
    for tgid in range(1000, 3000):
        deaths.record(record(End(tgid, 0, tgid=tgid)))
    deaths.prune()
    deaths.prune()
    assert len(deaths._waiting) == 2000, "their events may still be in the queue"
    assert pruned(deaths, 2000) == pruned(deaths, 2000) == []
    assert not deaths._waiting
    assert not deaths._leaders


def test_the_leader_of_a_dead_process_is_kept_no_longer():
    """Its last thread's record was filtered. The next daemon needs only the leaders of living processes."""
    alive = {1, 2}
    deaths = Deaths(alive.__contains__)
    for tgid in (1, 2):
        deaths.record(record(End(tgid, 0, tgid=tgid)))
    alive.remove(2)
    deaths.prune()
    deaths.caught_up()
    deaths.prune()
    assert {leader.tgid for leader in deaths.early_leaders()} == {1, 2}, "its last record may be on its way"
    deaths.caught_up()
    deaths.prune()
    assert {leader.tgid for leader in deaths.early_leaders()} == {1}


def test_a_record_newer_than_the_last_prune_waits_for_its_event():
    deaths = Deaths(lambda tgid: True)
    deaths.caught_up()
    deaths.prune()
    last = End(P, 3 << 8, last=True, threaded=False)
    deaths.record(record(last))
    deaths.caught_up()
    deaths.prune()
    assert deaths.exit(event(last, 1))[1].record is not None


def pruned(deaths: Deaths, most: int = 100) -> list[Death]:
    """Prune after the queue was found empty. Return the deaths whose event was lost."""
    deaths.caught_up()
    deaths.prune()
    return deaths.lost(most)


def test_a_death_without_its_event_is_found_after_an_empty_queue():
    """The kernel failed to allocate the event and reports nothing."""
    deaths = Deaths(lambda tgid: False)
    deaths.record(record(End(P, 3 << 8, last=True, threaded=False)))
    deaths.prune()
    deaths.prune()
    assert not deaths.has_lost, "its event may still be in the queue"
    assert pruned(deaths) == [], "gone, but perhaps only just"
    (death,) = pruned(deaths)
    assert (death.status, death.event, death.leader.comm) == (3 << 8, None, "leader")
    assert pruned(deaths) == deaths.without_event(deaths.waiting()) == []
    assert not deaths.take_needed().records


def test_thousands_of_lost_events_are_found_in_parts():
    """After an overrun: to look for all at once, or to report them at once, would stop the event loop for seconds."""
    looked_for = []
    deaths = Deaths(lambda tgid: bool(looked_for.append(tgid)))
    pids = range(1000, 1000 + 2 * MOST_LOOKED_FOR + 1)
    for pid in pids:
        deaths.record(record(End(pid, 3 << 8, last=True, threaded=False, tgid=pid)))
    found = []
    while len(found) < len(pids):
        looked_for.clear()
        deaths.caught_up()
        deaths.prune()
        assert len(looked_for) <= MOST_LOOKED_FOR
        while deaths.has_lost:
            lost = deaths.lost(64)
            assert len(lost) <= 64
            found += lost
            assert len(deaths.take_needed().records) == len(pids) - len(found), "the others stay in the slots"
    assert [death.tgid for death in found] == list(pids)


def failed(status: int, comm: str, alone: bool = True) -> End:
    return End(P, status, True, comm, threaded=not alone)


def test_a_lost_event_is_no_secret_when_its_pid_ends_again():
    """In a storm PIDs are used again within seconds. The later event cannot be that of a record with another status."""
    deaths = Deaths(lambda tgid: False)
    marker, storm = failed(5 << 8, "marker"), failed(1 << 8, "storm")
    deaths.record(record(marker))
    deaths.record(record(storm))
    _, death = deaths.exit(event(storm, 9))
    assert (death.status, death.leader.comm) == (1 << 8, "storm")
    assert deaths.take_needed().records == {P}, "the slot of what is not reported is kept"
    (lost,) = deaths.lost(100)
    assert (lost.status, lost.leader.comm, lost.event) == (5 << 8, "marker", None)
    assert not deaths.has_lost
    assert not deaths.take_needed().records


def test_a_pid_that_ends_again_keeps_the_two_deaths_apart():
    """The same status twice: the first was gone before, so that its event is lost, and the event is the second's."""
    deaths = Deaths(lambda tgid: False)
    first, second = failed(1 << 8, "first"), failed(1 << 8, "second")
    deaths.record(record(first))
    assert pruned(deaths) == []
    deaths.record(record(second))
    _, death = deaths.exit(event(second, 9))
    assert (death.leader.comm, death.event.timestamp_ns) == ("second", 9)
    assert [lost.leader.comm for lost in deaths.lost(100)] == ["first"]
    assert pruned(deaths) == pruned(deaths) == []


def test_a_lost_death_is_found_although_its_pid_ends_again():
    """A resync looks at the records that waited when it began. A newer record shows that the older process is gone."""
    deaths = Deaths(lambda tgid: True)  # the PID has a new owner, which lives
    first, second = failed(5 << 8, "first"), failed(1 << 8, "second")
    deaths.record(record(first))
    waited = deaths.waiting()
    assert deaths.without_event(waited) == [], "it may be freeing its memory"
    deaths.record(record(second))
    (lost,) = deaths.without_event(waited)
    assert lost.leader.comm == "first"
    _, death = deaths.exit(event(second, 9))
    assert death.leader.comm == "second"


def test_a_process_freeing_its_memory_has_not_lost_its_event():
    """exit_mm() runs between record and event and can take seconds; /proc shows the process until then."""
    alive = {P}
    deaths = Deaths(alive.__contains__)
    last = End(P, 3 << 8, last=True, threaded=False)
    deaths.record(record(last))
    for _ in range(5):
        assert pruned(deaths) == deaths.without_event(deaths.waiting()) == []
    alive.clear()
    assert pruned(deaths) == [], "gone just now: its event may be on its way"
    assert deaths.exit(event(last, 1))[1].record is not None


def test_a_new_owner_of_the_pid_hides_no_lost_death():
    """The PID of a death whose event was lost belongs to a process that runs for days."""
    deaths = Deaths(lambda tgid: True, lambda tgid: False)
    deaths.record(record(End(P, 3 << 8, last=True, threaded=False)))
    assert pruned(deaths) == []
    assert [death.status for death in pruned(deaths)] == [3 << 8]


def test_an_event_that_comes_after_all_is_not_told_again():
    deaths = Deaths(lambda tgid: False)
    last = End(P, 3 << 8, last=True, threaded=False)
    deaths.record(record(last))
    assert len(deaths.without_event(deaths.waiting())) == 1
    assert deaths.exit(event(last, 1)) == (None, None)
    assert deaths.exit(event(last, 2))[1].status == 3 << 8, "the next owner of the PID"


def test_another_record_of_the_same_thread_id_has_not_waited():
    deaths = Deaths(lambda tgid: False)
    first, second = (End(P, code << 8, last=True, threaded=False) for code in (3, 4))
    deaths.record(record(first))
    deaths.prune()
    assert deaths.exit(event(first, 1))[1] is not None
    deaths.record(record(second))
    assert pruned(deaths) == []
    assert deaths.exit(event(second, 2))[1].record is not None


def test_leaders_of_living_processes_are_kept():
    deaths = Deaths(lambda tgid: tgid == 1500)
    for tgid in range(1000, 3000):
        deaths.record(record(End(tgid, 0, tgid=tgid)))
    deaths.prune()
    assert set(deaths._leaders) == {1500}


def test_a_record_is_owed_its_event_until_it_comes():
    """A stopping daemon must wait for it: the next one gets the event and would not know its process."""
    deaths = Deaths(lambda tgid: False)
    end = End(P, 3 << 8, True, threaded=False)
    assert not deaths.has_waiting
    deaths.record(record(end))
    assert deaths.has_waiting
    deaths.exit(event(end, 1))
    assert not deaths.has_waiting


# --- processes that were passed over


def test_other_rules_do_not_ask_for_what_is_counted():
    """A process of a flood whose matches were counted by its record; its exit event is queued at a reload."""
    assert COUNTED is not PASSED
    deaths = Deaths(lambda tgid: False)
    deaths.pass_over([P, 200], COUNTED)
    deaths.pass_over([201])
    deaths.forget_passed()
    assert [deaths.take_passed(tid) for tid in (P, P, 200, 201)] == [True, False, True, False]


def test_the_exit_of_a_passed_process_is_taken_once():
    deaths = Deaths(lambda tgid: False)
    deaths.pass_over([P, 200])
    assert deaths.take_needed().records == {P, 200}, "the next daemon reads their records"
    assert [deaths.take_passed(P), deaths.take_passed(P), deaths.take_passed(300)] == [True, False, False]
    deaths.forget_passed()
    assert not deaths.take_passed(200)


@pytest.mark.parametrize("passed_first", [True, False])
def test_a_reused_pid_keeps_the_order_of_its_records(passed_first):
    """One that no rule asks for, and one that a rule asks for, both with this PID and still without their events."""
    deaths = Deaths(lambda tgid: False)
    asked = End(P, 256, last=True, threaded=False)
    steps = [lambda: deaths.pass_over([P]), lambda: deaths.record(record(asked))]
    for step in steps if passed_first else reversed(steps):
        step()
    ends = [deaths.take_passed(P) or deaths.exit(event(asked, at))[1] for at in (1, 2)]
    found = [end for end in ends if isinstance(end, Death)]
    assert [(death.event.timestamp_ns, death.record.comm) for death in found] == [(2 if passed_first else 1, "leader")]
    assert not deaths.has_waiting


def test_a_lost_event_of_a_passed_process_ends_it():
    deaths = Deaths(lambda tgid: False)
    deaths.pass_over([P])
    assert pruned(deaths) == []
    assert [(death.tgid, death.is_passed_over) for death in pruned(deaths)] == [(P, True)]
    assert not deaths.has_waiting
