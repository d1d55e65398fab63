"""Without exit records no event is marked as the last thread's: find the end of a process by counting threads. PURE.

The table counts the threads of each process. A scan in a storm can make the count wrong by one, so /proc is read before
a process that had threads is reported. `sweep` finds the processes whose leader ended first.
"""

from __future__ import annotations

from collections.abc import Callable

from cnprocd.connector.event import Exit
from cnprocd.process.evidence import StatusEvidence
from cnprocd.process.model import Process, ProcLookup, Wanted
from cnprocd.process.table import KEEP_NS, Table, same_process


class ThreadCount:
    """Which exit event is a process's last."""

    def __init__(self, table: Table, procfs: ProcLookup) -> None:
        self._table = table
        self._procfs = procfs
        self._evidence: dict[int, StatusEvidence] = {}  # tgid -> of its threads so far
        self._leaderless: dict[int, Exit] = {}  # tgid -> its leader's exit
        self._dead_leaderless: set[int] = set()

    def executed(self, tgid: int) -> None:
        """The thread that called exec is the leader and the only thread now."""
        self._evidence.pop(tgid, None)
        self._leaderless.pop(tgid, None)

    def exited(self, event: Exit) -> Process | None:
        """Take the exit of a thread. Return the process, if this was its last one and it was not returned before."""
        tgid = event.process_tgid
        so_far = self._evidence.get(tgid)
        self._evidence[tgid] = so_far.after(event) if so_far is not None else StatusEvidence.of(event)
        process = self._table.thread_exit(event)
        if process is not None and process.ended_ns is not None:
            return None
        if process is not None and process.threaded and self._lives_on(process):
            return None
        if process is None:
            if event.process_pid == tgid:
                self._leaderless[tgid] = event  # its threads go on, or the count is wrong: `sweep` finds out
            if self._table.get(tgid, event.timestamp_ns) is not None or self._procfs.is_alive(tgid):
                return None
            process = Process(tgid, event.parent_tgid or None)
            self._table.enter(process)  # so that it is reported once, not for each of its threads
        self._leaderless.pop(tgid, None)
        return process

    def take_status(self, event: Exit) -> int:
        """Return the wait status of a process that `exited` or `sweep` returned for this event."""
        evidence = self._evidence.pop(event.process_tgid, None)
        return evidence.status if evidence is not None else event.exit_code

    def sweep(self, now_ns: int, is_alive: Callable[[int], bool]) -> list[tuple[Process, Exit]]:
        """Return the processes whose leader ended with this event and whose other threads ended uncounted."""
        found: list[tuple[Process, Exit]] = []
        gone: set[int] = set()  # the exit of its last thread may still be in the queue: until the next sweep
        for tgid, event in list(self._leaderless.items()):
            process = self._table.get(tgid, event.timestamp_ns)
            if process is None:
                del self._leaderless[tgid]
            elif event.timestamp_ns < now_ns - KEEP_NS and not is_alive(tgid):
                if tgid in self._dead_leaderless:
                    del self._leaderless[tgid]
                    found.append((process, event))
                gone.add(tgid)
        self._dead_leaderless = gone
        return found

    def _lives_on(self, process: Process) -> bool:
        fresh = self._procfs.read(process.tgid, Wanted(), "procfs")
        if fresh is None:
            return self._procfs.is_alive(process.tgid)  # its other files may not answer
        if not fresh.threads or not same_process(process, fresh):
            return False
        process.threads, process.counted_ns = fresh.threads, fresh.counted_ns
        return True
