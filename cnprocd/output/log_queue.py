"""The queue between the daemon and its log output. It never waits, is bounded, and counts what it drops.

A record is written at once if the output has room; those of one batch of events together. Else it waits in the queue,
in order, and is written when there is room again. A record that does not fit in the queue is dropped and counted; as
soon as the queue is empty again the counts are reported. A rule whose matches fill its share of the queue loses its
further ones, so that they cost no other rule's records: a quarter, and less if the matches of many rules wait, because
there must be room for one rule more. An output that is broken (a pipe without a reader, no journald) is tried again
every second.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from cnprocd.edge import EdgeState
from cnprocd.output.sink import FileSink, Sink

MOST_BYTES = 4 << 20
MOST_OF_A_RULE = MOST_BYTES // 4
AGAIN_S = 1.0  # after an error of the output
_PIECE_BYTES = 64 * 1024


@dataclass(slots=True)
class Lost:
    """Records that were dropped: all of them, the matches among them, and those by rule."""

    records: int = 0
    matches: int = 0
    by_rule: Counter[str] = field(default_factory=Counter)

    def add(self, rule: str | None) -> None:
        self.records += 1
        if rule is not None:
            self.matches += 1
            self.by_rule[rule] += 1


class _Entry(NamedTuple):
    data: bytes
    rule: str | None  # of a match


class LogQueue:
    """Writes records to a sink, in order."""

    def __init__(self, sink: Sink, report: Callable[[Lost], None]) -> None:
        """`report` logs what was lost, through this queue."""
        self.lost = Lost()  # since start
        self._sink = sink
        self._report = report
        self._unreported = Lost()
        self._entries: deque[_Entry] = deque()
        self._written = 0  # bytes of the first entry that are written
        self._bytes = 0  # of all entries
        self._bytes_of: Counter[str] = Counter()  # by rule
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_waiting = False
        self._is_held = False
        self._held: list[_Entry] = []  # records since `hold`
        self._held_bytes = 0

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use an event loop to wait for room."""
        self._loop = loop
        if isinstance(self._sink, FileSink):
            self._sink.attach(loop)
        self.flush()

    @property
    def edge(self) -> EdgeState | None:
        """The worker that writes, if the sink has one."""
        return self._sink.edge if isinstance(self._sink, FileSink) else None

    @property
    def queued(self) -> int:
        """Records that wait."""
        return len(self._entries) + len(self._held)

    def add(self, data: bytes, rule: str | None = None) -> None:
        """Write an encoded record, or queue it, or drop and count it. `rule`: of a match.

        Raises OSError: the output is broken, and nothing has been done about the record.
        """
        if self._is_held and self._held_bytes + len(data) > _PIECE_BYTES:
            self.release()
            self.hold()
        if self._is_held:
            self._held.append(_Entry(data, rule))
            self._held_bytes += len(data)
            return
        if not self._entries:
            try:
                taken = self._sink.put(data)
            except BlockingIOError:
                taken = 0
            if taken == len(data):
                self._report_lost()
                return
            self._written = taken
        elif self._is_full(len(data), rule):
            self.drop(rule)
            return
        self._append(_Entry(data, rule))
        self._wait()

    def hold(self) -> bool:
        """Write nothing until `release`, so that many records are one piece. Return whether that is of use now."""
        self._is_held = self._sink.joins and not self._entries
        return self._is_held

    def release(self) -> None:
        """Write what was added since `hold`, in one call if there is room. If the output is broken, it is dropped."""
        held, self._held = self._held, []
        self._is_held, self._held_bytes = False, 0
        piece = b"".join([entry.data for entry in held])
        try:
            taken = self._sink.put(piece) if piece else 0
        except BlockingIOError:
            taken = 0
        except OSError:
            for _, rule in held:
                self.drop(rule)
            return
        if taken == len(piece):
            self._report_lost()
            return
        for entry in held:  # one piece at most, and nothing else waits, so there is room
            self._append(entry)
        self._take(taken)
        try:
            self._write()
        except OSError:
            for _, rule in self._entries:
                self.drop(rule)
            self._entries.clear()
            self._bytes_of.clear()
            self._bytes = self._written = 0

    def _append(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self._bytes += len(entry.data)
        if entry.rule is not None:
            self._bytes_of[entry.rule] += len(entry.data)

    def drop(self, rule: str | None) -> None:
        """Count a record that cannot be written."""
        self.lost.add(rule)
        self._unreported.add(rule)

    def flush(self) -> None:
        """Write what waits, as far as there is room."""
        self._is_waiting = False
        try:
            self._write()
        except OSError:
            if self._loop is not None:
                self._loop.call_later(AGAIN_S, self.flush)  # poll(2) would show it as writable

    async def close(self, bound_s: float) -> int:
        """Write what waits, for at most so long, and close the sink. Returns how many records were not written."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + bound_s
        while self._entries and loop.time() < deadline_s:
            await asyncio.sleep(0.005)
            self.flush()
        self._sink.close()
        return len(self._entries)

    def _write(self) -> None:
        """Write the queue as far as there is room, then report what was lost. Raises OSError: the output is broken."""
        try:
            while self._entries:
                self._take(self._sink.put(self._piece()))
        except BlockingIOError:
            self._wait()
        else:
            self._report_lost()

    def _is_full(self, size: int, rule: str | None) -> bool:
        if rule is None or rule not in self._bytes_of:
            return self._bytes + size > MOST_BYTES
        share = min(MOST_OF_A_RULE, MOST_BYTES // (len(self._bytes_of) + 1))
        return self._bytes + size > MOST_BYTES or self._bytes_of[rule] + size > share

    def _piece(self) -> bytes:
        """Return the bytes to write next: the rest of the first record, and more records if the sink joins them."""
        first = self._entries[0].data[self._written :]
        if not self._sink.joins or len(first) >= _PIECE_BYTES:
            return first
        parts, size = [first], len(first)
        for position in range(1, len(self._entries)):
            data = self._entries[position].data
            size += len(data)
            if size > _PIECE_BYTES:
                break
            parts.append(data)
        return b"".join(parts)

    def _take(self, count: int) -> None:
        """So many bytes from the front are written."""
        count += self._written
        while self._entries and count >= len(self._entries[0].data):
            data, rule = self._entries.popleft()
            count -= len(data)
            self._bytes -= len(data)
            if rule is not None:
                self._bytes_of[rule] -= len(data)
                if not self._bytes_of[rule]:
                    del self._bytes_of[rule]
        self._written = count

    def _report_lost(self) -> None:
        if self._unreported.records:
            lost, self._unreported = self._unreported, Lost()
            self._report(lost)

    def _wait(self) -> None:
        if self._loop is not None and not self._is_waiting:
            self._is_waiting = True
            self._sink.when_ready(self._loop, self.flush)
