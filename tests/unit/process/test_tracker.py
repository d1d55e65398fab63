"""Identity: small scenes on a machine in memory (machine.py), each about one property of the tracker: families of
hooks, one core dump for each process, processes and threads, counting without records, losses. Random histories are in
test_tracker_histories.py.
"""

from dataclasses import replace

import pytest
from unit.process.machine import INIT, MILLISECOND, SECOND, Entry, Machine, MachineProcFs, Unfolding

from cnprocd.connector.event import Coredump, Exec, Exit, Fork
from cnprocd.process.model import EVERYTHING, Occurrence, Process, Wanted
from cnprocd.process.table import KEEP_NS
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking

OWN = 50
ALL = frozenset({"fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "coredump", "exit"})
EXITS = frozenset({"exit"})


class Scene:
    """A machine with a tracker that has adopted it. `run` feeds new events and returns the occurrences."""

    def __init__(self, table=True, records=True, kinds=ALL, threads=frozenset(), wanted=EVERYTHING, own=OWN) -> None:
        self.machine = Machine(own=OWN)
        self.machine.put(OWN, INIT, "cnprocd", exe="/usr/sbin/cnprocd")
        self.machine.put(60, INIT, "sh", exe="/bin/sh", uid=1000, gid=100)
        self.reader = MachineProcFs(self.machine.proc())
        self.tracker = Tracker(Tracking(table, records, wanted, kinds, threads), self.reader, own)
        if table:
            self.tracker.adopt(self.reader.scan(wanted))
        self._fed = 0

    def run(self, lost=lambda entry: False) -> list[Occurrence]:
        """Run one drain. Return copies, because the tracker reuses each occurrence."""
        new, self._fed = self.machine.log[self._fed :], len(self.machine.log)
        new = [entry for entry in new if not lost(entry)]
        self.reader.late = self.machine.proc()
        batch = Unfolding(
            [entry.said for entry in new if not entry.is_record],
            self.reader,
            {entry.at_ns: entry.proc for entry in self.machine.log},
        )
        records = [entry.said for entry in new if entry.is_record]
        return [replace(o, process=replace(o.process)) for o in self.tracker.take(batch, records, self.machine.now)]

    def later(self) -> list[Occurrence]:
        """Return the occurrences that were held until now."""
        self.machine.wait(10 * MILLISECOND)
        self.reader.late = self.reader.proc = self.machine.proc()
        return list(self.tracker.take([], [], self.machine.now))

    def sweep(self, after_ns: int = 0) -> list[Occurrence]:
        self.machine.wait(after_ns)
        self.reader.late = self.reader.proc = self.machine.proc()
        return self.tracker.sweep(self.machine.now)


def kinds(told: list[Occurrence]) -> list[tuple]:
    return [(o.kind, o.process.tgid) for o in told]


# --- hooks and their families


def family(scene: Scene) -> dict[int, bool]:
    return {o.process.tgid: o.from_hook for o in scene.run() if o.kind == "exit"}


@pytest.mark.parametrize("table", [True, False], ids=["table", "no table"])
def test_a_hook_its_children_and_their_children_are_hooks(table):
    scene = Scene(table=table)
    machine = scene.machine
    machine.fork(OWN, 100)
    machine.fork(100, 101)
    machine.setsid(101)
    machine.fork(101, 102)
    machine.exit(100, 0)
    machine.exit(101, 0)  # 102 belongs to init now
    machine.exec(102, "/bin/true")
    machine.fork(102, 103)
    for tgid in (102, 103):
        machine.exit(tgid, 256)
    machine.fork(60, 104)
    machine.exit(104, 256)
    assert family(scene) == {100: True, 101: True, 102: True, 103: True, 104: False}


def test_a_hook_is_one_though_its_fork_was_never_asked_for():
    """Its parent is in the exit record."""
    scene = Scene(table=False, kinds=EXITS)
    scene.machine.fork(OWN, 100)
    scene.machine.exit(100, 256)
    (told,) = scene.run(lost=lambda entry: isinstance(entry.said, Fork))
    assert told.from_hook


@pytest.mark.parametrize("table", [True, False], ids=["table", "no table"])
def test_an_innocent_process_that_gets_a_hook_s_pid_is_no_hook(table):
    scene = Scene(table=table)
    scene.machine.fork(OWN, 100)
    scene.machine.exit(100, 0)
    assert family(scene) == {100: True}
    scene.machine.fork(60, 100)
    scene.machine.exit(100, 256)
    assert family(scene) == {100: False}


def test_the_daemon_s_own_exit_is_not_a_hook_s():
    scene = Scene()
    scene.machine.exit(OWN, 0)
    assert family(scene) == {OWN: False}


def test_a_root_that_is_added_makes_hooks_and_is_none():
    scene = Scene(own=4711)
    scene.tracker.family.add_root(60, lambda: True)
    scene.machine.fork(60, 100)
    scene.machine.exit(100, 0)
    scene.machine.exit(60, 0)
    assert family(scene) == {100: True, 60: False}


def test_a_hook_that_outlived_the_last_daemon_is_made_known():
    scene = Scene()
    scene.tracker.family.add(60)
    scene.machine.fork(60, 100)
    scene.machine.exit(100, 0)
    scene.machine.exit(60, 0)
    assert family(scene) == {100: True, 60: True}


def test_hooks_are_forgotten_when_they_were_dead_at_two_sweeps():
    scene = Scene()
    scene.machine.fork(OWN, 100)
    scene.machine.fork(100, 101)
    scene.run()
    scene.sweep()
    assert scene.tracker.family.alive
    scene.machine.exit(100, 0)
    scene.machine.exit(101, 0)
    scene.sweep()
    assert family(scene) == {100: True, 101: True}, "their exits were still in the queue at the first sweep"
    scene.sweep()
    assert not scene.tracker.family.alive


def test_a_spare_that_waits_for_its_order_is_no_hook_that_runs():
    scene = Scene()
    scene.machine.fork(OWN, 100)
    scene.run()
    assert not scene.tracker.family.alive
    scene.tracker.family.add(100)  # it got its request
    assert scene.tracker.family.alive
    scene.machine.fork(100, 101)
    scene.machine.exit(100, 0)
    scene.run()
    scene.sweep()
    scene.sweep()
    assert scene.tracker.family.alive, "what it left behind"
    scene.tracker.family.add(103)  # its hook is registered before its fork is read
    scene.machine.fork(OWN, 103)
    scene.machine.exit(101, 0)
    scene.run()
    scene.sweep()
    scene.sweep()
    assert scene.tracker.family.alive


# --- core dumps


def test_one_core_dump_is_told_once_with_its_death():
    scene = Scene()
    machine = scene.machine
    machine.fork(60, 100)
    for tid in (101, 102):
        machine.thread(100, tid)
    scene.run()
    machine.exit(100, 6, dumper=101, order=[102, 102, 100, 100, 101, 101], last=102)
    told = scene.run() + scene.later()
    assert [(o.kind, o.process.tgid, o.status, o.process.comm) for o in told] == [
        ("coredump", 100, None, "sh"),
        ("exit", 100, 0x86, "sh"),
    ]


def test_a_second_coredump_event_matches_thread_rules_only():
    scene = Scene(kinds=frozenset({"coredump"}), threads=frozenset({"coredump"}))
    event = dumps_of_60(scene)
    told = [(o.of_thread, o.tid) for o in scene.tracker.take([event(61, 0), event(60, 1000)], [])]
    assert told == [(False, 61), (True, 61), (True, 60)]


def test_a_process_that_dumps_again_after_a_while_is_told_again():
    """The PID has a new owner."""
    scene = Scene(kinds=frozenset({"coredump"}))
    event = dumps_of_60(scene)
    assert len(list(scene.tracker.take([event(60, 0)], []))) == 1
    assert len(list(scene.tracker.take([event(60, SECOND + 1)], []))) == 1


def dumps_of_60(scene: Scene):
    scene.machine._say(Coredump, process_pid=60, process_tgid=60, parent_pid=1, parent_tgid=1)
    first = scene.machine.log[-1].said
    assert isinstance(first, Coredump)
    return lambda tid, after: first._replace(process_pid=tid, timestamp_ns=first.timestamp_ns + after)


# --- processes and threads


def ends_of_threads(scene: Scene) -> list[tuple]:
    return [(o.of_thread, o.tid, o.status, o.process.comm) for o in scene.run() if o.kind == "exit"]


def test_thread_rules_match_threads_and_process_rules_one_death():
    scene = Scene(threads=EXITS)
    machine = scene.machine
    machine.thread(60, 61)
    machine.rename(60, "worker", tid=61)
    machine.exit(60, 3 << 8, order=[61, 61, 60, 60], last=60)
    assert sorted(ends_of_threads(scene)) == [
        (False, 60, 768, "sh"),
        (True, 60, 768, "sh"),
        (True, 61, 768, "worker"),
    ]


def test_without_records_a_threads_name_is_unknown():
    scene = Scene(records=False, kinds=frozenset(), threads=EXITS)
    scene.machine.thread(60, 61)
    scene.machine.exit(60, 768, order=[61, 61, 60, 60])
    assert sorted(ends_of_threads(scene)) == [(True, 60, 768, "sh"), (True, 61, 768, None)]


def test_a_new_thread_is_no_new_process():
    scene = Scene(threads=frozenset({"fork"}))
    scene.machine.thread(60, 61)
    scene.machine.fork(60, 100)
    assert [(o.of_thread, o.process.tgid, o.tid) for o in scene.run()] == [
        (True, 60, 61),
        (False, 100, 100),
        (True, 100, 100),
    ]


@pytest.mark.parametrize("kind", ["uid", "gid", "ptrace", "comm"])
def test_what_a_thread_does_alone_is_its_own(kind):
    scene = Scene(kinds=frozenset({kind}), threads=frozenset({kind}))
    scene.machine.thread(60, 61)
    scene.run()
    if kind == "comm":
        scene.machine.rename(60, "worker", tid=61)
    elif kind == "ptrace":
        scene.machine.ptrace(60, INIT, tid=61)
    else:
        scene.machine.set_ids(60, 7, 8)
    told = [(o.of_thread, o.tid) for o in scene.run()]
    assert [one for one in told if one[1] == 61] == [(True, 61)]
    assert told.count((False, 60)) == (kind in ("uid", "gid"))
    assert scene.tracker.table.get(60).comm == "sh"


def test_a_name_that_no_rule_asks_for_needs_no_look_at_proc(monkeypatch):
    """Any process can rename itself a million times a second."""
    scene = Scene(table=False, kinds=frozenset({"comm"}))
    scene.tracker.use(scene.tracker.tracking, lambda kind, of_thread, comm, status=None: comm == "asked")
    read = []
    monkeypatch.setattr(scene.reader, "read", lambda tgid, *_: read.append(tgid))
    for comm in ("other", "asked"):
        scene.machine.rename(60, comm)
    assert [(o.kind, o.process.comm) for o in scene.run()] == [("comm", "asked")]
    assert read == [60]


def test_setsid_is_of_the_process_whichever_thread_calls_it():
    scene = Scene(kinds=frozenset({"sid"}))
    scene.machine.thread(60, 61)
    scene.machine.setsid(60, tid=61)
    assert [(o.kind, o.process.tgid, o.tid) for o in scene.run()] == [("sid", 60, 61)]


def test_details_are_those_of_the_event():
    scene = Scene()
    scene.machine.set_ids(60, 7, 8)
    scene.machine.ptrace(60, INIT)
    assert [o.details for o in scene.run()] == [
        {"rgid": 8, "egid": 8},
        {"ruid": 7, "euid": 7},
        {"tracer_pid": INIT, "tracer_tid": INIT},
    ]


# --- identity


def test_each_occurrence_shows_the_process_as_it_was_then():
    """The name changes between events of one batch, and each occurrence has the name of its moment."""
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.machine.exec(100, "/usr/bin/java")
    scene.machine.rename(100, "gc")
    scene.machine.setsid(100)
    scene.machine.rename(100, "main")
    scene.machine.exit(100, 0)
    names = ["sh", "java", "gc", "gc", "main", "main"]
    assert [o.process.comm for o in scene.run()] == names


def test_the_record_corrects_what_the_table_knows():
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.machine.tasks[100].threads[100] = scene.machine.tasks[100].comm = "renamed unseen"
    scene.machine.exit(100, 256)
    told = scene.run()[-1]
    assert (told.process.comm, told.process.comm_source) == ("renamed unseen", "taskstats")
    assert (told.process.uid, told.process.ids_source) == (1000, "taskstats")
    assert told.process.exe == "/bin/sh"


def test_without_a_table_the_record_tells_who_it_was():
    scene = Scene(table=False, kinds=EXITS, wanted=Wanted())
    scene.machine.fork(60, 100)
    scene.machine.wait(5 * SECOND)
    scene.machine.exit(100, 256)
    (told,) = scene.run()
    assert (told.process.comm, told.process.uid, told.process.gid, told.process.ppid) == ("sh", 1000, 100, 60)
    assert told.process.start_ns == pytest.approx(scene.machine.now - 5 * SECOND, abs=10_000)
    assert told.lifetime_s == pytest.approx(5, abs=0.001)
    assert scene.reader.reads == []


def test_the_parent_at_death_comes_from_the_record_if_need_be():
    """The process was reaped before the event was made: no parent is in it. The table has only the forking parent."""
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.machine.exit(60, 0)
    scene.machine.exit(100, 0)
    died = scene.run()[-1]
    assert (died.process.tgid, died.process.ppid) == (100, INIT)
    assert [process.tgid for process in died.ancestors] == [INIT]


def test_ancestors_are_the_parent_first_up_to_init():
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.machine.fork(100, 101)
    told = scene.run()[-1]
    assert [(p.tgid, p.comm) for p in told.ancestors] == [(100, "sh"), (60, "sh"), (INIT, "systemd")]
    assert told.ancestors[-1].ppid == 0


def test_a_process_whose_parent_died_has_the_one_that_adopted_it():
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.machine.fork(100, 101)
    scene.machine.exit(100, 0)
    scene.machine.setsid(101)
    told = scene.run()[-1]
    assert [p.tgid for p in told.ancestors] == [INIT]


def test_a_new_owner_of_a_parent_s_pid_is_no_ancestor():
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.machine.fork(100, 101)
    scene.machine.exit(100, 0)
    scene.run()
    scene.machine.fork(OWN, 100)
    scene.machine.setsid(101)
    told = scene.run()[-1]
    assert [p.tgid for p in told.ancestors] == [INIT]


def test_without_a_table_nobody_knows_the_ancestors():
    scene = Scene(table=False)
    scene.machine.fork(60, 100)
    assert [o.ancestors for o in scene.run()] == [None]


# --- counting threads, where there are no records


def test_a_process_ends_with_its_last_thread_and_group_status():
    scene = Scene(records=False, kinds=EXITS)
    machine = scene.machine
    for tid in (61, 62):
        machine.thread(60, tid)
    machine.end_thread(60, 60)
    assert scene.run() == []
    machine.exit(60, 3 << 8, order=[62, 62, 61, 61])
    assert [(o.process.tgid, o.status, o.process.comm) for o in scene.run()] == [(60, 768, "sh")]


def test_threads_of_an_early_leader_are_tracked_and_match_once():
    scene = Scene(records=False, kinds=EXITS)
    scene.machine.thread(60, 61)
    scene.machine.end_thread(60, 60)
    scene.run()
    assert scene.sweep(KEEP_NS + 1) == []
    scene.machine.exit(60, 768)
    assert [o.status for o in scene.run()] == [768]
    assert scene.sweep(KEEP_NS + 1) == []


def test_a_death_missed_by_the_count_is_found_once_by_the_sweep():
    scene = Scene(records=False, kinds=EXITS)
    scene.machine.thread(60, 61)
    scene.machine.exit(60, 768)
    assert scene.run(lost=lambda entry: isinstance(entry.said, Exit) and entry.said.process_pid == 61) == []
    assert scene.sweep(1) == []
    assert scene.sweep(KEEP_NS) == []
    assert [(o.process.tgid, o.status) for o in scene.sweep(SECOND)] == [(60, 768)]
    assert scene.sweep(KEEP_NS) == []


def test_a_sweep_does_not_forestall_the_last_thread_s_end():
    """The event is queued while /proc shows the process gone, and has the status of the process."""
    scene = Scene(records=False, kinds=EXITS)
    scene.machine.thread(60, 61)
    scene.machine.end_thread(60, 60)
    scene.run()
    scene.machine.wait(KEEP_NS + 1)
    scene.machine.exit(60, 768)
    assert scene.sweep() == []
    assert [o.status for o in scene.run()] == [768]
    assert scene.sweep(SECOND) == []


@pytest.mark.parametrize("table", [True, False], ids=["table", "procfs"])
def test_an_exec_that_another_follows_has_no_name(table):
    """By the time /proc is read it shows the later program for both."""
    scene = Scene(table=table, kinds=frozenset({"exec"}))
    scene.machine.fork(60, 100)
    scene.run()
    for program in ("/usr/bin/env", "/usr/bin/python3"):
        scene.machine.exec(100, program)
    told = [(one.process.comm, one.process.exe) for one in scene.run()]
    assert told == [(None, None), ("python3", "/usr/bin/python3")]


def test_exec_by_a_thread_makes_a_new_leader_that_is_not_missed():
    """The old leader's end is not that of the process, even if a sweep comes before the real end is read."""
    scene = Scene(records=False, kinds=EXITS)
    scene.machine.thread(60, 61)
    scene.machine.exec(60, "/usr/bin/java", by=61)
    assert scene.run() == []
    scene.machine.wait(KEEP_NS + 1)
    scene.machine.exit(60, 768)
    assert scene.sweep() == []
    assert [(o.status, o.process.comm) for o in scene.run()] == [(768, "java")]


def test_an_untracked_process_dies_once_for_all_its_threads():
    scene = Scene(records=False, kinds=EXITS)
    scene.machine.fork(60, 100)
    for tid in range(101, 106):
        scene.machine.thread(100, tid)
    scene.machine.exit(100, 768)
    told = scene.run(lost=lambda entry: isinstance(entry.said, Fork))
    assert kinds(told) == [("exit", 100)]
    assert len(scene.tracker.table) == len(scene.machine.alive())


# --- losses


def lose_exits(entry: Entry) -> bool:
    return entry.is_record or isinstance(entry.said, Exit)


def test_a_process_whose_end_was_lost_is_missing_after_a_scan():
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.run()
    scene.machine.exit(100, 768)
    assert scene.run(lost=lose_exits) == []
    began = scene.machine.now
    snapshot = scene.reader.scan(EVERYTHING)
    assert scene.tracker.adopt(snapshot) == []
    living = {process.tgid for process in snapshot}
    told = scene.tracker.missing(scene.tracker.table.unseen(living, began))
    assert [(o.kind, o.process.tgid, o.status, o.recovered) for o in told] == [("exit", 100, None, True)]
    assert told[0].process.comm == "sh"
    assert scene.tracker.missing(scene.tracker.table.unseen(living, began)) == []


def test_a_process_whose_pid_has_a_new_owner_has_vanished():
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.machine.exec(100, "/usr/bin/java")
    scene.run()
    scene.machine.exit(100, 768)
    scene.machine.fork(60, 100)
    told = scene.run(lost=lose_exits)
    assert [(o.kind, o.process.comm, o.recovered) for o in told] == [("exit", "java", True), ("fork", "sh", False)]


def test_a_process_scanned_before_its_fork_has_not_vanished():
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.machine.exec(100, "/usr/bin/java")
    scene.reader.late = scene.machine.proc()
    scene.tracker.adopt(scene.reader.scan(EVERYTHING))
    assert [(o.kind, o.recovered) for o in scene.run()] == [("fork", False), ("exec", False)]
    assert scene.tracker.table.get(100).comm == "java"


def test_a_death_whose_event_was_lost_is_told_from_its_record():
    scene = Scene()
    scene.machine.fork(60, 100)
    scene.machine.exit(100, 768)
    scene.run(lost=lambda entry: isinstance(entry.said, Exit))
    (told,) = scene.tracker.without_event(scene.tracker.deaths.waiting())
    assert (told.process.tgid, told.status, told.process.comm, told.kernel_time_ns) == (100, 768, "sh", None)


def test_an_image_that_cannot_be_read_any_more_is_unknown():
    scene = Scene()
    scene.machine.exec(60, "/usr/bin/java")
    scene.machine.setsid(60)
    entries = scene.machine.log
    entries[:] = [replace(entry, proc={}) if isinstance(entry.said, Exec) else entry for entry in entries]
    told = scene.run()
    assert [(o.process.comm, o.process.exe, o.process.uid) for o in told] == [(None, None, 1000)] * 2
    assert told[0].process.provenance()["exe"] == "unknown"


def test_a_child_of_an_unknown_process_is_read_from_proc():
    scene = Scene(kinds=frozenset({"fork"}))
    scene.tracker.table.clear()
    scene.machine.fork(60, 100)
    (told,) = scene.run()
    assert (told.process.comm, told.process.uid, told.process.exe) == ("sh", 1000, "/bin/sh")
    assert told.process.comm_source == "procfs"


def test_events_that_are_not_asked_for_tell_nothing():
    scene = Scene(table=False, records=False, kinds=frozenset())
    scene.machine.fork(60, 100)
    scene.machine.exec(100, "/usr/bin/java")
    scene.machine.exit(100, 6, dumper=100)
    assert scene.run() == []


def test_what_is_told_of_a_process_is_not_shared_with_the_next():
    scene = Scene(kinds=frozenset({"fork"}))
    scene.machine.fork(60, 100)
    scene.machine.fork(60, 101)
    first, second = (o.process for o in scene.tracker.take([e.said for e in scene.machine.log], []))
    assert isinstance(first, Process)
    assert first is not second


def test_a_hook_with_a_reused_pid_survives_the_sweep():
    """Found by test_plan.py."""
    scene = Scene()
    scene.machine.fork(OWN, 100)
    scene.machine.exit(100, 0)
    scene.run()
    scene.sweep()
    scene.machine.fork(OWN, 100)
    scene.run()
    scene.machine.exit(100, 0)
    scene.sweep()
    assert family(scene) == {100: True}


def test_another_plan_for_the_same_rules_keeps_what_was_passed():
    """While hooks run the plan is another one. Exits whose records were passed over before need no name then either."""
    scene = Scene(table=False, kinds=EXITS)
    tracker = scene.tracker
    cares = lambda kind, of_thread, comm, status=None: False  # noqa: E731
    tracker.use(tracker.tracking, cares)
    list(tracker.take([], [], passed=[60]))
    tracker.use(replace(tracker.tracking, thread_kinds=frozenset({"fork"})), cares)
    assert tracker.deaths.take_passed(60), "the same rules"
    list(tracker.take([], [], passed=[60]))
    tracker.use(tracker.tracking, lambda kind, of_thread, comm, status=None: True)
    assert not tracker.deaths.take_passed(60), "other rules may ask for it"
