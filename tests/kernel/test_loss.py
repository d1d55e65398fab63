"""Losses are counted as the kernel counts them, and processes that disappeared unseen are recovered.

The daemon gets the smallest possible buffer and is stopped (SIGSTOP) while processes start and exit. The test reads
`Drops` of /proc/net/netlink for the expected number, and waitpid() for the processes that died.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from kernel.harness import PATIENCE_S, child, rename, running, sleeping_threads, wait_status

RULES = """
settings: {receive_buffer: 4K}
rules:
  - name: vanished
    events: [nonzero_exit]
    on_unknown_exit: match
    match: {comm: cnptest-held, parent: {comm: "*"}}     # parent: so that a table is kept
  - {name: only-logged, events: [nonzero_exit], match: {comm: cnptest-held, parent: {comm: "*"}}}
  - {name: ignored, events: [nonzero_exit], on_unknown_exit: ignore, match: {comm: cnptest-held}}
  - {name: unknown, events: [exit], match: {comm: cnptest-held, exit_status: unknown, parent: {comm: "*"}}}
  - {name: three, events: [nonzero_exit], match: {comm: cnptest-held, exit_code: 3, parent: {comm: "*"}}}
$MARKER
"""


CONNECTOR, GENERIC = "11", "16"  # NETLINK_CONNECTOR, and NETLINK_GENERIC, which carries the exit records


def drops_of(pid, protocols=(CONNECTOR, GENERIC)):
    """Return the kernel's count of drops at the connector and taskstats sockets of a process."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    rows = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:]]
    return sum(int(row[8]) for row in rows if row[9] in inodes and row[1] in protocols)


def reported_lost(daemon):
    return sum(int(str(record["lost"])) for record in daemon.records if record["event"] == "overrun")


def is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


HAS_PIDFD_INFO = [int(part) for part in os.uname().release.split(".")[:2]] >= [6, 15]  # PIDFD_INFO_EXIT
KERNELS = {
    "pidfd-info": (),
    "this": ("pidfd_info",),
    "no-taskstats": ("pidfd_info", "taskstats"),
    "oldest": ("pidfd_info", "event_mask", "taskstats"),
}


@pytest.mark.parametrize("refused", KERNELS.values(), ids=list(KERNELS))
def test_overrun_is_counted_exactly_and_repaired(tmp_path, refused):
    gates = [os.pipe() for _ in range(20)]
    # Started first, so that the scan at start finds them for any size of the buffer.
    held = [child(lambda gate=gate: (rename("cnptest-held"), os.read(gate[0], 1), os._exit(3))) for gate in gates]
    for process in held:
        while Path(f"/proc/{process}/comm").read_text() != "cnptest-held\n":
            pass
    with running(tmp_path, RULES, *(f"--refuse={feature}" for feature in refused)) as daemon:
        pid = daemon.process.pid
        daemon.process.send_signal(signal.SIGSTOP)
        while not is_stopped(pid):
            pass
        for _ in range(300):  # fill the queue, so that later events are lost
            wait_status(child(lambda: os._exit(1)))
        for _read, write in gates:
            os.write(write, b"x")
        assert {wait_status(process) for process in held} == {3 << 8}
        dropped = drops_of(pid)
        assert dropped > 0
        daemon.process.send_signal(signal.SIGCONT)

        daemon.wait_for("overrun")
        recovered = daemon.wait_for("recovered")
        while reported_lost(daemon) < dropped:
            daemon.next_record()
        # With such a small buffer, events of other processes are lost as well: the kernel's count increases, and
        # cnprocd must report every drop. With a larger one the count stands still.
        daemon.reload(RULES.replace("4K", "1M"))
        deadline_s = time.monotonic() + PATIENCE_S
        while (reported := reported_lost(daemon)) != drops_of(pid):
            assert time.monotonic() < deadline_s, f"{reported} reported, {drops_of(pid)} dropped"
            daemon.next_record()
        print(f"\nthe kernel dropped {dropped} while we were stopped; cnprocd reported {reported} in all", end="")
        print(f" and recovered {recovered['count']}")
        daemon.mark()

        unknown = bool(refused) or not HAS_PIDFD_INFO
        ending = (None, None, None) if unknown else (3, None, False)
        for rule in ("vanished", "only-logged", "three", "unknown" if unknown else "ignored"):
            records = daemon.matches(rule)
            assert sorted(record["pid"] for record in records) == sorted(held), rule
            assert {(r["recovered"], r["exit_code"], r["signal"], r["core_dumped"]) for r in records} == {
                (True, *ending)
            }
        assert daemon.matches("ignored" if unknown else "unknown") == []

        # afterwards nothing is lost
        again = child(lambda: (rename("cnptest-held"), os._exit(3)))
        wait_status(again)
        daemon.mark()
        assert [record["exit_code"] for record in daemon.matches("three", pid=again)] == [3]


@pytest.mark.parametrize("came", ["with the start", "with a reload"])
def test_pidfds_report_deaths_without_a_table(tmp_path, came):
    """Rules of nonzero_exit and comm alone keep no table. Processes of the scan at start are held by pidfds.

    A reload scans as well: a rule that comes with it asks for other processes.
    """
    rules = "settings: {receive_buffer: 4K}\nrules:\n"
    rules += "  - {name: failed, events: [nonzero_exit], match: {comm: cnptest-held}}\n$MARKER"
    gate = os.pipe()
    codes = [0, 3, 5]
    held = [child(lambda c=c: (rename("cnptest-held"), os.read(gate[0], 1), os._exit(c))) for c in codes]
    for process in held:
        while Path(f"/proc/{process}/comm").read_text() != "cnptest-held\n":
            pass
    if not HAS_PIDFD_INFO:
        pytest.skip("PIDFD_INFO_EXIT needs Linux 6.15")
    reloads = came == "with a reload"
    with running(tmp_path, rules.replace("comm: cnptest-held", "comm: other") if reloads else rules) as daemon:
        if reloads:
            daemon.reload(rules)
        daemon.process.send_signal(signal.SIGSTOP)
        while not is_stopped(daemon.process.pid):
            pass
        for _ in range(300):
            wait_status(child(lambda: os._exit(1)))
        os.write(gate[1], b"xxx")
        assert [os.WEXITSTATUS(wait_status(process)) for process in held] == codes
        daemon.process.send_signal(signal.SIGCONT)
        for process in held[1:]:  # other programs may have caused an overrun, and a resync, before
            daemon.wait_for("rule_matched", pid=process)
        daemon.reload(rules.replace("4K", "1M"))
        daemon.mark()
        told = {record["pid"]: (record["exit_code"], record["recovered"]) for record in daemon.matches("failed")}
        assert told == {held[1]: (3, True), held[2]: (5, True)}


def test_small_buffer_is_said(tmp_path):
    with running(tmp_path, RULES) as daemon:
        record = daemon.wait_for("receive_buffer")
        assert record["events"] == int(str(record["bytes"])) // 832


def test_forged_datagrams_are_dropped_and_counted(tmp_path):
    """Any root process can multicast to the group; only nl_pid 0 is the kernel."""
    import socket
    import struct

    with running(tmp_path, RULES.replace("4K", "1M")) as daemon:
        forger = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 11)
        forger.bind((0, 0))
        event = struct.pack("=IIQ6I", 0x80000000, 0, 1, os.getpid(), os.getpid(), 9, 17, 1, 1)
        message = struct.pack("=IIIIHH", 1, 1, 0, 0, len(event), 0) + event
        for size in (76, 76, 60):
            datagram = struct.pack("=IHHII", size, 3, 0, 0, 0) + message
            forger.sendto(datagram[:size], (0, 1))
        record = daemon.wait_for("spoofed")
        assert record["foreign_sender"] >= 1
        daemon.mark()
        assert daemon.matches() == []


def born_as(pid, body):
    """Let a process of this PID run `body`: the kernel gives the next free one after ns_last_pid (proc(5))."""
    while True:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        born = child(body)
        if born == pid:
            return
        os.kill(born, signal.SIGKILL)  # another program was faster
        wait_status(born)


@pytest.mark.parametrize("owner", ["fails", "lives"])
def test_a_reused_pid_hides_no_death_whose_event_was_lost(tmp_path, owner):
    """The record of the death came. In a storm its PID soon belongs to another process, which may run for days."""
    rules = "settings: {receive_buffer: 64K}\nrules:\n"
    rules += "  - {name: failed, events: [nonzero_exit], match: {comm: cnptest-held}}\n$MARKER"
    gate = os.pipe()
    with running(tmp_path, rules, "--refuse=pidfd_info") as daemon:
        pid = daemon.process.pid
        for _ in range(20):  # other programs may fail as well, and fill the records' buffer
            daemon.process.send_signal(signal.SIGSTOP)
            while not is_stopped(pid):
                pass
            dropped, records_dropped = (drops_of(pid, [protocol]) for protocol in (CONNECTOR, GENERIC))
            for _ in range(300):  # fill the queue of events
                if drops_of(pid, [CONNECTOR]) > dropped:
                    break
                wait_status(child(lambda: os._exit(1)))
            held = child(lambda: (rename("cnptest-held"), os._exit(3)))
            assert wait_status(held) == 3 << 8
            born_as(held, lambda: os._exit(1) if owner == "fails" else os.read(gate[0], 1))
            if owner == "fails":
                wait_status(held)
            has_record = drops_of(pid, [GENERIC]) == records_dropped
            daemon.process.send_signal(signal.SIGCONT)
            if has_record:
                break
        try:
            assert daemon.wait_for("rule_matched", pid=held)["recovered"]
        finally:
            os.write(gate[1], b"x" * 20)
        daemon.mark()
        assert len(daemon.matches("failed", pid=held)) == 1


CHANGED = """
settings: {receive_buffer: 64K}
rules:
  - {name: any, events: [nonzero_exit], match: {comm: cnptest-change}, record: [euid, cmdline]}
  - {name: was-root, events: [nonzero_exit], match: {comm: cnptest-change, euid: root}}
  - {name: is-nobody, events: [nonzero_exit], match: {comm: cnptest-change, euid: 65534}}
  - {name: old, events: [nonzero_exit], match: {comm: cnptest-change, cmdline: "*old-one"}}
  - {name: new, events: [nonzero_exit], match: {comm: cnptest-change, cmdline: "*new-one"}}
$MARKER
"""
AGAIN = 'read x; exec "$0" -c "read x; exit 3" "$0" new-one'


@pytest.mark.parametrize("ends", ["in the gap", "later"])
def test_what_a_lost_event_may_have_changed_is_not_told(tmp_path, ends):
    """Two processes of root: one becomes another effective user, and one executes its program with other arguments."""
    program = Path(shutil.copy(os.path.realpath("/bin/sh"), tmp_path / "cnptest-change"))
    ids, again = os.pipe(), os.pipe()
    other_user = child(
        lambda: (rename("cnptest-change"), os.read(ids[0], 1), os.seteuid(65534), os.read(ids[0], 1), os._exit(3))
    )
    args = child(lambda: (os.dup2(again[0], 0), os.execv(program, [program, "-c", AGAIN, program, "old-one"])))
    for process in (other_user, args):
        while Path(f"/proc/{process}/comm").read_text() != "cnptest-change\n":
            pass
    with running(tmp_path, CHANGED) as daemon:
        pid = daemon.process.pid
        daemon.process.send_signal(signal.SIGSTOP)
        while not is_stopped(pid):
            pass
        dropped = drops_of(pid, [CONNECTOR])
        while drops_of(pid, [CONNECTOR]) < dropped + 10:  # from now on all are dropped until the queue is read
            wait_status(child(lambda: os._exit(0)))
        for gate in (ids, again):
            os.write(gate[1], b"\n")
        while "\t65534\t" not in Path(f"/proc/{other_user}/status").read_text():
            pass
        while not Path(f"/proc/{args}/cmdline").read_bytes().endswith(b"new-one\0"):
            pass
        if ends == "later":
            daemon.process.send_signal(signal.SIGCONT)
            daemon.wait_for("overrun")  # it has compared with /proc
            daemon.reload(CHANGED.replace("64K", "4M"))  # what other programs do must not lose events from here on
        for gate in (ids, again):
            os.write(gate[1], b"\n")
        assert {wait_status(other_user), wait_status(args)} == {3 << 8}
        daemon.process.send_signal(signal.SIGCONT)
        for process in (other_user, args):
            daemon.wait_for("rule_matched", rule="any", pid=process)
        daemon.reload(CHANGED.replace("64K", "4M"))
        daemon.mark()
        told = {str(one["rule"]): (one["pid"], one["recovered"]) for one in daemon.matches() if one["rule"] != "any"}
        if ends == "later":
            shell = {"was-root": (args, False)}
            assert told == {"is-nobody": (other_user, False), "new": (args, False)} | shell
        else:
            assert told == {}
            assert [(one.get("euid"), one["cmdline"]) for one in daemon.matches("any")] == [(None, None)] * 2


def test_a_core_dump_is_that_of_the_new_owner_of_its_pid(tmp_path):
    """A stopped daemon reads the end of a process and the core dump of the next one with its PID in one drain."""

    def dump():
        rename("cnptest-dump")
        os.chdir(tmp_path)
        resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))
        sleeping_threads(5)
        os.abort()

    rules = "rules:\n  - {name: failed, events: [exit], match: {comm: cnptest-*}}\n$MARKER"
    with running(tmp_path, rules) as daemon:
        for _ in range(5):  # the dumping thread may be the last one
            daemon.process.send_signal(signal.SIGSTOP)
            while not is_stopped(daemon.process.pid):
                pass
            pid = child(lambda: (rename("cnptest-first"), os._exit(0)))
            wait_status(pid)
            born_as(pid, dump)
            assert os.WCOREDUMP(wait_status(pid)), "this machine did not dump core, so the case proves nothing"
            daemon.process.send_signal(signal.SIGCONT)
            daemon.wait_for("rule_matched", pid=pid, comm="cnptest-dump")
        daemon.mark()
        found = daemon.matches("failed", comm="cnptest-dump")
        assert [record["core_dumped"] for record in found] == [True] * 5


def test_no_process_that_lives_is_taken_for_a_vanished_one(tmp_path):
    """The scan after an overrun enters new processes while fork events of earlier owners of their PIDs are queued."""
    rules = "settings: {receive_buffer: 256K}\nrules:\n"
    rules += (
        "  - {name: job, events: [nonzero_exit], match: {cmdline: 'cnptest-job*'}, on_unknown_exit: match}\n$MARKER"
    )
    jobs, reused = list[subprocess.Popen[bytes]](), 0
    with running(tmp_path, rules) as daemon:
        pid = daemon.process.pid
        for _ in range(3):
            daemon.process.send_signal(signal.SIGSTOP)
            while not is_stopped(pid):
                pass
            former = [child(lambda: os._exit(0)) for _ in range(40)]  # these events are queued
            for one in former:
                wait_status(one)
            dropped = drops_of(pid, [CONNECTOR])
            while drops_of(pid, [CONNECTOR]) == dropped:
                wait_status(child(lambda: os._exit(0)))
            for one in former:  # and these are lost
                Path("/proc/sys/kernel/ns_last_pid").write_text(str(one - 1))
                jobs.append(subprocess.Popen(["cnptest-job", "600"], executable="/bin/sleep"))
            reused += len({job.pid for job in jobs} & {*former})
            daemon.process.send_signal(signal.SIGCONT)
            while reported_lost(daemon) < drops_of(pid):
                daemon.next_record()
        daemon.mark()
        assert reused > 60, "the events are about PIDs that have new owners"
        assert [
            (r["pid"], r["comm"], r["status"], r["recovered"], r["exit_code"], r["lifetime_ms"])
            for r in daemon.matches("job")
        ] == []
        for job in jobs:
            job.kill()
            job.wait()
        daemon.mark_burst()
        assert {record["pid"] for record in daemon.matches("job")} == {job.pid for job in jobs}
