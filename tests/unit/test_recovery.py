"""After an overrun: nothing is missed, nothing is reported twice, and another overrun is not forgotten."""

import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from unit.process.machine import INIT, Machine, MachineProcFs
from unit.test_failures import Line

from cnprocd.connector.source import Batch, Losses
from cnprocd.connector.status import EVERY_STATUS
from cnprocd.connector.taskrecord import ReadRecords, TaskRecord
from cnprocd.process.death import Death
from cnprocd.process.holder import Ended, Holder
from cnprocd.process.model import EVERYTHING, Process
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking
from cnprocd.recovery import Recovery
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleModel

OWN = 50
FAR_NS = 1 << 62
LONG_S = 60.0
OVERRUN = Batch([], ReadRecords(), more=False, overrun=True, events_lost=True)
CALM = OVERRUN._replace(overrun=False, events_lost=False)


class Scene:
    """A recovery over a machine in memory. `losses` are the kernel's counters, `ended` the reaped processes' pidfds."""

    def __init__(self, table=True, kinds=frozenset({"exit"})) -> None:
        self.machine = Machine(own=OWN)
        self.machine.put(60, INIT, "sh", exe="/bin/sh")
        self.procfs = MachineProcFs(self.machine.proc())
        self.tracker = Tracker(Tracking(table, True, EVERYTHING, kinds, frozenset()), self.procfs, OWN)
        if table:
            self.tracker.adopt(self.procfs.scan(EVERYTHING))
        self.held = True
        self.losses, self.ended, self.records, self.now_s = Losses(), [], [], 100.0
        source = SimpleNamespace(losses=self.losses, count_losses=lambda: None, wanted_exits=EVERY_STATUS)
        holder = SimpleNamespace(ended=lambda: self.ended, release=lambda tgid: None, holds=lambda process: self.held)
        self.recovery = Recovery(source, self.tracker, self.procfs, holder, self._log, lambda: self.now_s)

    def _log(self, level, event, **fields) -> None:
        self.records.append((event, fields))

    def end_unseen(self, tgid: int) -> None:
        self.procfs.late = {other: process for other, process in self.procfs.late.items() if other != tgid}

    def resync(self):
        """A whole resync, with an empty queue."""
        self.recovery.begin()
        found = []
        while self.recovery.active:
            found += self.recovery.go_on(FAR_NS, LONG_S)
        return found

    def logged(self, event: str, field: str) -> list:
        return [fields[field] for of, fields in self.records if of == event]


def exits(found):
    return [(o.kind, o.process.tgid, o.status, o.recovered) for o in found]


def test_a_vanished_process_is_an_exit_of_unknown_status():
    scene = Scene()
    scene.end_unseen(60)
    scene.losses.connector_drops = 7
    assert exits(scene.resync()) == [("exit", 60, None, True)]
    assert scene.logged("overrun", "lost") == [7]
    assert scene.logged("recovered", "count") == [1]
    assert (scene.recovery.resyncs, scene.recovery.recovered) == (1, 1)
    assert scene.resync() == []


def test_a_pidfd_adds_the_status():
    scene = Scene()
    scene.end_unseen(60)
    scene.ended = [Ended(Process(60), 9)]
    assert exits(scene.resync()) == [("exit", 60, 9, True)]


def test_without_a_table_the_pidfds_alone_show_the_exits():
    scene = Scene(table=False)
    scene.ended = [Ended(Process(60), 9)]
    assert exits(scene.resync()) == [("exit", 60, 9, True)]


def test_a_pidfd_whose_event_has_come_since_shows_nothing():
    scene = Scene(table=False)
    scene.ended = [Ended(Process(60), 9)]
    scene.recovery.begin()
    assert scene.recovery.go_on(0, LONG_S) == []
    scene.held = False  # the event was evaluated
    assert scene.resync() == []


def test_exits_are_dropped_if_no_rule_asks_for_them():
    scene = Scene(kinds=frozenset({"fork"}))
    scene.end_unseen(60)
    assert scene.resync() == []


def test_each_loss_is_reported_once():
    scene = Scene()
    for drops in (3, 5):
        scene.losses.connector_drops = drops
        assert scene.recovery.check_losses()
        scene.resync()
        assert not scene.recovery.check_losses()
    assert scene.logged("overrun", "lost") == [3, 2]
    assert scene.logged("overrun", "lost_total") == [3, 5]


def test_a_resync_begins_once_a_second_after_an_overrun():
    scene = Scene()
    scene.recovery.begin_if_due()
    assert not scene.recovery.active
    scene.recovery.note(OVERRUN)
    scene.recovery.begin_if_due()
    assert scene.recovery.active
    scene.resync()
    scene.recovery.note(OVERRUN)
    scene.now_s += 0.9
    scene.recovery.begin_if_due()
    assert not scene.recovery.active
    scene.now_s += 0.2
    scene.recovery.begin_if_due()
    assert scene.recovery.active


def test_an_overrun_during_a_resync_stays_pending():
    """A storm overruns the buffer during every scan: the next resync comes a second later."""
    scene = Scene()
    scene.recovery.begin()
    scene.recovery.note(OVERRUN)
    scene.resync()
    assert scene.recovery.check_losses()
    scene.recovery.begin_if_due()
    assert not scene.recovery.active
    scene.now_s += 1.1
    scene.recovery.begin_if_due()
    assert scene.recovery.active


def test_nothing_is_compared_before_its_events_were_evaluated():
    """A process that the scan does not find is not missing yet: its event may be queued."""
    scene = Scene()
    scene.end_unseen(60)
    scene.recovery.begin()
    assert scene.recovery.go_on(0, LONG_S) == []
    assert scene.recovery.active
    assert scene.recovery.go_on(0, LONG_S) == []
    assert not scene.recovery.needs_records, "in a storm the events before the scan can wait for many seconds"
    assert scene.recovery.go_on(FAR_NS, LONG_S) == []
    assert scene.recovery.needs_records
    assert exits(scene.recovery.go_on(FAR_NS, LONG_S)) == [("exit", 60, None, True)]
    assert not scene.recovery.active


def test_a_scan_is_done_in_steps():
    """Each step takes in at least one process, and other events may be evaluated in between."""
    scene = Scene()
    scene.recovery.begin()
    steps = 0
    while scene.recovery.active:
        scene.recovery.go_on(FAR_NS, 0.0)
        steps += 1
    assert steps > len(scene.procfs.late)


def test_records_without_an_event_are_joined_in_steps():
    """After an overrun in a storm there were 69,058 of them, and the loop stood still for 2.7 s."""
    scene = Scene(table=False)
    scene.held = False
    pids = range(1000, 2000)
    failed = TaskRecord(1, 1, 1, 256, True, False, "x", 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    list(scene.tracker.take([], [failed._replace(pid=pid, tgid=pid) for pid in pids]))
    scene.recovery.begin()
    steps = []
    while scene.recovery.active:
        steps.append(scene.recovery.go_on(FAR_NS, 0.0))
    assert max(map(len, steps)) < len(pids) / 4
    assert [one for step in steps for one in exits(step)] == [("exit", pid, 256, True) for pid in pids]
    assert scene.logged("recovered", "count") == [len(pids)]
    assert scene.recovery.recovered == len(pids)


def test_a_process_that_is_born_during_a_scan_is_not_missing():
    scene = Scene()
    scene.recovery.begin()
    scene.recovery.go_on(FAR_NS, 0.0)
    scene.tracker.table.adopt([Process(61, 60, start_ns=time.monotonic_ns() + 1)])
    assert scene.resync() == []


@pytest.mark.parametrize("is_queued", [True, False])
def test_a_former_owner_is_reported_if_its_exit_was_lost(is_queued):
    """The scan finds a new owner of the PID. The exit of the former one may be among the events that are queued."""
    scene = Scene()
    former = scene.tracker.table.get(60)
    owner = replace(former, start_ns=former.start_ns + 1_000_000_000, comm="new")
    scene.procfs.late = {**scene.procfs.late, 60: owner}
    scene.recovery.begin()
    assert scene.recovery.go_on(0, LONG_S) == []
    assert scene.tracker.table.get(60) is former
    scene.procfs.proc = scene.procfs.late
    if is_queued:
        scene.tracker.table.end(former, owner.start_ns - 1)
    found = scene.resync()
    assert exits(found) == ([] if is_queued else [("exit", 60, None, True)])
    assert scene.tracker.table.get(60).comm == "new"


def test_a_former_owner_s_record_is_not_of_one_that_lives():
    """Its event was lost, and a program that may run for days has its PID."""
    scene = Scene()
    record = TaskRecord(60, 60, 1, 256, True, False, "old", 7, 7, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    found = list(scene.tracker.all_died([Death(60, 256, None, record, record)]))
    assert [(one.process.comm, one.process.exe, one.status) for one in found] == [("old", None, 256)]
    assert scene.tracker.table.get(60).ended_ns is None


def lose(tracker, comm: str, pid: int) -> None:
    """Take an exit record whose event does not come, until the housekeeping finds it."""
    failed = TaskRecord(pid, pid, 1, 256, True, False, comm, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    list(tracker.take([], [failed]))
    for _ in range(2):
        tracker.deaths.caught_up()
        tracker.deaths.prune()


def test_silent_losses_are_counted_and_logged():
    """Once for those between two calls of the housekeeping."""
    scene = Scene(table=False)
    for pid in (6, 7):
        lose(scene.tracker, "x\n", pid)
        assert exits(scene.recovery.lost()) == [("exit", pid, 256, True)]
        assert scene.recovery.lost() == []
    for _ in range(2):
        scene.recovery.report_silent()
    assert scene.logged("recovered", "count") == [2]
    assert scene.logged("recovered", "pids") == [[6, 7]]
    assert scene.logged("recovered", "comms") == [[r"x\x0a"] * 2]
    assert scene.recovery.recovered == 2


# -- in flight ---------------------------------------------------------------------------------------------------


def test_slots_are_blanked_after_the_jobs_of_lost_deaths(tmp_path, monkeypatch):
    """The event of a death was lost, and a tick finds its exit record. The next daemon must not find it again.

    It might know another start time of the process, and so make another job of the same death.
    """
    line = Line(tmp_path)
    empty = Batch([], ReadRecords(), False, False)
    monkeypatch.setattr(line.pipeline.source, "drain", lambda *options, **more: empty)
    lose(line.tracker, "worker", 70)
    assert line.pipeline.again_s is not None, "the loop turns although no event comes"
    line.pipeline.turn()
    assert line.matched_at_blanking == [[70]]
    assert line.pipeline.again_s is None
    line.dispatcher.spool.close()


def test_a_table_that_a_reload_turns_on_is_not_compared():
    """The resync began without one: it has scanned nothing, and nothing is missing."""
    scene = Scene(table=False)
    scene.recovery.begin()
    scene.tracker.use(replace(scene.tracker.tracking, table=True))
    scene.tracker.renew(scene.procfs.scan(EVERYTHING))
    assert scene.recovery.go_on(FAR_NS, LONG_S) == []
    assert len(scene.tracker.table) > 1


def test_many_vanished_processes_are_returned_a_few_at_a_time():
    """Each is evaluated, and thousands at once would stop the loop. One that ends meanwhile is not returned."""
    scene = Scene()
    many = range(1000, 3000)
    scene.tracker.adopt([Process(tgid, INIT, 1, comm="sh", threads=1) for tgid in many])
    scene.recovery.begin()
    pieces = [scene.recovery.go_on(FAR_NS, LONG_S)]
    last = scene.tracker.table.get(many[-1])
    assert last is not None
    scene.tracker.table.end(last, 10)
    while scene.recovery.active:
        pieces.append(scene.recovery.go_on(FAR_NS, LONG_S))
    assert max(map(len, pieces)) <= 128
    assert sorted(o.process.tgid for piece in pieces for o in piece) == list(many[:-1])
    assert scene.logged("recovered", "count") == [len(many) - 1]


@pytest.fixture
def crowd():
    """Four processes that live, two of each name, in the order of a scan."""
    sleepers = [subprocess.Popen(["sleep", "600"]) for _ in range(4)]
    yield [Process(one.pid, comm="ab"[at % 2]) for at, one in enumerate(sleepers)]
    for one in sleepers:
        one.kill()
        one.wait()


def rules_on(*comms: str) -> Matcher:
    models = [{"name": f"r{at}", "events": ["exit"], "match": {"comm": one}} for at, one in enumerate(comms)]
    return Matcher([plain(RuleModel.model_validate(one)) for one in models])


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize(("before", "after"), [("a", "b"), ("ab", "b"), ("b", "ab"), ("a", "")])
def test_after_a_reload_as_many_are_held_as_after_a_start(crowd, limit, before, after):
    """If there is room for a few only, what the former rules asked for must not keep it."""
    held = []
    for former in (rules_on(*before), None):
        rules, holder = rules_on(*after), Holder(limit)
        recovery = Recovery(SimpleNamespace(wanted_exits=EVERY_STATUS), None, None, holder, None)
        if former is None:
            recovery.hold(crowd, rules)
        else:
            recovery.hold(crowd, former)
            for process in crowd:  # the rescan of a reload comes in groups
                recovery.hold([process], former.and_other(rules), rules)
            recovery.let_go(rules)
        assert {process.comm for process in crowd if holder.holds(process)} <= set(after)
        held.append(len(holder))
        holder.close()
    assert held[0] == held[1]


# -- what the lost events may have changed -----------------------------------------------------------------------


def exit_of(scene: Scene, tgid: int, uid: int = 0):
    """Let a process end with its event and its record."""
    now_ns = scene.machine.now + 1
    record = TaskRecord(tgid, tgid, INIT, 256, True, False, "sh", uid, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    event = (0x80000000, 0, now_ns, tgid, tgid, 256, 17, INIT, INIT)
    return [one.process for one in scene.tracker.take([event], [record], now_ns) if one.kind == "exit"]


def known(process: Process):
    return process.comm, process.uid, process.euid, process.cmdline, process.cgroup


def test_a_death_after_an_overrun_has_what_its_record_shows():
    """An exec, or a change of a user, may have been lost. The record shows the comm and the user."""
    scene = Scene()
    scene.recovery.note(OVERRUN)
    assert [known(one) for one in exit_of(scene, 60, uid=7)] == [("sh", 7, None, None, "/")]


def test_a_process_that_vanished_in_an_overrun_has_its_last_comm():
    scene = Scene()
    scene.recovery.note(OVERRUN)
    scene.end_unseen(60)
    assert [known(one.process) for one in scene.resync()] == [("sh", None, None, None, "/")]


def test_a_scan_after_an_overrun_shows_what_changed():
    scene = Scene()
    scene.recovery.note(OVERRUN)
    task = scene.machine.tasks[60]
    task.euid, task.cmdline = 9, "sh new"
    scene.procfs.late = scene.machine.proc()
    scene.resync()
    assert [known(one) for one in exit_of(scene, 60)] == [("sh", 0, 9, "sh new", "/")]


def test_what_was_read_before_the_queue_was_empty_is_in_doubt():
    """The kernel drops every event from the overrun on until the queue was read empty."""
    scene = Scene()
    scene.recovery.note(OVERRUN._replace(more=True))
    scene.resync()
    scene.recovery.note(CALM)
    assert [known(one) for one in exit_of(scene, 60)] == [("sh", 0, None, None, "/")]


def test_what_is_in_doubt_when_the_queue_is_empty_is_read_again():
    """The queue of an overrun can take seconds to read, and the machine can be quiet: no counter changes any more."""
    scene = Scene()
    scene.recovery.note(OVERRUN._replace(more=True))
    scene.recovery.begin_if_due()
    scene.resync()
    scene.recovery.note(CALM)
    scene.now_s += 1.1
    scene.recovery.begin_if_due()
    assert scene.recovery.active
    scene.resync()
    assert [known(one) for one in exit_of(scene, 60)] == [("sh", 0, 0, "/bin/sh", "/")]
    scene.now_s += 1.1
    scene.recovery.begin_if_due()
    assert not scene.recovery.active


def test_a_loss_that_only_the_counters_show_is_one_as_well():
    scene = Scene()
    scene.losses.connector_drops = 1
    scene.recovery.begin()
    assert [known(one) for one in exit_of(scene, 60)] == [("sh", 0, None, None, "/")]


def test_lost_exit_records_change_no_process():
    scene = Scene()
    scene.losses.taskstats_drops = 1
    scene.recovery.note(OVERRUN._replace(events_lost=False))
    scene.recovery.begin()
    assert [known(one) for one in exit_of(scene, 60)] == [("sh", 0, 0, "/bin/sh", "/")]


def test_children_are_in_doubt_until_an_exec_is_read():
    scene = Scene()
    scene.recovery.note(OVERRUN)
    scene.machine.log.clear()
    scene.machine.fork(60, 61)
    scene.machine.fork(60, 62)
    scene.machine.exec(62, "/bin/new")
    scene.procfs.executed = scene.machine.proc()
    list(scene.tracker.take([entry.said for entry in scene.machine.log if not entry.is_record], []))
    assert [known(one) for one in exit_of(scene, 61)] == [("sh", 0, None, None, None)]
    (executed,) = exit_of(scene, 62)
    assert (executed.euid, executed.cgroup) == (0, "/")
    assert executed.cmdline is not None
    above = scene.tracker.table.ancestors(executed, None, True, lambda tgid: None)
    assert [known(one) for one in above] == [("systemd", None, None, None, "/init.scope")]
