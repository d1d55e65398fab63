"""A process with its attributes, and an occurrence: an event joined with the process it is about. PURE.

Every attribute may be None: unknown. Beside it stands its provenance: accounted by the kernel (`taskstats`), carried by
an event (`event`), read at exec (`exec`), later (`procfs`) or of the zombie (`zombie`), or `unknown`. Text is str with
undecodable bytes as lone surrogates (PEP 383). A process chooses its comm itself, up to 15 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.process.cgroup_path import Placement, placement_of
from cnprocd.process.files import FileId, FoundFile

Provenance = Literal["taskstats", "event", "exec", "procfs", "zombie", "unknown"]
Kind = Literal["fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "coredump", "exit"]
KINDS_OF_LASTING_COMM: frozenset[Kind] = frozenset({"exec", "coredump", "exit"})
"""Events after which /proc still shows the program of that moment. After the others an exec often follows."""
OomUnknown = Literal["lost", "unreadable"]
"""Lines of the kernel's log were lost, or it cannot be read."""
TICK_NS = 10_000_000
"""Start times from /proc are in ticks of 1/100 s (USER_HZ is 100 on every architecture Linux runs on today)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which attributes to read from /proc: each costs about 15 microseconds. comm and ppid are always read."""

    ids: bool = False
    exe: bool = False
    cmdline: bool = False
    cgroup: bool = False
    loginuid: bool = False


EVERYTHING = Wanted(ids=True, exe=True, cmdline=True, cgroup=True, loginuid=True)
NO_LOGIN = 0xFFFFFFFF
"""The login uid of a process outside any login session (loginuid in proc_pid_loginuid(5))."""


class MoreIds(NamedTuple):
    """User ids beside the real one."""

    euid: int | None = None
    loginuid: int | None = None  # or NO_LOGIN


_NO_MORE_IDS = MoreIds()


class Image(NamedTuple):
    """What is known of a process's program beside its path and arguments."""

    claimed: str | None = None  # what /proc/PID/exe shows, without the kernel's mark of a deleted file
    is_deleted: bool | None = None
    file: FileId | None = None
    links: tuple[str, ...] = ()  # other paths of the same file, if rules name them
    cmdline_is_cut: bool = False  # `cmdline` is only the beginning of the arguments
    exe_source: Provenance | None = None  # of exe, if it is not that of cmdline


_NO_IMAGE = Image()


@dataclass(slots=True)
class Process:
    """One process (thread group) of the host's initial PID namespace.

    `start_ns` is CLOCK_MONOTONIC; from /proc it is exact to a tick, from a fork event to the microsecond. `threads`
    counts live threads, if the plan has them counted. `ended_ns` is set by the exit event of the leader.
    """

    tgid: int
    ppid: int | None = None
    start_ns: int | None = None
    comm: str | None = None
    comm_source: Provenance = "unknown"
    uid: int | None = None  # real
    gid: int | None = None  # real
    ids_source: Provenance = "unknown"
    exe: str | None = None
    cmdline: str | None = None
    cgroup: str | None = None
    image_source: Provenance = "unknown"  # of cmdline, and of exe if `image` names none
    cgroup_source: Provenance = "unknown"
    image: Image | None = None  # more about exe and cmdline
    more_ids: MoreIds | None = None
    unconfirmed: bool = False  # its ids, and what depends on them, are from its fork alone: see inheritance.py
    threads: int = 1
    threaded: bool = False  # ever had more than one
    counted_ns: int = 0  # events before this time are already counted in `threads`
    ended_ns: int | None = None
    in_doubt: bool = False  # an event that may have changed it was lost: see doubt.py
    exe_is_unnamed: bool = False  # the file is known, and no rule names its path literally
    is_shared: bool = field(default=False, compare=False)  # births in the table refer to it: change a copy instead

    def child(self, tgid: int, start_ns: int) -> Process:
        """Return the process after fork: all of its parent but PID and threads. (A third of replace()'s cost.)"""
        child = Process(
            tgid, self.tgid, start_ns, self.comm, self.comm_source, self.uid, self.gid, self.ids_source, self.exe,
            self.cmdline, self.cgroup, self.image_source, self.cgroup_source, self.image, self.more_ids, True,
        )  # fmt: skip
        child.in_doubt = self.in_doubt
        child.forget_no_login()
        return child

    @property
    def euid(self) -> int | None:
        """The effective uid."""
        return self.more_ids.euid if self.more_ids is not None else None

    @property
    def loginuid(self) -> int | None:
        """The uid of the login session, or NO_LOGIN."""
        return self.more_ids.loginuid if self.more_ids is not None else None

    def forget_no_login(self) -> None:
        """Any process outside a session may begin one without an event: that it is outside was not read of this one."""
        if self.more_ids is not None and self.more_ids.loginuid == NO_LOGIN:
            self.more_ids = MoreIds(self.more_ids.euid)

    @property
    def exe_claimed(self) -> str | None:
        """What /proc/PID/exe shows, without the kernel's mark of a deleted file. A user can choose it."""
        return self.image.claimed if self.image is not None else None

    @property
    def exe_deleted(self) -> bool | None:
        """Whether the path of the program leads to another file by now, or to none."""
        return self.image.is_deleted if self.image is not None else None

    @property
    def exe_file(self) -> FileId | None:
        """The file of the program."""
        return self.image.file if self.image is not None else None

    @property
    def exe_source(self) -> Provenance:
        """Where the path of the program is from."""
        return self.image.exe_source or self.image_source if self.image is not None else self.image_source

    @property
    def placement(self) -> Placement | None:
        """The unit, container and pod; None if the cgroup is unknown."""
        return None if self.cgroup is None else placement_of(self.cgroup)

    def take_identity(self, other: Process) -> None:
        """Take comm, ids, exe, cmdline and cgroup of `other`, each with its provenance."""
        self.comm, self.comm_source = other.comm, other.comm_source
        self.uid, self.gid, self.ids_source = other.uid, other.gid, other.ids_source
        self.more_ids = other.more_ids
        self.take_image(other, other.image_source)
        self.cgroup, self.cgroup_source = other.cgroup, other.cgroup_source

    def take_image(self, other: Process, provenance: Provenance) -> None:
        """Take the executable and the arguments of `other`."""
        self.exe, self.cmdline, self.image, self.image_source = other.exe, other.cmdline, other.image, provenance

    def take_cmdline(self, cmdline: str | None, is_cut: bool, provenance: Provenance) -> None:
        """Take the arguments, or their beginning."""
        if self.exe is not None and provenance != self.image_source:
            self.image = (self.image or _NO_IMAGE)._replace(exe_source=self.exe_source)
        self.cmdline, self.image_source = cmdline, provenance
        if is_cut is not self.cmdline_is_cut:
            self.image = (self.image or _NO_IMAGE)._replace(cmdline_is_cut=is_cut)

    @property
    def cmdline_is_cut(self) -> bool:
        """Whether `cmdline` is only the beginning of the arguments."""
        return self.image is not None and self.image.cmdline_is_cut

    def forget_image(self) -> None:
        """Another program was executed, and nothing is known of it."""
        self.exe = self.cmdline = self.image = None
        self.image_source = "unknown"

    def take_executed_file(self, file: FileId, found: FoundFile | None) -> None:
        """Take the file that the exit record names, and its path if it is known."""
        image = self.image or _NO_IMAGE
        if image.file is None:
            image = image._replace(file=file)
        if found is not None:
            self.exe = self.exe if self.exe in found.paths else found.paths[0]
            links = tuple(path for path in found.paths if path != self.exe)
            image = image._replace(links=links, is_deleted=found.is_deleted, exe_source="taskstats")
        self.image = image

    def take_replacement(self) -> None:
        """The path of the executable leads to another file by now, or to none."""
        self.image = (self.image or _NO_IMAGE)._replace(is_deleted=True)

    def take_ids(self, other: Process | TaskRecord, provenance: Provenance) -> None:
        """Take the real uid and gid of `other`."""
        self.uid, self.gid, self.ids_source = other.uid, other.gid, provenance

    def take_user_ids(self, uid: int, euid: int) -> None:
        """Take the real and effective uid of an event."""
        self.uid, self.ids_source = uid, "event"
        self.more_ids = MoreIds(euid, self.loginuid)

    def with_user_ids(self, uid: int, euid: int, by_exec: bool) -> Process:
        """Return the process with these real and effective uids: itself, or a copy if it differs.

        `by_exec`: it may execute another program by now, of which nothing is known.
        """
        if (self.uid, self.euid) == (uid, euid) and not by_exec:
            return self
        changed = self.without_program() if by_exec else replace(self, is_shared=False)
        changed.take_user_ids(uid, euid)
        return changed

    def without_program(self) -> Process:
        """Return a copy of which the comm, the executable and the arguments are unknown."""
        copy = replace(self, is_shared=False)
        copy.forget_program()
        return copy

    def forget_program(self) -> None:
        """The process may execute another program by now, of which nothing is known."""
        self.comm, self.comm_source = None, "unknown"
        self.forget_image()

    def forget_inherited(self) -> None:
        """Another process than its parent may have forked it: its user, program and cgroup are unknown."""
        self.unconfirmed = False
        self.uid = self.gid = self.more_ids = None
        self.ids_source = "unknown"
        self.cgroup, self.cgroup_source = None, "unknown"
        self.forget_image()

    def confirm(self, uid: int) -> None:
        """Keep what was inherited if the real uid of the process is that of its parent."""
        if self.uid != uid:
            self.forget_inherited()
        self.unconfirmed = False

    def take_more_ids(self, fresh: Process) -> None:
        """Take each id of `fresh` that is known there."""
        if fresh.more_ids is not None:
            known = {name: one for name, one in fresh.more_ids._asdict().items() if one is not None}
            self.more_ids = (self.more_ids or _NO_MORE_IDS)._replace(**known)

    def take_comm(self, other: Process | TaskRecord, provenance: Provenance) -> None:
        """Take the comm of `other`."""
        self.comm, self.comm_source = other.comm, provenance

    def take_exit_records(self, last: TaskRecord | None, leader: TaskRecord | None, ended_ns: int | None) -> None:
        """Take what the kernel accounted at the death: the ids, the parent, the leader's comm and an unknown start."""
        identity = leader or last
        if identity is not None:
            if self.unconfirmed:
                self.confirm(identity.uid)
            self.uid, self.gid, self.ids_source = identity.uid, identity.gid, "taskstats"
            self.ppid = (last or identity).ppid or self.ppid  # no event reports a change of parent
        if leader is not None:
            self.comm, self.comm_source = leader.comm, "taskstats"
        if self.start_ns is None and last is not None and ended_ns is not None:
            self.start_ns = ended_ns - last.lifetime_us * 1000

    def fill_unknown(self, fresh: Process, comm: bool = True) -> None:
        """Take from `fresh` each group of attributes that is unknown here; the comm only if `comm`."""
        if comm and self.comm is None:
            self.comm, self.comm_source = fresh.comm, fresh.comm_source
        if self.uid is None:
            self.uid, self.gid, self.ids_source = fresh.uid, fresh.gid, fresh.ids_source
        if self.exe is None and (fresh.exe is not None or fresh.image is not None):
            is_cut = self.cmdline_is_cut
            self.exe, self.image = fresh.exe, (fresh.image or _NO_IMAGE)._replace(exe_source=fresh.exe_source)
            if self.cmdline is not None:
                self.image = self.image._replace(cmdline_is_cut=is_cut)
        if self.cmdline is None:
            self.take_cmdline(fresh.cmdline, fresh.cmdline_is_cut, fresh.image_source)
        if self.cgroup is None:
            self.cgroup, self.cgroup_source = fresh.cgroup, fresh.cgroup_source
        if self.ppid is None:
            self.ppid = fresh.ppid
        if self.more_ids is None:
            self.more_ids = fresh.more_ids

    def take_newer(self, fresh: Process) -> None:
        """Take from `fresh`, which was read of the same process later, each attribute that is known there."""
        if fresh.comm is not None:
            self.comm, self.comm_source = fresh.comm, fresh.comm_source
        if fresh.uid is not None:
            if self.unconfirmed:
                self.confirm(fresh.uid)
            self.take_ids(fresh, fresh.ids_source)
        self.take_more_ids(fresh)
        if fresh.cgroup is not None:
            self.cgroup, self.cgroup_source = fresh.cgroup, fresh.cgroup_source
        if fresh.image is not None and fresh.image.file is not None:
            if fresh.exe is not None or fresh.image.file != self.exe_file:
                self.exe = fresh.exe
            self.image, self.image_source = fresh.image, fresh.image_source
        elif fresh.exe is not None:
            self.exe, self.image, self.image_source = fresh.exe, fresh.image, fresh.image_source
        if fresh.cmdline is not None:
            self.take_cmdline(fresh.cmdline, fresh.cmdline_is_cut, fresh.image_source)

    def set_provenance(self, provenance: Provenance) -> None:
        """Name one provenance for every attribute."""
        self.comm_source = self.ids_source = self.image_source = self.cgroup_source = provenance

    def provenance(self) -> dict[str, Provenance]:
        """Return the provenance of each attribute; `unknown` if it is None."""
        by_attribute: dict[str, Provenance] = {
            "comm": self.comm_source,
            "uid": self.ids_source,
            "gid": self.ids_source,
            "euid": self.ids_source,
            "exe": self.exe_source,
            "cmdline": self.image_source,
            "cgroup": self.cgroup_source,
        }
        return {name: source if getattr(self, name) is not None else "unknown" for name, source in by_attribute.items()}


class ProcLookup(Protocol):
    """What may be asked of /proc about one process. procfs.py reads the real one; none of these raises."""

    def read(self, tgid: int, wanted: Wanted, source: Provenance) -> Process | None:
        """Return the process as /proc shows it now, or None if it is gone. `source` becomes its provenance."""

    def read_parent(self, tgid: int) -> Process | None:
        """Return the parent of a process that matched: its PID, start, parent, and its name of now."""

    def is_alive(self, tgid: int) -> bool:
        """Return whether any thread of the process still runs."""

    def is_ending(self, tgid: int) -> bool:
        """Return whether a process whose last exit record was made may still be on its way to its exit event."""

    def zombie(self, tgid: int, ended_ns: int, wanted: Wanted) -> Process | None:
        """Return a process that ended and is not reaped yet, with its cgroup and login session if they are wanted."""


class FileLookup(Protocol):
    """What may be asked about the files of programs. file_names.py answers; none of these raises."""

    @property
    def knows_all_named(self) -> bool:
        """Whether a file that is not found as a named one is none of the paths that rules name."""

    def find(self, file: FileId, comm: str | None, start_ns: int | None = None) -> FoundFile | None:
        """Return the paths of a file that an exit record names, or None.

        `comm`: what the process was called. `start_ns`: when it started (CLOCK_MONOTONIC).
        """

    def learn(self, process: Process) -> None:
        """Take the verified path of a running process."""

    def is_replaced(self, path: str, file: FileId) -> bool:
        """Whether a path that led to this file leads to another one by now, or to none, as stat(2) shows."""

    def is_one_program(self, file: FileId) -> bool:
        """Whether all processes whose exit record names this file run a program with the same path."""

    def is_same(self, one: FileId, other: FileId) -> bool | None:
        """Whether two identities are one file; None if an identity does not name one file here."""


class ProcScan(ProcLookup, Protocol):
    """What may be asked of /proc about all processes of the machine."""

    def scan(self, wanted: Wanted) -> Iterable[Process]:
        """Return every process that is alive now."""

    def scan_in_groups(self, wanted: Wanted, tgids: Iterable[int] | None = None) -> Iterator[Sequence[Process]]:
        """Yield the living ones of these processes, or of all. Those of a group were read at the same time, just now.

        The caller may evaluate events between two groups, but not within one: then it would be out of date.
        """

    def user_name(self, uid: int) -> str | None:
        """Return the name of a user, the number of one without a name, or None if no answer came in time."""


@dataclass(slots=True)
class Occurrence:
    """An event joined with the process it is about, or with the thread if a rule asked for threads.

    `status` is the wait status of an exit, as waitpid() returns it; None on an exit means that no source reported it
    (`recovered`). `kernel_time_ns` (CLOCK_MONOTONIC) and `cpu` are None if no event carried them.
    """

    kind: Kind
    process: Process
    tid: int
    status: int | None = None
    kernel_time_ns: int | None = None
    cpu: int | None = None
    recovered: bool = False
    of_thread: bool = False
    usage: TaskRecord | None = None
    ancestors: tuple[Process, ...] | None = None  # parent first; None: unknown
    from_hook: bool = False
    reaped: bool = False  # the process had left /proc when the kernel sent the exit
    oom: bool | OomUnknown | None = None  # whether the kernel's OOM killer ended the process, or why it is unknown
    details: dict[str, int] | None = None  # fields that only this kind of event carries

    @property
    def oom_killed(self) -> bool | None:
        """Whether the kernel's OOM killer ended the process; None: unknown, or not an exit."""
        return self.oom if isinstance(self.oom, bool) else None

    @property
    def lifetime_s(self) -> float | None:
        """Seconds from the process's start to this event; None if either is unknown."""
        if self.usage is not None and self.kind == "exit":
            return self.usage.lifetime_us / 1e6
        if self.process.start_ns is None or self.kernel_time_ns is None:
            return None
        return max(0, self.kernel_time_ns - self.process.start_ns) / 1e9
