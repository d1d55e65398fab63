"""A match's unknown attributes are read from /proc, of the process that is meant and of no other."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from cnprocd.process.completion import complete, read_zombie
from cnprocd.process.files import FileId, FoundFile
from cnprocd.process.model import NO_LOGIN, Image, MoreIds, Occurrence, Process, Wanted

SECOND = 1_000_000_000
AT_NS = 100 * SECOND
FULL = Process(
    60, 10, 50 * SECOND, comm="java", uid=1000, gid=100, exe="/bin/java", cmdline="java -jar", cgroup="/a.service"
)
FULL.set_provenance("procfs")


class Proc:
    """/proc with these processes; `reads` are the PIDs that were read."""

    def __init__(self, *processes: Process) -> None:
        self.processes = {process.tgid: process for process in processes}
        self.reads = []

    def read(self, tgid, wanted, source):
        self.reads.append(tgid)
        found = self.processes.get(tgid)
        if found is None:
            return None
        return replace(
            found,
            exe=found.exe if wanted.exe else None,
            cmdline=found.cmdline if wanted.cmdline else None,
            uid=found.uid if wanted.ids else None,
            gid=found.gid if wanted.ids else None,
            cgroup=found.cgroup if wanted.cgroup else None,
        )

    def read_parent(self, tgid):
        return self.read(tgid, Wanted(), "procfs")

    def zombie(self, tgid, ended_ns, wanted):
        found = self.processes.get(tgid)
        return Process(tgid, cgroup=found.cgroup) if found is not None and not found.threads else None


def completed(process: Process, kind="coredump", *, proc=None, **fields) -> Process:
    occurrence = Occurrence(kind, process, process.tgid, kernel_time_ns=AT_NS, ancestors=(), **fields)
    complete(occurrence, proc or Proc(FULL), {})
    return process


def test_unknown_attributes_are_read_with_their_provenance():
    found = completed(Process(60))
    assert (found.comm, found.uid, found.exe, found.cgroup) == ("java", 1000, "/bin/java", "/a.service")
    assert set((found.provenance() | {"euid": "procfs"}).values()) == {"procfs"}
    assert found.ppid == 10


def test_exe_and_cmdline_have_a_provenance_each():
    """exe is from the exit record, the arguments from /proc at the exec; then arguments alone are read later."""
    both = Process(60, exe="/bin/a", cmdline="a", image=Image("/bin/a"), image_source="exec")
    both.take_executed_file(FileId(1, 2), FoundFile(("/bin/a",), False, True))
    assert (both.provenance()["exe"], both.provenance()["cmdline"]) == ("taskstats", "exec")
    later = Process(61, exe="/bin/a", image_source="exec")
    later.take_cmdline("a", False, "procfs")
    assert (later.provenance()["exe"], later.provenance()["cmdline"]) == ("exec", "procfs")
    found = completed(Process(60, cmdline="a", image_source="exec"), kind="exec")
    assert (found.provenance()["exe"], found.provenance()["cmdline"]) == ("unknown", "exec")


def test_of_hard_links_the_one_that_was_executed_is_named():
    process = Process(60, exe="/bin/b", image_source="exec")
    process.take_executed_file(FileId(1, 2), FoundFile(("/bin/a", "/bin/b", "/bin/c"), True, False))
    assert (process.exe, process.image.links) == ("/bin/b", ("/bin/a", "/bin/c"))


def test_known_attributes_are_kept():
    known = Process(60, 1, comm="sh", uid=7, gid=8, exe="/bin/sh")
    found = completed(known)
    assert (found.ppid, found.comm, found.uid, found.gid, found.exe) == (1, "sh", 7, 8, "/bin/sh")
    assert found.cmdline is None, "exe and cmdline are of one image, so neither is read if one is known"
    assert (found.cgroup, found.cgroup_source) == ("/a.service", "procfs")


def test_a_process_that_is_fully_known_is_not_read():
    proc = Proc(FULL)
    completed(replace(FULL), proc=proc)
    assert proc.reads == []


@pytest.mark.parametrize("gone", ["recovered", "reaped"])
def test_a_process_that_is_gone_is_not_read(gone):
    proc = Proc(FULL)
    assert completed(Process(60), "exit", proc=proc, **{gone: True}).comm is None
    assert proc.reads == []


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (replace(FULL, start_ns=AT_NS + SECOND), "exec"),  # started after the event
        (replace(FULL, threads=1), "exit"),  # lives, and the process of the event has ended
    ],
)
def test_a_new_owner_of_the_pid_is_not_taken(other, kind):
    assert completed(Process(60), kind, proc=Proc(other)).uid is None


@pytest.mark.parametrize("kind", ["exec", "comm"])
def test_the_program_of_a_later_exec_is_not_taken(kind):
    """By the comm of the event another program ran than by that which /proc shows now."""
    found = completed(Process(60, comm="worker"), kind)
    assert (found.exe, found.cmdline, found.cgroup) == (None, None, "/a.service")


def test_after_a_comm_event_the_same_comm_shows_the_program():
    assert completed(Process(60, comm="java"), "comm").exe == "/bin/java"


def test_another_start_is_another_process():
    assert completed(Process(60, start_ns=70 * SECOND)).uid is None


def test_a_zombie_keeps_comm_ids_and_cgroup_but_has_no_image():
    found = completed(Process(60), "exit", proc=Proc(replace(FULL, threads=0)))
    assert (found.comm, found.uid, found.cgroup) == ("java", 1000, "/a.service")
    assert (found.exe, found.cmdline) == (None, None)


def test_a_thread_does_not_take_its_process_s_comm():
    assert completed(Process(60), of_thread=True).comm is None


@pytest.mark.parametrize(("start_ns", "taken"), [(40 * SECOND, True), (90 * SECOND, False)])
def test_a_parent_is_older_than_its_child(start_ns, taken):
    proc = Proc(replace(FULL, tgid=10, ppid=1, comm="bash", start_ns=start_ns))
    occurrence = Occurrence("exec", Process(60, 10, 50 * SECOND), 60, kernel_time_ns=AT_NS)
    complete(occurrence, proc, {})
    assert (occurrence.ancestors is not None) is taken


def test_a_parent_is_read_once_for_the_matches_of_a_batch():
    """In a storm all processes have one parent, and a read costs more than all else of a match."""
    proc = Proc(replace(FULL, tgid=10, ppid=1, comm="bash"))
    parents: dict[int, Process | None] = {}
    occurrences = [Occurrence("exit", Process(pid, 10, 60 * SECOND), pid, kernel_time_ns=AT_NS) for pid in (60, 61)]
    for occurrence in occurrences:
        occurrence.reaped = True
        complete(occurrence, proc, parents)
        assert occurrence.ancestors is not None and occurrence.ancestors[0].comm == "bash"
    assert proc.reads == [10]


def test_the_last_login_session_is_that_of_the_zombie():
    occurrence = Occurrence("exit", Process(60, more_ids=MoreIds(0, NO_LOGIN)), 60, kernel_time_ns=AT_NS)
    procfs = SimpleNamespace(zombie=lambda tgid, ended_ns, wanted: Process(tgid, more_ids=MoreIds(None, 54)))
    for wanted, reaped, loginuid in (
        (Wanted(ids=True), False, NO_LOGIN),
        (Wanted(loginuid=True), True, NO_LOGIN),
        (Wanted(loginuid=True), False, 54),
    ):
        occurrence.reaped = reaped
        read_zombie(occurrence, procfs, wanted)
        assert (occurrence.process.euid, occurrence.process.loginuid) == (0, loginuid)


def test_of_a_zombie_only_the_cgroup_is_read():
    """The exit record had all else that a zombie shows, so the worker that reads /proc is not asked."""
    recorded = Process(60, 1, comm="java", uid=1000)
    proc = Proc(replace(FULL, threads=0))
    found = completed(recorded, "exit", proc=proc)
    assert (found.cgroup, found.cgroup_source, proc.reads) == ("/a.service", "zombie", [])
    unrecorded = completed(Process(60, 1, uid=1000), "exit", proc=proc)
    assert (unrecorded.comm, unrecorded.cgroup, proc.reads) == ("java", "/a.service", [60])
