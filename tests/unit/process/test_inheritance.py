"""A user's program that root's process started makes a child of root's process (CLONE_PARENT): it inherits nothing.

ROOT is a root process in a unit of its own. USER is its child and runs a user's program.
"""

from dataclasses import replace

import pytest
from unit.process.machine import INIT, SECOND, MachineFiles
from unit.process.test_tracker import ALL, Scene

from cnprocd.process.model import EVERYTHING, Wanted
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking

ROOT, USER, CHILD, UID = 200, 201, 202, 1000
UNIT = "/system.slice/cron.service"
NOTHING = (None, None, None, None, None)


def scene(kinds=ALL, records=True, threads=frozenset()) -> Scene:
    found = Scene()
    found.machine.put(ROOT, INIT, "cron", exe="/usr/sbin/cron", cgroup=UNIT)
    found.machine.put(USER, ROOT, "evil", exe="/home/u/evil", uid=UID, gid=100, cgroup="/user.slice/u.scope")
    found.reader.late = found.reader.proc = found.machine.proc()
    found.tracker = Tracker(
        Tracking(True, records, EVERYTHING, kinds, threads), found.reader, 50, files=MachineFiles((), False)
    )
    found.tracker.adopt(found.reader.scan(EVERYTHING))
    return found


def hide(one: Scene, tgid: int = CHILD) -> None:
    """Let the process be gone before any read of /proc."""
    for entry in one.machine.log:
        entry.proc.pop(tgid, None)


def privileges(process) -> tuple:
    return process.uid, process.euid, process.loginuid, process.exe, process.cgroup


def of(found, kind, tgid=CHILD):
    (occurrence,) = [one for one in found if one.kind == kind and one.process.tgid == tgid and not one.of_thread]
    return occurrence.process


def test_a_users_sibling_at_its_end_has_nothing_of_root():
    one = scene(frozenset({"exit"}))
    one.machine.sibling(USER, CHILD)
    one.machine.exit(CHILD, 256)
    ended = of(one.run(), "exit")
    assert (privileges(ended), ended.cmdline, ended.ppid) == ((UID, *NOTHING[1:]), None, ROOT)


def test_a_sibling_of_a_thread_of_root_has_nothing_of_root():
    """Rules on threads see the end of its only thread."""
    one = scene(frozenset(), threads=frozenset({"exit"}))
    one.machine.sibling(USER, CHILD)
    one.machine.exit(CHILD, 256)
    (ended,) = [o.process for o in one.run() if o.process.tgid == CHILD]
    assert privileges(ended) == (UID, *NOTHING[1:])


def test_a_reaped_child_of_root_has_its_parents_attributes():
    one = scene(frozenset({"exit"}))
    one.machine.fork(ROOT, CHILD)
    one.machine.exit(CHILD, 256)
    hide(one)
    ended = of(one.run(), "exit")
    assert (ended.uid, ended.euid, ended.exe, ended.cgroup) == (0, 0, "/usr/sbin/cron", UNIT)


@pytest.mark.parametrize("records", [True, False], ids=["records", "no records"])
def test_a_reaped_child_of_root_keeps_them_at_an_exec(records):
    """It is gone before its exec is read: at its end it is still in the unit of its parent."""
    one = scene(records=records)
    one.machine.fork(ROOT, CHILD)
    one.machine.exec(CHILD, "/bin/false")
    one.machine.exit(CHILD, 256)
    hide(one)
    one.reader.executed.clear()
    ended = of(one.run(), "exit")
    assert (ended.uid, ended.euid, ended.cgroup) == (0, 0, UNIT)


def gone_before_its_exec():
    one = scene(frozenset({"exec"}))
    one.machine.sibling(USER, CHILD)
    one.machine.exec(CHILD, "/home/u/evil2")
    one.machine.exit(CHILD, 256)
    hide(one)
    return one


def test_a_sibling_that_is_gone_at_its_exec_has_nothing_of_root():
    one = gone_before_its_exec()
    found = of(one.run(), "exec")
    assert (found.uid in (UID, None), privileges(found)[1:]) == (True, NOTHING[1:])


def test_a_sibling_that_execs_has_the_ids_that_proc_shows():
    one = scene()
    one.machine.sibling(USER, CHILD)
    one.machine.exec(CHILD, "/home/u/evil2")
    found = of(one.run(), "exec")
    assert privileges(found)[:2] == (UID, UID)
    assert (found.exe, found.cgroup) == ("/home/u/evil2", "/user.slice/u.scope")
    assert not one.tracker.table.get(CHILD).unconfirmed


def test_ids_are_read_at_an_exec_whatever_rules_need():
    assert Tracking(True, True, Wanted(cgroup=True), ALL, frozenset()).wanted_at_exec == Wanted(ids=True, cgroup=True)


@pytest.mark.parametrize("kind", ["comm", "sid", "coredump"])
@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "there"])
def test_at_another_event_a_sibling_has_nothing_of_root(kind, is_gone):
    one = scene(frozenset({kind}))
    one.machine.sibling(USER, CHILD)
    if kind == "comm":
        one.machine.rename(CHILD, "cron")
    elif kind == "sid":
        one.machine.setsid(CHILD)
    else:
        one.machine.exit(CHILD, 11, dumper=CHILD)
    if is_gone:
        hide(one)
    found = of(one.run(), kind)
    assert found.uid in (UID, None) and found.euid in (UID, None), found
    assert found.exe in (None, "/home/u/evil") and found.cgroup in (None, "/user.slice/u.scope"), found


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "there"])
def test_a_change_of_the_uid_confirms_no_program(is_gone):
    """In a user namespace a user's process can change its uid: then record and event agree, unlike event and fork."""
    one = scene(frozenset({"exit"}))
    one.machine.sibling(USER, CHILD)
    one.machine.set_ids(CHILD, 100_000, 100_000)
    one.machine.exit(CHILD, 256)
    if is_gone:
        hide(one)
    ended = of(one.run(), "exit")
    assert privileges(ended)[:2] == (100_000, 100_000)
    assert (ended.exe, ended.cgroup) in ((None, None), (None, "/user.slice/u.scope")), ended


def test_a_worker_that_drops_its_privileges_keeps_its_unit():
    """As the workers of web servers do: forked by root, no exec, then setuid(2)."""
    one = scene(frozenset({"exit"}))
    one.machine.fork(ROOT, CHILD)
    one.machine.set_ids(CHILD, 33, 33)
    one.machine.wait(SECOND)
    one.machine.exit(CHILD, 11)
    ended = of(one.run(), "exit")
    assert (ended.uid, ended.exe, ended.cmdline, ended.cgroup) == (33, "/usr/sbin/cron", "/usr/sbin/cron", UNIT)


def test_a_program_that_is_not_read_any_more_costs_no_cmdline():
    """Former rules asked for the program, and the rules of a reload do not. Found by test_reload.py."""
    one = scene(frozenset({"exit"}))
    one.tracker.use(replace(one.tracker.tracking, wanted=Wanted(ids=True, cmdline=True)))
    one.machine.tasks[ROOT].cmdline = "cron -f"
    one.reader.late = one.reader.proc = one.machine.proc()
    one.tracker.renew(one.reader.scan(one.tracker.tracking.wanted_anew))
    one.machine.fork(ROOT, CHILD)
    one.machine.set_ids(CHILD, UID, 100)
    one.machine.exit(CHILD, 256)
    ended = of(one.run(), "exit")
    assert (ended.uid, ended.cmdline) == (UID, "cron -f")


def test_a_second_look_finds_a_sibling():
    one = scene()
    one.machine.sibling(USER, CHILD)
    one.run()
    entry = one.tracker.table.get(CHILD)
    assert entry.unconfirmed
    entry.take_newer(one.reader.read(CHILD, EVERYTHING, "procfs"))
    assert (entry.uid, entry.euid, entry.unconfirmed) == (UID, UID, False)
    assert (entry.exe, entry.cgroup) == ("/home/u/evil", "/user.slice/u.scope")
