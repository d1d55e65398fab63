"""Inheritance at fork is a guess: a user's program that root started makes children of root's process (CLONE_PARENT).

ROOT is a root process in a unit of its own. USER is its child and runs a user's program.
"""

import pytest
from unit.process.machine import DEVICE, INIT, SECOND, MachineFiles, inode_of
from unit.process.test_tracker import ALL, Scene

from cnprocd.process.files import FileId
from cnprocd.process.model import EVERYTHING, Image
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking

ROOT, USER, CHILD, UID = 200, 201, 202, 1000
UNIT = "/system.slice/cron.service"


def scene(records=True, kinds=ALL) -> Scene:
    found = Scene(records=records, kinds=kinds)
    found.machine.put(ROOT, INIT, "cron", exe="/usr/sbin/cron", cgroup=UNIT)
    found.machine.put(USER, ROOT, "evil", exe="/home/u/evil", uid=UID, gid=100, cgroup="/user.slice/u.scope")
    found.reader.late = found.reader.proc = found.machine.proc()
    found.tracker = Tracker(
        Tracking(True, records, EVERYTHING, kinds, frozenset()), found.reader, 50, files=MachineFiles((), False)
    )
    found.tracker.adopt(found.reader.scan(EVERYTHING))
    return found


def privileges(process) -> tuple:
    return process.uid, process.euid, process.loginuid, process.exe, process.cgroup


def of(told, kind, tgid=CHILD):
    (found,) = [o for o in told if o.kind == kind and o.process.tgid == tgid]
    return found


NOTHING = (None, None, None, None, None)


@pytest.mark.parametrize("records", [True, False], ids=["records", "no records"])
def test_a_user_s_sibling_at_its_end_is_not_its_root_parent(records):
    """Its exit record has its uid; without one nothing is known, for it was reaped at once."""
    one = scene(records, frozenset({"exit"}))
    one.machine.sibling(USER, CHILD)
    one.machine.exit(CHILD, 256)
    told = of(one.run(), "exit").process
    assert privileges(told) == ((UID, *NOTHING[1:]) if records else NOTHING)
    assert told.ppid == ROOT


@pytest.mark.parametrize("records", [True, False], ids=["records", "no records"])
def test_a_child_of_root_that_ends_has_its_parent_s_attributes(records):
    """Where exit records come. Without them it must be read in time: here it is a zombie still."""
    one = scene(records, frozenset({"exit"}))
    one.machine.fork(ROOT, CHILD)
    one.machine.exit(CHILD, 256, reaped=False)
    told = of(one.run(), "exit").process
    assert told.uid == told.euid == 0 and told.cgroup == UNIT


def test_a_living_sibling_is_read_when_an_answer_is_due():
    one = scene()
    one.machine.sibling(USER, CHILD)
    told = of(one.run(), "fork").process
    assert (told.uid, told.euid, told.cgroup) == (UID, UID, "/user.slice/u.scope")
    assert told.exe is None and told.cmdline is None, "which program it ran at that moment is unknown"


def test_a_sibling_that_was_gone_before_its_fork_was_read():
    one = scene(kinds=frozenset({"fork"}))
    one.machine.sibling(USER, CHILD)
    one.machine.exit(CHILD, 0)
    for entry in one.machine.log:
        entry.proc.pop(CHILD, None)
    assert privileges(of(one.run(), "fork").process) == NOTHING


def test_a_sibling_that_execs_and_is_gone_has_no_privileges():
    one = scene(kinds=frozenset({"exec"}))
    one.machine.sibling(USER, CHILD)
    one.machine.exec(CHILD, "/home/u/evil2")
    one.machine.exit(CHILD, 0)
    for entry in one.machine.log:
        entry.proc.pop(CHILD, None)
    assert privileges(of(one.run(), "exec").process) == NOTHING


def test_a_sibling_that_execs_has_the_ids_that_proc_shows():
    one = scene()
    one.machine.sibling(USER, CHILD)
    one.machine.exec(CHILD, "/home/u/evil2")
    told = of(one.run(), "exec").process
    assert (told.uid, told.euid, told.exe) == (UID, UID, "/home/u/evil2")


def test_a_change_of_ids_confirms_no_program_and_no_cgroup():
    """In a user namespace a user can change its ids: the exit record then agrees with the event, not with the fork."""
    one = scene(kinds=frozenset({"exit"}))
    one.machine.sibling(USER, CHILD)
    one.machine.set_ids(CHILD, 100_000, 100_000)
    one.machine.exit(CHILD, 256)
    for entry in one.machine.log:
        entry.proc.pop(CHILD, None)
    told = of(one.run(), "exit").process
    assert privileges(told) == (100_000, 100_000, None, None, None)


def test_a_worker_that_drops_its_privileges_keeps_its_unit():
    """As the workers of web servers do: forked by root, no exec, then setuid(2)."""
    one = scene(kinds=frozenset({"exit"}))
    one.machine.fork(ROOT, CHILD)
    one.machine.set_ids(CHILD, 33, 33)
    one.machine.wait(SECOND)
    one.machine.exit(CHILD, 11)
    told = of(one.run(), "exit").process
    assert (told.uid, told.exe, told.cgroup) == (33, "/usr/sbin/cron", UNIT)


def test_the_child_of_a_sibling_has_no_privileged_parent():
    one = scene(kinds=frozenset({"exit"}))
    one.machine.sibling(USER, CHILD)
    one.machine.fork(CHILD, 203)
    one.machine.exit(203, 256)
    told = of(one.run(), "exit", 203)
    assert told.ancestors[0].tgid == CHILD
    assert (told.ancestors[0].uid, told.ancestors[0].cgroup) == (UID, "/user.slice/u.scope")


def test_a_sibling_of_one_user_has_not_its_parent_s_program():
    """One user: the exit record names another file."""
    one = scene(kinds=frozenset({"exit"}))
    one.machine.put(210, ROOT, "tool", exe="/opt/tool")
    one.tracker.adopt(one.reader.scan(EVERYTHING))
    one.run()
    root = one.tracker.table.get(ROOT)
    root.image = Image(file=FileId(DEVICE, inode_of("/usr/sbin/cron")))
    one.machine.sibling(210, CHILD)
    one.machine.exit(CHILD, 256)
    told = of(one.run(), "exit").process
    assert (told.exe, told.cmdline, told.cgroup) == (None, None, None)
    assert told.uid == told.euid == 0
