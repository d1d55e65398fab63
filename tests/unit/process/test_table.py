"""The table as a table of events: each test is a list of kernel events and the expected state afterwards.

Times are in seconds here; processes are named by their PID.
"""

from dataclasses import replace

import pytest
from unit.process.machine import living

from cnprocd.connector.event import Comm, Exit, Fork, Gid, Uid
from cnprocd.process.model import TICK_NS, Process
from cnprocd.process.table import KEEP_NS, Table, same_process

SECOND = 1_000_000_000


def at(seconds: float) -> int:
    return int(seconds * SECOND)


def fork(table: Table, parent: int, child: int, when: float, by: int | None = None):
    return table.fork(Fork(1, 0, at(when), by or parent, parent, child, child))


def thread(table: Table, tgid: int, tid: int, when: float):
    table.thread(Fork(1, 0, at(when), 1, 1, tid, tgid))


def thread_exit(table: Table, tgid: int, tid: int, when: float):
    return table.thread_exit(Exit(0x80000000, 0, at(when), tid, tgid, 0, 17, 1, 1))


def known(tgid: int, started: float | None = 1, **attributes) -> Process:
    return Process(tgid, 1, None if started is None else at(started), **attributes)


@pytest.fixture
def table() -> Table:
    table = Table()
    shell = known(100, comm="sh", uid=1000, gid=100, exe="/bin/sh", cmdline="sh -i", cgroup="/user.slice", threads=1)
    assert table.adopt([known(1, 0, comm="systemd"), shell]) == []
    return table


def nobody(tgid: int) -> bool:
    return False


def everybody(tgid: int) -> bool:
    return True


# --- births


def test_a_child_inherits_everything_but_its_pid(table):
    child, former = fork(table, 100, 200, 5)
    assert former is None
    assert (child.tgid, child.ppid, child.start_ns, child.threads) == (200, 100, at(5), 1)
    assert (child.comm, child.uid, child.gid) == ("sh", 1000, 100)
    assert (child.exe, child.cmdline, child.cgroup) == ("/bin/sh", "sh -i", "/user.slice")
    assert table.get(200) is child


def test_a_child_of_a_thread_has_an_unknown_name(table):
    child, _ = fork(table, 100, 200, 5, by=101)
    assert (child.comm, child.comm_source, child.exe, child.uid) == (None, "unknown", "/bin/sh", 1000)


def test_a_child_of_an_unknown_parent_is_unknown(table):
    child, _ = fork(table, 4711, 200, 5)
    assert (child.tgid, child.ppid, child.start_ns, child.comm, child.uid) == (200, 4711, at(5), None, None)


def test_nothing_is_inherited_from_a_parent_that_is_younger(table):
    """The entry of the parent's PID is its later owner: the events come from two CPUs."""
    fork(table, 100, 300, 9)
    child, _ = fork(table, 300, 200, 5)
    assert child.comm is None


def test_a_change_of_the_child_is_not_its_parent_s(table):
    fork(table, 100, 200, 5)
    table.rename(Comm(0x200, 0, at(6), 200, 200, b"x"), "renamed")
    assert (table.get(100).comm, table.get(200).comm) == ("sh", "renamed")


# --- PIDs that are used again


def test_a_new_owner_of_a_pid_replaces_one_that_ended(table):
    table.end(table.get(100), at(4))
    child, former = fork(table, 1, 100, 5)
    assert former is None
    assert table.get(100) is child


def test_a_new_owner_of_a_live_pid_reports_the_old_as_vanished(table):
    shell = table.get(100)
    _, former = fork(table, 1, 100, 5)
    assert former is shell


def test_scan_results_of_a_process_survive_its_late_fork_event(table):
    """LISTEN, fork, scan, then the fork event is read: the process has not vanished, and may have execed since."""
    table.adopt([known(200, 4.99, comm="ls", exe="/bin/ls", counted_ns=at(5.5))])
    child, former = fork(table, 100, 200, 5)
    assert former is None
    assert (child.comm, child.exe, child.start_ns) == ("ls", "/bin/ls", at(5))
    thread(table, 200, 201, 5.2)
    assert table.get(200).threads == 1, "the scan has counted this thread"


def test_a_late_exit_does_not_touch_the_new_owner(table):
    table.end(table.get(100), at(4))
    fork(table, 1, 100, 5)
    assert thread_exit(table, 100, 100, 4.5) is None
    assert (table.get(100).threads, table.get(100).ended_ns) == (1, None)


@pytest.mark.parametrize("change", ["rename", "uid", "gid"])
def test_a_late_change_does_not_touch_the_new_owner(table, change):
    fork(table, 1, 100, 5)
    before = table.get(100)
    comm, uid, gid = before.comm, before.uid, before.gid
    if change == "rename":
        table.rename(Comm(0x200, 0, at(4), 100, 100, b"late"), "late")
    elif change == "uid":
        table.uid(Uid(4, 0, at(4), 100, 100, 55, 55))
    else:
        table.gid(Gid(0x40, 0, at(4), 100, 100, 55, 55))
    assert (before.comm, before.uid, before.gid) == (comm, uid, gid)


def test_who_had_a_pid_at_a_moment_is_told_by_the_start(table):
    fork(table, 1, 100, 5)
    assert table.get(100, at(4)) is None
    assert table.get(100, at(5)).start_ns == at(5)
    assert table.get(100).start_ns == at(5)
    assert table.get(999) is None


# --- exec, names and ids


def test_exec_changes_the_image_and_keeps_ids_and_cgroup(table):
    fresh = known(100, comm="ls", exe="/bin/ls", cmdline="ls -l")
    process, _ = table.exec(100, at(6), fresh)
    assert process is table.get(100)
    assert (process.comm, process.exe, process.cmdline) == ("ls", "/bin/ls", "ls -l")
    assert (process.comm_source, process.image_source) == ("exec", "exec")
    assert (process.uid, process.gid, process.cgroup) == (1000, 100, "/user.slice")


def test_exec_of_a_set_user_id_program_changes_what_was_read(table):
    fresh = known(100, comm="su", uid=0, gid=0, cgroup="/other", exe="/bin/su")
    process, _ = table.exec(100, at(6), fresh)
    assert (process.uid, process.gid, process.ids_source) == (0, 0, "exec")
    assert (process.cgroup, process.cgroup_source) == ("/other", "exec")


@pytest.mark.parametrize("fresh", [None, known(100, 30, comm="stranger")], ids=["gone", "the PID has a new owner"])
def test_exec_of_an_unreadable_process_makes_its_image_unknown(table, fresh):
    process, _ = table.exec(100, at(6), fresh)
    assert (process.comm, process.exe, process.cmdline) == (None, None, None)
    assert (process.comm_source, process.image_source) == ("unknown", "unknown")
    assert process.uid == 1000


def test_exec_of_an_unknown_process_enters_what_was_read(table):
    fresh = known(200, 5, comm="ls")
    assert table.exec(200, at(6), fresh) == (fresh, None)
    assert table.get(200) is fresh


def test_exec_of_an_unknown_process_that_is_gone_enters_its_pid(table):
    assert table.exec(200, at(6), None) == (Process(200, counted_ns=at(6)), None)


def test_exec_leaves_one_thread_and_revives_a_leader_that_ended(table):
    thread(table, 100, 101, 4)
    thread(table, 100, 102, 4)
    table.end(table.get(100), at(5))
    process, _ = table.exec(100, at(6), known(100, comm="ls"))
    assert (process.threads, process.threaded, process.ended_ns) == (1, False, None)
    table.sweep(at(60), nobody)
    assert table.get(100) is process


def test_a_name_is_the_process_s_only_if_its_leader_takes_it(table):
    table.rename(Comm(0x200, 0, at(5), 101, 100, b"worker"), "worker")
    assert table.get(100).comm == "sh"
    table.rename(Comm(0x200, 0, at(5), 100, 100, b"new"), "new")
    assert (table.get(100).comm, table.get(100).comm_source) == ("new", "event")


def test_ids_are_the_process_s_real_ones(table):
    table.uid(Uid(4, 0, at(5), 100, 100, ruid=7, euid=0))
    table.gid(Gid(0x40, 0, at(5), 100, 100, rgid=8, egid=0))
    table.uid(Uid(4, 0, at(6), 101, 100, ruid=99, euid=99))
    table.gid(Gid(0x40, 0, at(6), 101, 100, rgid=99, egid=99))
    assert (table.get(100).uid, table.get(100).gid, table.get(100).ids_source) == (7, 8, "event")


# --- threads


def test_the_last_thread_by_count_is_the_end(table):
    thread(table, 100, 101, 5)
    thread(table, 100, 102, 5)
    assert thread_exit(table, 100, 100, 6) is None
    assert thread_exit(table, 100, 102, 6) is None
    assert thread_exit(table, 100, 101, 6) is table.get(100)


def test_threads_that_a_scan_has_counted_are_not_counted_again(table):
    table.adopt([known(300, 2, threads=3, counted_ns=at(5))])
    thread(table, 300, 302, 4)
    assert thread_exit(table, 300, 303, 4.5) is None
    assert table.get(300).threads == 3
    thread(table, 300, 304, 6)
    assert table.get(300).threads == 4


def test_threads_of_an_unknown_process_are_nobody_s(table):
    thread(table, 4711, 4712, 5)
    assert thread_exit(table, 4711, 4712, 6) is None


# --- ends


@pytest.mark.parametrize("later_ns", [2, TICK_NS - 1])
def test_a_parent_younger_by_less_than_a_tick_is_accepted(table, later_ns):
    """Two starts within one tick, one of them perhaps exact, can be read in either order."""
    began_ns = 5 * 10**9
    table.adopt([known(100, 1), Process(101, 100, began_ns + later_ns), Process(102, 101, began_ns)])
    child = table.get(102)
    assert child is not None
    chain = table.ancestors(child, None, False, lambda tgid: pytest.fail("nobody need be asked"))
    assert [process.tgid for process in chain][:2] == [101, 100]


def test_an_ended_process_is_kept_a_moment_and_then_forgotten(table):
    table.end(table.get(100), at(5), certain=True)
    table.sweep(at(5) + KEEP_NS, nobody)
    assert table.get(100) is not None
    table.sweep(at(5) + KEEP_NS + 1, nobody)
    assert table.get(100) is None


def test_an_ended_leader_with_live_threads_is_kept(table):
    table.end(table.get(100), at(5))
    table.sweep(at(20), everybody)
    assert 100 in living(table)


def test_a_leaderless_process_without_an_end_is_forgotten_later(table):
    """A plan for failures delivers ends of leaders, and not the success of a last thread."""
    table.end(table.get(100), at(5))
    table.sweep(at(20), everybody)
    table.sweep(at(30), nobody)
    assert 100 not in living(table)
    table.sweep(at(40), nobody)
    assert table.get(100) is not None, "the exit of its last thread may still be in the queue"
    table.sweep(at(50), nobody)
    assert table.get(100) is None
    _, former = fork(table, 1, 100, 51)
    assert former is None


def test_a_leaderless_process_with_a_reused_pid_has_not_vanished(table):
    """Found by test_plan.py: between two sweeps its threads ended with a status that no rule needs."""
    table.end(table.get(100), at(5))
    table.sweep(at(20), everybody)
    _, former = fork(table, 1, 100, 21)
    assert former is None
    _, former = fork(table, 1, 100, 31)
    assert former is not None, "that one had its leader"


def test_the_end_of_a_former_owner_does_not_sweep_the_new_one(table):
    table.end(table.get(100), at(5))
    fork(table, 1, 100, 6)
    table.sweep(at(60), nobody)
    assert table.get(100).start_ns == at(6)


def test_only_the_first_end_counts(table):
    process = table.get(100)
    table.end(process, at(5))
    table.end(process, at(9))
    assert process.ended_ns == at(5)


def test_the_size_is_the_number_of_the_living_whatever_ended(table):
    assert len(table) == 2
    table.end(table.get(100), at(5))
    assert len(table) == 1
    fork(table, 1, 100, 6)
    assert len(table) == 2
    for tgid in range(5000, 5010):
        table.end(Process(tgid), at(7))  # processes that were never in the table
    assert len(table) == 2
    table.clear()
    assert len(table) == 0
    assert living(table) == set()


# --- after a loss


def test_a_scan_corrects_what_is_known_and_adds_what_is_not(table):
    seen = known(100, 1.02, comm="renamed", threads=7, counted_ns=at(30))
    seen.ppid = 1
    new = known(400, 20, comm="new")
    assert table.adopt([seen, new]) == []
    process = table.get(100)
    assert (process.comm, process.threads, process.uid) == ("renamed", 7, 1000)
    assert table.get(400) is new


def test_a_fork_of_before_the_owner_of_its_pid_is_not_entered(table):
    """A scan has entered a process, and seconds of events are still queued: that one has not vanished."""
    job = known(200, 9, comm="job")
    table.adopt([job])
    child, former = fork(table, 100, 200, 5)
    assert (child.comm, child.start_ns, former) == ("sh", at(5), None)
    assert table.get(200) is job
    assert table.get(200, at(5.5)) is None


def test_a_fork_of_before_an_image_of_unknown_start_is_left_out(table):
    image, _ = table.exec(200, at(6), None)
    assert fork(table, 100, 200, 5)[1] is None
    assert table.get(200) is image
    assert fork(table, 100, 200, 7)[1] is image, "its exit was lost"


def test_an_exec_of_a_later_owner_reports_the_old_as_vanished(table):
    shell, job = table.get(100), known(100, 5, comm="job", exe="/bin/job")
    assert table.exec(100, at(6), job) == (job, shell)
    assert table.get(100) is job


def test_a_scan_that_finds_a_new_owner_hands_back_the_old_one(table):
    """Its exit may be queued, so it stays until what was queued was evaluated."""
    shell, owner = table.get(100), known(100, 20, comm="new")
    assert table.adopt([owner]) == [shell]
    assert table.get(100) is shell
    table.replace(owner)
    assert table.get(100) is owner


def test_a_scan_older_than_an_event_changes_nothing(table):
    child, _ = fork(table, 1, 100, 50)
    assert table.adopt([known(100, 20, comm="older")]) == []
    assert table.get(100) is child


def test_a_new_owner_after_a_seen_exit_returns_no_vanished_one(table):
    table.end(table.get(100), at(5))
    owner = known(100, 20)
    assert table.adopt([owner]) == []
    assert table.get(100) is owner


def test_who_is_missing_from_a_scan_has_vanished_once(table):
    shell = table.get(100)
    fork(table, 1, 200, 50)  # after the scan began: the scan cannot have it
    fork(table, 1, 300, 20)
    table.end(table.get(300), at(21))  # its end was seen
    assert table.remove(table.unseen({1}, at(40))) == [shell]
    assert table.get(100) is None
    assert table.unseen({1}, at(40)) == []


def test_one_process_is_known_by_its_start_within_a_tick():
    assert same_process(known(1, 10.00), known(1, 10.03))
    assert not same_process(known(1, 10.00), known(1, 10.05))
    assert same_process(known(1, None), known(1, 10))


# --- births


SH = {"sh"}


def birth(table: Table, parent: int, child: int, when: float, comms=SH, by: int | None = None, tid: int | None = None):
    return table.birth((1, 0, at(when), by or parent, parent, tid or child, child, 0, 0), comms)


def test_a_birth_is_what_a_fork_would_have_entered(table):
    assert birth(table, 100, 200, 5) is table.get(100)
    assert len(table) == 3
    born = table.get(200)
    fork(table, 100, 201, 5)
    assert replace(born, tgid=201) == table.get(201)


def test_a_birth_ends_with_its_exit_and_not_with_an_older_one(table):
    birth(table, 100, 200, 5)
    assert not table.end_birth(200, at(4)), "of the former owner of the PID"
    assert table.end_birth(200, at(6))
    assert table.get(200) is None
    assert not table.end_birth(200, at(6))
    assert not table.end_birth(100, at(6)), "an entry"


@pytest.mark.parametrize(
    "given",
    [
        {"comms": {"bash"}}, {"parent": 999}, {"by": 101}, {"tid": 201}, {"when": 0.5}, {"child": 100}, {"child": 300},
    ],
    ids=["another name", "unknown parent", "by a thread", "of a thread", "older than its parent", "an entry", "twice"],
)  # fmt: skip
def test_what_is_no_plain_fork_is_no_birth(table, given):
    birth(table, 100, 300, 5)
    assert birth(table, **{"parent": 100, "child": 200, "when": 5} | given) is None


CHANGES = {
    "rename": lambda table: table.rename(Comm(0x200, 0, at(6), 100, 100, b"new"), "new"),
    "uid": lambda table: table.uid(Uid(4, 0, at(6), 100, 100, 7, 7)),
    "gid": lambda table: table.gid(Gid(0x40, 0, at(6), 100, 100, 7, 7)),
    "exec": lambda table: table.exec(100, at(6), known(100, comm="new", exe="/bin/new")),
    "exec unread": lambda table: table.exec(100, at(6), None),
    "scan": lambda table: table.adopt([known(100, comm="new", exe="/bin/new", uid=7, cgroup="/new")]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_birth_has_what_its_parent_was_at_that_moment(table, change):
    birth(table, 100, 200, 5)
    before = table.get(100).child(200, at(5))
    CHANGES[change](table)
    assert table.get(200) == before
    fork(table, 100, 201, 7)
    assert replace(table.get(201), tgid=200, start_ns=at(5)) != before


def test_births_are_entered_where_entries_are_needed(table):
    for child in (200, 201, 202):
        birth(table, 100, child, 5)
    assert [process.tgid for process in table.unseen({1, 100, 201}, at(9))] == [200, 202]
    assert fork(table, 100, 201, 6)[1] is not None, "its exit was lost"
    table.enter_births()
    assert not table.end_birth(202, at(9))
    birth(table, 100, 203, 5)
    table.clear()
    assert table.get(203) is None
