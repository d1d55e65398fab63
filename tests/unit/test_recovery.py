"""After an overrun: nothing is missed, nothing is reported twice, and another overrun is not forgotten."""

from types import SimpleNamespace

from unit.process.machine import INIT, Machine, MachineProcFs

from cnprocd.connector.source import Losses
from cnprocd.connector.status import EVERY_STATUS
from cnprocd.process.holder import Ended
from cnprocd.process.model import EVERYTHING, Process
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking
from cnprocd.recovery import Recovery

OWN = 50


class Scene:
    """A recovery over a machine in memory. `losses` are the kernel's counters, `ended` the reaped processes' pidfds."""

    def __init__(self, table=True, kinds=frozenset({"exit"})) -> None:
        self.machine = Machine(own=OWN)
        self.machine.put(60, INIT, "sh", exe="/bin/sh")
        self.procfs = MachineProcFs(self.machine.proc())
        self.tracker = Tracker(Tracking(table, True, EVERYTHING, kinds, frozenset()), self.procfs, OWN)
        if table:
            self.tracker.adopt(self.procfs.scan(EVERYTHING))
        self.losses, self.ended, self.records, self.now_s = Losses(), [], [], 100.0
        source = SimpleNamespace(losses=self.losses, count_losses=lambda: None, wanted_exits=EVERY_STATUS)
        holder = SimpleNamespace(ended=lambda: self.ended, release=lambda tgid: None)
        self.recovery = Recovery(source, self.tracker, self.procfs, holder, self._log, lambda: self.now_s)

    def _log(self, level, event, **fields) -> None:
        self.records.append((event, fields))

    def end_unseen(self, tgid: int) -> None:
        self.procfs.late = {other: process for other, process in self.procfs.late.items() if other != tgid}

    def logged(self, event: str, field: str) -> list:
        return [fields[field] for of, fields in self.records if of == event]


def exits(found):
    return [(o.kind, o.process.tgid, o.status, o.recovered) for o in found]


def test_a_vanished_process_is_an_exit_of_unknown_status():
    scene = Scene()
    scene.end_unseen(60)
    scene.losses.connector_drops = 7
    assert exits(scene.recovery.resync(lambda: None)) == [("exit", 60, None, True)]
    assert scene.logged("overrun", "lost") == [7]
    assert scene.logged("recovered", "count") == [1]
    assert (scene.recovery.resyncs, scene.recovery.recovered) == (1, 1)
    assert scene.recovery.resync(lambda: None) == []


def test_a_pidfd_adds_the_status():
    scene = Scene()
    scene.end_unseen(60)
    scene.ended = [Ended(Process(60), 9)]
    assert exits(scene.recovery.resync(lambda: None)) == [("exit", 60, 9, True)]


def test_without_a_table_the_pidfds_alone_show_the_exits():
    scene = Scene(table=False)
    scene.ended = [Ended(Process(60), 9)]
    assert exits(scene.recovery.resync(lambda: None)) == [("exit", 60, 9, True)]


def test_exits_are_dropped_if_no_rule_asks_for_them():
    scene = Scene(kinds=frozenset({"fork"}))
    scene.end_unseen(60)
    assert scene.recovery.resync(lambda: None) == []


def test_each_loss_is_reported_once():
    scene = Scene()
    for drops in (3, 5):
        scene.losses.connector_drops = drops
        assert scene.recovery.check_losses()
        scene.recovery.resync(lambda: None)
        assert not scene.recovery.check_losses()
    assert scene.logged("overrun", "lost") == [3, 2]
    assert scene.logged("overrun", "lost_total") == [3, 5]


def test_a_resync_is_due_once_a_second_after_an_overrun():
    scene = Scene()
    assert not scene.recovery.due
    scene.recovery.note_overrun()
    assert scene.recovery.due
    scene.recovery.resync(lambda: None)
    assert not scene.recovery.due
    scene.recovery.note_overrun()
    scene.now_s += 0.9
    assert not scene.recovery.due
    scene.now_s += 0.2
    assert scene.recovery.due


def test_an_overrun_during_the_last_scan_stays_pending():
    """A storm overruns the buffer during every scan: scans are bounded, and the next resync comes a second later."""
    scene = Scene()
    scans = []

    def read_queue():
        scans.append(len(scans))
        scene.recovery.note_overrun()

    scene.recovery.resync(read_queue)
    assert len(scans) == 3
    assert scene.recovery.check_losses()
    scene.now_s += 1.0
    assert scene.recovery.due


def test_silent_losses_are_counted_and_logged():
    scene = Scene()
    scene.recovery.report_silent([SimpleNamespace(recovered=True), SimpleNamespace(recovered=False)])
    scene.recovery.report_silent([SimpleNamespace(recovered=False)])
    assert scene.logged("recovered", "count") == [1]
    assert scene.recovery.recovered == 1
