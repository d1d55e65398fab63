"""A process is looked at again when it is a second old, and only if a rule could match its end."""

from dataclasses import replace

from unit.process.machine import MachineProcFs

from cnprocd.process.model import EVERYTHING, NO_LOGIN, MoreIds, Process, Wanted
from cnprocd.process.second_look import LOOKS_S, SecondLook
from cnprocd.process.table import Table

SECOND = 1_000_000_000
LOOK_S = 0.001  # that one look takes


def process(tgid, cmdline="postgres -D /data", cgroup="/a.scope", start_s=100):
    return Process(tgid, 1, start_s * SECOND, comm="postgres", cmdline=cmdline, cgroup=cgroup)


class Scene:
    def __init__(self, *processes):
        self.table = Table()
        self.table.adopt(processes)
        self.reader = MachineProcFs({one.tgid: replace(one) for one in processes})
        self.now_s = 0.0
        self.look = SecondLook(self.table, self.reader, lambda: self.now_s + len(self.reader.reads) * LOOK_S)

    def tick(self, *newcomers, wanted=EVERYTHING, asks_for=lambda one: True):
        self.look.look(newcomers, wanted, asks_for)


def test_a_title_and_a_new_cgroup_are_read_at_the_second_look():
    scene = Scene(process(7))
    scene.tick(7)
    scene.reader.proc[7] = process(7, "postgres: checkpointer ", "/b.scope")
    scene.tick()
    known = scene.table.get(7)
    assert (known.cmdline, known.cgroup, known.cgroup_source) == ("postgres: checkpointer ", "/b.scope", "procfs")
    reads = len(scene.reader.reads)
    scene.tick()
    assert len(scene.reader.reads) == reads == 1, "once"


def test_children_keep_what_their_parent_had_at_their_birth():
    """Births in the table refer to the parent's entry as it was, so it is replaced and not changed."""
    scene = Scene(process(7))
    before = scene.table.get(7)
    before.is_shared = True
    scene.tick(7)
    scene.reader.proc[7] = process(7, "title")
    scene.tick()
    assert (before.cmdline, scene.table.get(7).cmdline) == ("postgres -D /data", "title")


def test_another_owner_of_the_pid_is_not_taken_for_it():
    scene = Scene(process(7))
    scene.tick(7)
    scene.reader.proc[7] = process(7, "other", start_s=200)
    scene.tick()
    assert scene.table.get(7).cmdline == "postgres -D /data"


def test_what_no_rule_needs_is_not_read():
    scene = Scene(process(7))
    for wanted, asks_for in ((Wanted(exe=True), lambda one: True), (EVERYTHING, lambda one: False)):
        scene.tick(7, wanted=wanted, asks_for=asks_for)
        scene.tick(wanted=wanted, asks_for=asks_for)
    assert scene.reader.reads == []


def test_a_crowd_is_looked_at_over_several_ticks():
    most = round(LOOKS_S / LOOK_S)
    crowd = range(1000, 1000 + 2 * most + 1)
    scene = Scene(*map(process, crowd))
    scene.tick(*crowd)
    for _ in range(3):
        before = len(scene.reader.reads)
        scene.tick()
        assert len(scene.reader.reads) - before <= most
    assert sorted(scene.reader.reads) == list(crowd)


def test_the_begin_of_a_login_session_is_read_at_the_second_look():
    """No event reports it. A child does not inherit that its parent was outside any: it may have begun one since."""
    outside, within = replace(process(7), more_ids=MoreIds(0, NO_LOGIN)), replace(process(7), more_ids=MoreIds(0, 54))
    assert (outside.child(8, 1).loginuid, within.child(8, 1).loginuid) == (None, 54)
    scene = Scene(outside)
    wanted = Wanted(loginuid=True)
    scene.tick(7, wanted=wanted)
    scene.reader.proc[7] = within
    scene.tick(wanted=wanted)
    assert (scene.table.get(7).euid, scene.table.get(7).loginuid) == (0, 54)


def test_a_session_of_a_program_that_was_not_read_is_unknown():
    scene = Scene(replace(process(7), more_ids=MoreIds(0, NO_LOGIN)))
    assert scene.table.exec(7, 101 * SECOND, None)[0].loginuid is None
