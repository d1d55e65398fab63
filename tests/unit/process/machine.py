"""A Linux machine in memory: processes that fork, exec, rename, thread and die, and the events that the kernel sends.

Every operation appends to `log` what the proc connector and taskstats would send, in an order that the kernel could
use, each with a picture of /proc at that moment. It appends to `truth` what really happened, as occurrences with every
attribute known. Facts (kernel/exit.c, kernel/fork.c, drivers/connector/cn_proc.c, and the kernel tests):

- A task's exit record precedes its exit event; between tasks that die together nothing is ordered.
- The record of the thread that ended last is marked, at any place in the order.
- Without exit_group or a fatal signal the status of a process is that of its last thread.
- exec by another thread than the leader: every other thread ends with status 0, and that thread becomes the leader.
- A thread's FORK names the process's parent; a process's FORK names the very thread that forked.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from zlib import crc32

from hypothesis import strategies as st

from cnprocd.connector.event import Comm, Coredump, Event, Exec, Exit, Fork, Gid, Ptrace, Sid, Uid
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.files import FileId, FoundFile
from cnprocd.process.model import NO_LOGIN, TICK_NS, MoreIds, Occurrence, Process, Wanted
from cnprocd.process.table import Table

WHAT = {
    Fork: 0x1, Exec: 0x2, Uid: 0x4, Gid: 0x40, Sid: 0x80, Ptrace: 0x100, Comm: 0x200, Coredump: 0x40000000,
    Exit: 0x80000000,
}  # fmt: skip
INIT = 1
MICROSECOND, MILLISECOND, SECOND = 1_000, 1_000_000, 1_000_000_000


@dataclass
class Task:
    """One process of the machine. `threads` are the living ones: tid -> comm."""

    tgid: int
    ppid: int
    start_ns: int
    comm: str  # the leader's
    uid: int = 0
    gid: int = 0
    euid: int = 0
    loginuid: int = NO_LOGIN
    exe: str | None = None
    cmdline: str | None = None
    cgroup: str | None = "/"
    threads: dict[int, str] = field(default_factory=dict)
    had_threads: bool = False
    zombie: bool = False
    hook: bool = False
    executed: bool = False  # a program of its own

    def picture(self, now: int) -> Process:
        """Return all that /proc would show."""
        return Process(
            self.tgid, self.ppid, self.start_ns, comm=self.comm, uid=self.uid, gid=self.gid, cgroup=self.cgroup,
            exe=None if self.zombie else self.exe, cmdline=None if self.zombie else self.cmdline,
            threads=0 if self.zombie else len(self.threads), counted_ns=now,
            more_ids=MoreIds(self.euid, self.loginuid),
        )  # fmt: skip


@dataclass
class Entry:
    """One message of the kernel, and /proc right after it."""

    said: Event | TaskRecord
    at_ns: int
    proc: dict[int, Process]

    @property
    def is_record(self) -> bool:
        return isinstance(self.said, TaskRecord)


DEVICE = 2049


def inode_of(path: str) -> int:
    """Return the inode number of a program."""
    return crc32(path.encode()) + 1


class Machine:
    """`own` is the daemon: every process that it forks is a hook."""

    def __init__(self, own: int | None = None) -> None:
        self.now = 1_000 * SECOND
        self.tasks: dict[int, Task] = {}
        self.log: list[Entry] = []
        self.truth: list[Occurrence] = []
        self.own = own
        self._freed: dict[int, int] = {}  # PID or TID -> when it was last used
        self.put(INIT, 0, "systemd", exe="/usr/lib/systemd/systemd", cgroup="/init.scope")

    def put(self, tgid: int, ppid: int, comm: str, threads: int = 1, **attributes) -> Task:
        """Add a process that existed before any listener; it sends no event."""
        task = Task(tgid, ppid, self.now, comm, **attributes)
        task.cmdline, task.euid = task.cmdline or task.exe, task.uid
        task.threads = {tgid + i: comm for i in range(threads)}
        task.had_threads = threads > 1
        self.tasks[tgid] = task
        self.now += SECOND
        return task

    def _give(self, pid: int) -> None:
        """Return the next free PID in turn. None is reused within a second."""
        assert pid not in self.used()
        self.now = max(self.now, self._freed.get(pid, 0) + 1100 * MILLISECOND) + MICROSECOND

    def used(self) -> set[int]:
        """Return every PID and TID that is in use."""
        return {tid for task in self.tasks.values() for tid in (task.tgid, *task.threads)}

    def proc(self) -> dict[int, Process]:
        return {tgid: task.picture(self.now) for tgid, task in self.tasks.items()}

    def alive(self) -> dict[int, Task]:
        return {tgid: task for tgid, task in self.tasks.items() if not task.zombie}

    # What processes do. Each takes a microsecond; time passes between them by `wait`.

    def wait(self, ns: int) -> None:
        self.now += ns

    def fork(self, tgid: int, pid: int, by: int | None = None) -> Task:
        parent = self.tasks[tgid]
        by = by or next(iter(parent.threads))
        self._give(pid)
        child = replace(
            parent, tgid=pid, ppid=tgid, start_ns=self.now, comm=parent.threads[by], threads={pid: parent.threads[by]},
            had_threads=False, hook=parent.hook or tgid == self.own, executed=False,
        )  # fmt: skip
        self.tasks[pid] = child
        self._happened("fork", child, pid)
        self._say(Fork, parent_pid=by, parent_tgid=tgid, child_pid=pid, child_tgid=pid)
        return child

    def sibling(self, tgid: int, pid: int) -> Task:
        """clone(CLONE_PARENT) by a process: the child is the caller's in all but its parent, which its FORK names."""
        caller = self.tasks[tgid]
        child = self.fork(tgid, pid)
        child.ppid = caller.ppid
        self.truth.pop()
        self._happened("fork", child, pid)
        self.log.pop()
        self._say(Fork, parent_pid=caller.ppid, parent_tgid=caller.ppid, child_pid=pid, child_tgid=pid)
        return child

    def thread(self, tgid: int, tid: int, by: int | None = None) -> None:
        task = self.tasks[tgid]
        self._give(tid)
        task.threads[tid] = task.threads[by or next(iter(task.threads))]
        task.had_threads = True
        self._happened("fork", task, tid, of_process=False)
        self._say(Fork, parent_pid=task.ppid, parent_tgid=task.ppid, child_pid=tid, child_tgid=tgid)

    def exec(
        self,
        tgid: int,
        exe: str,
        by: int | None = None,
        cmdline: str | None = None,
        cgroup: str | None = None,
        loginuid: int | None = None,
    ) -> None:
        task = self.tasks[tgid]
        by = by or next(iter(task.threads))
        for tid in [t for t in task.threads if t != by]:
            self._end_thread(task, tid, 0, last=False)
        del task.threads[by]
        self._freed[by] = self.now
        comm = exe.rpartition("/")[2][:15]
        task.threads[tgid] = task.comm = comm
        task.exe, task.cmdline = exe, cmdline or exe
        if not task.executed:  # what starts it moves it and sets the session, as systemd does; no event reports either
            task.cgroup, task.executed = cgroup or task.cgroup, True
            task.loginuid = task.loginuid if loginuid is None else loginuid
        self.now += MICROSECOND
        self._happened("exec", task, tgid)
        self._say(Exec, process_pid=tgid, process_tgid=tgid)

    def rename(self, tgid: int, comm: str, tid: int | None = None) -> None:
        task, tid = self.tasks[tgid], tid or tgid
        self.now += MICROSECOND
        task.threads[tid] = comm
        if tid == tgid:
            task.comm = comm
        self._happened("comm", task, tid, of_process=tid == tgid, thread_comm=comm)
        self._say(Comm, process_pid=tid, process_tgid=tgid, comm=comm.encode("utf-8", "surrogateescape"))

    def set_ids(self, tgid: int, uid: int, gid: int, euid: int | None = None) -> None:
        """Set the ids of every thread, as glibc does. `euid`: the effective one, if it is another."""
        task = self.tasks[tgid]
        task.gid = gid
        for tid in task.threads:
            self.now += MICROSECOND
            self._happened("gid", task, tid, of_process=tid == tgid)
            self._say(Gid, process_pid=tid, process_tgid=tgid, rgid=gid, egid=gid)
        task.uid, task.euid = uid, uid if euid is None else euid
        for tid in task.threads:
            self.now += MICROSECOND
            self._happened("uid", task, tid, of_process=tid == tgid)
            self._say(Uid, process_pid=tid, process_tgid=tgid, ruid=uid, euid=task.euid)

    def setsid(self, tgid: int, tid: int | None = None) -> None:
        self.now += MICROSECOND
        self._happened("sid", self.tasks[tgid], tid or tgid)
        self._say(Sid, process_pid=tid or tgid, process_tgid=tgid)

    def ptrace(self, tgid: int, tracer: int, tid: int | None = None) -> None:
        self.now += MICROSECOND
        self._happened("ptrace", self.tasks[tgid], tid or tgid, of_process=(tid or tgid) == tgid)
        self._say(Ptrace, process_pid=tid or tgid, process_tgid=tgid, tracer_pid=tracer, tracer_tgid=tracer)

    def end_thread(self, tgid: int, tid: int, status: int = 0, reaped: bool = True) -> None:
        """End one thread. With the last one, the process ends with that thread's status."""
        task = self.tasks[tgid]
        if len(task.threads) == 1:
            self.exit(tgid, status, reaped=reaped)
        else:
            self._end_thread(task, tid, status, last=False)

    def exit(
        self,
        tgid: int,
        status: int,
        dumper: int | None = None,
        order: Iterable[int] = (),
        last: int | None = None,
        reaped: bool = True,
    ) -> None:
        """exit_group() or a fatal signal: every thread ends.

        `dumper`: the thread that dumps core; only its status shows it. `order`: every tid twice, first for its record
        and then for its event. `last`: the thread whose record is marked. `reaped`: the parent took the status before
        the last event was sent.
        """
        task = self.tasks[tgid]
        if dumper is not None:
            self.now += MICROSECOND
            self._happened("coredump", task, dumper)
            self._say(Coredump, process_pid=dumper, process_tgid=tgid, parent_pid=task.ppid, parent_tgid=task.ppid)
        tids = list(task.threads)
        order = list(order) or [tid for tid in tids for _ in range(2)]
        last = last or tids[-1]
        own = {tid: status | (0x80 if tid == dumper else 0) for tid in tids}
        whole = status | (0x80 if dumper is not None else 0)
        told = {tid: self._record(task, tid, own[tid], tid == last) for tid in tids}
        records = dict(told)
        for tid in order:
            self.now += MICROSECOND
            if tid in records:
                self._log(records.pop(tid))
                continue
            record = told[tid]
            task.threads.pop(tid)
            self._freed[tid] = self._freed[tgid] = self.now
            self._happened("exit", task, tid, own[tid], of_process=None, usage=record)
            if not task.threads:
                self._happened("exit", task, tid, whole, usage=told[last], only_process=True)
                task.zombie = True
                self._orphan(tgid)
                if reaped:
                    del self.tasks[tgid]
            parent = task.ppid if tgid in self.tasks else 0
            self._say(
                Exit, process_pid=tid, process_tgid=tgid, exit_code=own[tid], exit_signal=17, parent_pid=parent,
                parent_tgid=parent,
            )  # fmt: skip

    def reap(self, tgid: int) -> None:
        assert self.tasks[tgid].zombie
        del self.tasks[tgid]

    # The kernel's side.

    def _end_thread(self, task: Task, tid: int, status: int, last: bool) -> None:
        record = self._record(task, tid, status, last)
        self.now += MICROSECOND
        self._log(record)
        del task.threads[tid]
        self._freed[tid] = self.now
        self.now += MICROSECOND
        self._happened("exit", task, tid, status, of_process=None, usage=record)
        self._say(
            Exit, process_pid=tid, process_tgid=task.tgid, exit_code=status, exit_signal=17 if tid == task.tgid else -1,
            parent_pid=task.ppid, parent_tgid=task.ppid,
        )  # fmt: skip

    def _orphan(self, tgid: int) -> None:
        for task in self.tasks.values():
            if task.ppid == tgid:
                task.ppid = INIT

    def _record(self, task: Task, tid: int, status: int, last: bool) -> TaskRecord:
        lifetime_us = (self.now - task.start_ns) // 1000
        return TaskRecord(
            pid=tid, tgid=task.tgid, ppid=task.ppid, status=status, last=last, threaded=last and task.had_threads,
            comm=task.threads[tid], uid=task.uid, gid=task.gid, begin_time_s=1_700_000_000, lifetime_us=lifetime_us,
            cpu_time_us=task.tgid * 1000, max_rss_kib=task.tgid * 1024, read_bytes=0, write_bytes=0, minor_faults=0,
            major_faults=0, exe_device=DEVICE if task.exe else 0, exe_inode=inode_of(task.exe) if task.exe else 0,
        )  # fmt: skip

    def _say(self, kind: type, **fields: object) -> None:
        self._log(kind(what=WHAT[kind], cpu=self.now // MICROSECOND % 2, timestamp_ns=self.now, **fields))

    def _log(self, said) -> None:
        self.log.append(Entry(said, self.now, self.proc()))

    def _happened(
        self, kind, task, tid, status=None, of_process=True, usage=None, only_process=False, thread_comm=None
    ) -> None:
        """Append to the truth: for rules about processes, and for rules about threads."""
        process = task.picture(self.now)
        process.exe, process.cmdline = task.exe, task.cmdline
        above = []
        up = task
        while up.ppid in self.tasks:
            up = self.tasks[up.ppid]
            above.append(up.picture(self.now))
        common = {"status": status, "kernel_time_ns": self.now, "usage": usage, "ancestors": tuple(above)}
        common |= {"from_hook": task.hook}
        if of_process:
            self.truth.append(Occurrence(kind, process, tid, **common))
        if not only_process:
            comm = thread_comm or (usage.comm if usage else process.comm)
            self.truth.append(Occurrence(kind, replace(process, comm=comm), tid, of_thread=True, **common))


class MachineProcFs:
    """/proc of a machine: identity as of the current event, existence as of the drain of the batch.

    `executed`: the processes that executed a program in the current batch, as of their last exec. `of_threads`: those
    that a thread forked, as of their fork.
    """

    def __init__(self, proc: dict[int, Process]) -> None:
        self.proc = self.late = proc
        self.executed: dict[int, Process] = {}
        self.of_threads: dict[int, Process] = {}
        self.reads: list[int] = []

    def read(self, tgid: int, wanted: Wanted, source) -> Process | None:
        self.reads.append(tgid)
        born = self.of_threads.get(tgid) if wanted.ids else None  # else it is read for another reason
        found = self.executed.get(tgid) if source == "exec" else born or self.proc.get(tgid)
        return None if found is None else shown(found, wanted, source)

    def read_parent(self, tgid: int) -> Process | None:
        return self.read(tgid, Wanted(), "procfs")

    def zombie(self, tgid: int, ended_ns: int, wanted: Wanted) -> Process | None:
        found = self.late.get(tgid)
        is_it = found is not None and not found.threads and found.start_ns <= ended_ns
        return shown(found, Wanted(cgroup=wanted.cgroup, loginuid=wanted.loginuid), "zombie") if is_it else None

    def is_alive(self, tgid: int) -> bool:
        found = self.late.get(tgid)
        return found is not None and found.threads > 0

    is_ending = is_alive

    def scan(self, wanted: Wanted) -> list[Process]:
        return [shown(p, wanted, "procfs") for p in self.late.values() if p.threads]

    def scan_in_groups(self, wanted: Wanted, tgids: Iterable[int] | None = None) -> Iterator[list[Process]]:
        """Each process is a group, read when it is asked for."""
        for tgid in list(self.late) if tgids is None else tgids:
            if (found := self.late.get(tgid)) is not None and found.threads:
                yield [shown(found, wanted, "procfs")]


def shown(found: Process, wanted: Wanted, source) -> Process:
    """Return a process as procfs.py reads it: the wanted attributes, their source, the start truncated to a tick."""
    process = Process(
        found.tgid, found.ppid, found.start_ns // TICK_NS * TICK_NS, comm=found.comm, comm_source=source,
        threads=found.threads, counted_ns=found.counted_ns,
    )  # fmt: skip
    if wanted.ids:
        process.uid, process.gid, process.ids_source = found.uid, found.gid, source
    if wanted.ids or wanted.loginuid:
        process.more_ids = MoreIds(found.euid if wanted.ids else None, found.loginuid if wanted.loginuid else None)
    if wanted.exe:
        process.exe, process.image_source = found.exe, source
    if wanted.cmdline:
        process.cmdline, process.image_source = found.cmdline, source
    if wanted.cgroup:
        process.cgroup, process.cgroup_source = found.cgroup, source
    return process


class MachineFiles:
    """The files of a machine's programs (model.FileLookup), of which rules name some."""

    knows_all_named = True

    def __init__(self, named: Iterable[str], finds_others: bool) -> None:
        self._named, self._finds_others = frozenset(named), finds_others
        self._paths = {inode_of(path): path for path in (*IMAGES, *STANDING_IMAGES)}

    def find(self, file: FileId, comm: str | None, start_ns: int | None = None) -> FoundFile | None:
        path = self._paths[file.inode]
        is_named = path in self._named
        return FoundFile((path,), is_named, False) if is_named or self._finds_others else None

    def learn(self, process: Process) -> None:
        pass

    def is_replaced(self, path: str, file: FileId) -> bool:
        return False

    def is_same(self, one: FileId, other: FileId) -> bool | None:
        return one == other


class Unfolding(list):
    """A batch of events that moves the tracker's view of /proc to each event as it is taken."""

    def __init__(self, events: Iterable[Event], reader: MachineProcFs, views: dict[int, dict[int, Process]]) -> None:
        super().__init__(events)
        self._views, self._reader = views, reader
        execs = sorted((event[2], event[4]) for event in self if event[0] == WHAT[Exec])
        reader.executed = {tgid: views[at_ns][tgid] for at_ns, tgid in execs if tgid in views[at_ns]}
        forks = [(event[2], event[6]) for event in self if event[0] == WHAT[Fork] and event[3] != event[4]]
        reader.of_threads = {tgid: views[at_ns][tgid] for at_ns, tgid in forks if tgid in views[at_ns]}

    def __iter__(self):
        for event in super().__iter__():
            self._reader.proc = self._views[event[2]]
            yield event


# --- random legal histories

PIDS = range(100, 111)  # few, so that they are reused often
COMMS = ["sh", "ora_pmon_A", "ora_smon_B", "java", "a b) c", "x\ny"]
STANDING_IMAGES = ["/usr/lib/systemd/systemd", "/usr/sbin/cnprocd"]
IMAGES = ["/bin/sh", "/opt/db/ora_pmon_A", "/opt/db/ora_smon_B", "/usr/bin/java"]
CGROUPS = [None, None, "/system.slice/oracle.service", "/user.slice/u.scope"]
LOGINUIDS = [None, None, 0, 54]
CODES, SIGNALS = [0, 0, 1, 3, 5, 255], [9, 15, 6, 11]
OPERATIONS = """fork fork fork fork fork exec exec thread thread thread end_thread end_thread exit exit exit exit kill
crash early_leader early_leader rename rename_thread ids setsid ptrace reap wait wait_long""".split()


def many_steps(seed: int, length: int) -> list[tuple[str, int, int, int]]:
    """Return a long history from one number: hypothesis prefers short ones. A shorter one is a part of a longer."""
    chance = Random(seed)
    return [(chance.choice(OPERATIONS), *(chance.randrange(1000) for _ in range(3))) for _ in range(length)]


steps = st.builds(many_steps, st.integers(0, 2**32 - 1), st.integers(4, 80))


def live(machine: Machine, operations, lone_codes=(0,), spare=(), pace_ns=0) -> None:
    """Let the machine perform random legal operations. `spare`: PIDs that never end.

    `lone_codes`: exit codes of a thread that ends by itself. pthread_exit() gives 0; only a raw exit(2) gives another.
    `pace_ns`: time between operations.
    """
    spare = {INIT, *spare}
    for name, a, b, c in operations:
        alive = [tgid for tgid in sorted(machine.alive()) if tgid not in spare]
        everyone = [*alive, *spare]
        free = [pid for pid in PIDS if pid not in machine.used()]
        tgid = everyone[a % len(everyone)] if name == "fork" or not alive else alive[a % len(alive)]
        threads = list(machine.tasks[tgid].threads)
        tid, chance = threads[b % len(threads)], Random(c)
        machine.wait(pace_ns)
        if name == "fork" and free:
            machine.fork(tgid, free[c % len(free)], by=tid)
        elif name == "wait":
            machine.wait(a * 10 * MILLISECOND)
        elif name == "wait_long":
            machine.wait(3 * SECOND)
        elif name == "reap" and (zombies := [t for t in machine.tasks if machine.tasks[t].zombie]):
            machine.reap(zombies[a % len(zombies)])
        elif tgid in spare:
            continue
        elif name == "exec":
            cgroup, loginuid = CGROUPS[a % len(CGROUPS)], LOGINUIDS[b % len(LOGINUIDS)]
            machine.exec(tgid, IMAGES[c % len(IMAGES)], by=tid, cgroup=cgroup, loginuid=loginuid)
        elif name == "thread" and free:
            machine.thread(tgid, free[c % len(free)], by=tid)
        elif name == "early_leader" and free and tgid in threads:
            machine.thread(tgid, free[c % len(free)], by=tid)
            machine.end_thread(tgid, tgid, lone_codes[c % len(lone_codes)] << 8)
        elif name == "end_thread":
            machine.end_thread(tgid, tid, lone_codes[c % len(lone_codes)] << 8)
        elif name in ("exit", "kill", "crash"):
            _end(machine, tgid, name, tid, chance)
        elif name in ("rename", "rename_thread"):
            machine.rename(tgid, COMMS[c % len(COMMS)], tid=tgid if name == "rename" and tgid in threads else tid)
        elif name == "ids" and tgid in threads:
            task, euid = machine.tasks[tgid], [None, 0, 54][c % 3]
            # Without privilege a process gets only ids that it has.
            may_have = 0 in (task.uid, task.euid) or euid in (task.uid, task.euid)
            machine.set_ids(tgid, [0, 54, 1000][a % 3], [0, 55][b % 2], euid=euid if may_have else None)
        elif name == "setsid":
            machine.setsid(tgid, tid)
        elif name == "ptrace":
            machine.ptrace(tgid, INIT, tid)


def _end(machine: Machine, tgid: int, name: str, tid: int, chance: Random) -> None:
    tids = list(machine.tasks[tgid].threads)
    order = [tid for tid in tids for _ in range(2)]
    chance.shuffle(order)
    status = (
        chance.choice(CODES) << 8 if name == "exit" else chance.choice(SIGNALS[:2] if name == "kill" else SIGNALS[2:])
    )
    machine.exit(
        tgid, status, dumper=tid if name == "crash" else None, order=order, last=chance.choice(tids),
        reaped=chance.random() < 0.7,
    )  # fmt: skip


def batches(
    log: list[Entry], cuts: list[int], ahead: list[int]
) -> list[tuple[list[Entry], list[Entry], dict[int, Process]]]:
    """Return the log as drains see it: (events, records, /proc at the end).

    `cuts` are the ends of drains of events; `ahead` is how many more entries there were when records were drained next.
    No PID is used twice within one drain: a drain has hundreds of events, not tens of thousands.
    """
    again, seen = [], set()
    for n, entry in enumerate(log):
        if isinstance(entry.said, Fork):
            again += [n] * (entry.said.child_pid in seen)
            seen.add(entry.said.child_pid)
    ends = sorted({min(cut, len(log)) for cut in [*cuts, *again]} | {len(log)})
    found, events_from, records_from = [], 0, 0
    for n, end in enumerate(ends):
        most = next((cut for cut in again if cut >= end), len(log))
        upto = max(records_from, min(most, end + (ahead[n % len(ahead)] if ahead else 0)))
        events = [entry for entry in log[events_from:end] if not entry.is_record]
        records = [entry for entry in log[records_from:upto] if entry.is_record]
        found.append((events, records, log[upto - 1].proc if upto else {}))
        events_from, records_from = end, upto
    return found


@dataclass(frozen=True)
class Unread:
    """The times of events whose program no read of /proc shows any more, because another exec or comm came too soon."""

    execs: set[int]  # another exec of the process follows in the same drain
    forks: set[int]  # an exec of the child follows in the same drain
    forks_by_threads: set[int]  # the child has the comm of a thread, which only a read shows


def unread(drains: list[list[Event]]) -> Unread:
    """Return what cannot be read. `drains`: the events of each."""
    found = Unread(set(), set(), set())
    for events in drains:
        last: dict[int, int] = {}
        for event in sorted(events, key=lambda one: one.timestamp_ns):
            if isinstance(event, Exec):
                last[event.process_tgid] = event.timestamp_ns
        for event in events:
            at_ns = event.timestamp_ns
            if isinstance(event, Exec) and at_ns < last[event.process_tgid]:
                found.execs.add(at_ns)
            elif isinstance(event, Fork):
                if at_ns < last.get(event.child_tgid, 0):
                    found.forks.add(at_ns)
                if event.parent_pid != event.parent_tgid:
                    found.forks_by_threads.add(at_ns)
    return found


def as_read(truth: list[Occurrence], unread: Unread) -> list[Occurrence]:
    """Return what can be known of what happened.

    Of a process whose exec could not be read only a new comm is known, until the next exec. Its children inherit this
    if its comm is known; else they are read.
    """
    vague: dict[int, dict[str, str | None]] = {}  # tgid -> its attributes
    found = []
    for one in truth:
        process, tgid, at_ns = one.process, one.process.tgid, one.kernel_time_ns
        if one.kind == "exec" and not one.of_thread:
            vague.pop(tgid, None)
            if at_ns in unread.execs:
                vague[tgid] = {"comm": None, "exe": None, "cmdline": None}
        elif one.kind == "fork" and not one.of_thread:
            vague.pop(tgid, None)
            inherited = dict(vague.get(process.ppid, {}))
            if at_ns in unread.forks_by_threads:
                inherited["comm"] = None
            if "comm" in inherited and inherited["comm"] is None and at_ns not in unread.forks:
                inherited = {}  # the child is read
            if inherited:
                vague[tgid] = inherited
        elif one.kind == "comm" and tgid in vague and one.tid == tgid:
            vague[tgid]["comm"] = process.comm
        if one.kind != "exit":
            known = vague.get(tgid, {})
            if one.kind == "comm":  # the event names it, also that of a thread
                known = known | {"comm": process.comm} if known else known
            process = replace(process, **known)
        found.append(replace(one, process=process))
    return found


def living(table: Table) -> set[int]:
    """Return the PIDs of all processes that the table believes alive."""
    return {tgid for tgid, process in table._processes.items() if process.ended_ns is None}
