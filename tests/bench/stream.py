"""A fixed stream of kernel events, generated: the same bytes on every machine and in every run.

Shells of four names fork children one after the other. Every tenth execs, every 101st fails, all are reaped at once.
Batches are as full as the receive slots. The bytes are laid out by the C structs of the tests (unit/connector/wire.py),
so that stages and instruction guard do not measure this file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from unit.connector import wire

from cnprocd.connector.decode import SLOT_SIZE, Rejects, rows
from cnprocd.connector.event import Row
from cnprocd.connector.request import Features
from cnprocd.connector.taskrecord import RECORD_SLOT_SIZE, ReadRecords, RecordReader
from cnprocd.process.model import Process, Provenance, Wanted
from cnprocd.process.tracker import Tracker
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleFileModel
from cnprocd.rules.plan import make_plan

FAMILY = 27
BATCH_EVENTS = 512
NAMES = ("worker-a", "worker-b", "worker-c", "worker-d")
_FIRST, _SHELLS = 10_000, 500
_PID_SPAN = 20_000
_BEGAN_NS = 1_000_000_000_000


@dataclass
class Batch:
    """One drain: connector slots and exit records, as bytes."""

    slots: memoryview
    messages: memoryview  # in slots of RECORD_SLOT_SIZE
    lengths: list[int]  # of the messages


def stream(processes: int, records: bool = True) -> tuple[list[Batch], int]:
    """Return the batches of `processes` processes, and the number of events in them."""
    batches, slots, messages, events = list[Batch](), list[bytes](), list[bytes](), 0
    for i in range(processes):
        told, record = life(i, i * 50_000)
        slots += [slot(event, events + n) for n, (_, event) in enumerate(told)]
        events += len(told)
        if records:
            messages.append(record)
        if len(slots) >= BATCH_EVENTS - 3 or i == processes - 1:
            batches.append(batch(slots, messages))
            slots, messages = [], []
    return batches, events


def life(number: int, after_ns: int, cpu: int = 0) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return the events of one process, each with its time, and its exit record."""
    at, pid, parent = _BEGAN_NS + after_ns, _FIRST + number % _PID_SPAN, _SHELLS + number % len(NAMES)
    status = 256 if number % 101 == 100 else 0
    ids = {"process_pid": pid, "process_tgid": pid}
    exit_ = {"exit_code": status, "exit_signal": 17, "parent_pid": parent, "parent_tgid": parent}
    told = [(at, fork(pid, parent, at, cpu))]
    if number % 10 == 5:
        told.append((at + 10_000, wire.proc_event("exec", cpu, at + 10_000, **ids)))
    told.append((at + 30_000, wire.proc_event("exit", cpu, at + 30_000, **exit_, **ids)))
    stats = wire.taskstats(
        16, ac_exitcode=status, ac_flag=0x20, ac_pid=pid, ac_tgid=pid, ac_ppid=parent, ac_etime=30,
        ac_comm=NAMES[number % len(NAMES)].encode(),
    )  # fmt: skip
    return told, wire.exit_record(stats, family=FAMILY)


def failure(pid: int, at_ns: int) -> tuple[bytes, bytes]:
    """Return the exit event and the exit record of a process named NAMES[1] that fails."""
    parent = _SHELLS + 1
    ids = {"process_pid": pid, "process_tgid": pid, "parent_pid": parent, "parent_tgid": parent}
    stats = wire.taskstats(
        16, ac_exitcode=256, ac_flag=0x20, ac_pid=pid, ac_tgid=pid, ac_ppid=parent, ac_etime=300,
        ac_comm=NAMES[1].encode(),
    )  # fmt: skip
    event = wire.proc_event("exit", 0, at_ns, exit_code=256, exit_signal=17, **ids)
    return event, wire.exit_record(stats, family=FAMILY)


def fork(pid: int, parent: int, at_ns: int, cpu: int = 0) -> bytes:
    return wire.proc_event(
        "fork", cpu, at_ns, parent_pid=parent, parent_tgid=parent, child_pid=pid, child_tgid=pid
    )  # fmt: skip


def forks(count: int) -> Iterator[Batch]:
    """Yield the batches of `count` forks that precede every event of `stream`, with other PIDs."""
    made = (
        slot(fork(_PID_SPAN + _FIRST + i, _SHELLS + i % len(NAMES), _BEGAN_NS - count + i), i) for i in range(count)
    )
    while slots := list(islice(made, BATCH_EVENTS)):
        yield batch(slots, [])


def slot(event: bytes, number: int) -> bytes:
    """Return a datagram as it lies in its receive slot."""
    return wire.datagram(event, seq=number).ljust(SLOT_SIZE, b"\0")


def batch(slots: list[bytes], messages: list[bytes]) -> Batch:
    padded = b"".join(message.ljust(RECORD_SLOT_SIZE, b"\0") for message in messages)
    return Batch(memoryview(b"".join(slots)), memoryview(padded), list(map(len, messages)))


class NoProc:
    """A /proc without processes: the cost of reading it is not measured."""

    def read(self, tgid: int, wanted: Wanted, source: Provenance) -> Process | None:
        return None

    def read_parent(self, tgid: int) -> Process | None:
        return None

    def zombie(self, tgid: int, ended_ns: int, wanted: Wanted) -> Process | None:
        return None

    def is_alive(self, tgid: int) -> bool:
        return False

    is_ending = is_alive


def matcher(*rules: dict[str, object]) -> Matcher:
    return Matcher(plain(RuleFileModel.model_validate({"rules": list(rules)}).rules))


EVERYTHING: tuple[dict[str, object], ...] = (
    {"name": "everything", "events": "all", "match": {"comm": "nobody-*"}},
    {"name": "failed", "events": ["nonzero_exit"], "match": {"comm": "worker-b"}},
)
FAILURES = EVERYTHING[1:]


def tracker_for(found: Matcher, taskstats: bool = True) -> Tracker:
    """Return a tracker with the plan of these rules that knows the shells."""
    tracker = Tracker(make_plan(found, Features(taskstats=taskstats)).tracking, NoProc(), 1, found.cares)
    shells = [Process(_SHELLS + i, 1, 0, name, "procfs", 0, 0, "procfs") for i, name in enumerate(NAMES)]
    if tracker.tracking.table:
        tracker.adopt([Process(1, 0, 0, "init", "procfs", 0, 0, "procfs"), *shells])
    return tracker


def reader_for(tracker: Tracker) -> RecordReader:
    """Return a reader of exit records that passes over what the tracker does not need."""
    reader = RecordReader(FAMILY)
    reader.pass_over(tracker.unasked.asks_for)
    return reader


def decoded(batches: Iterable[Batch], reader: RecordReader) -> Iterator[tuple[list[Row], ReadRecords]]:
    """Return every batch as events and records."""
    rejects = Rejects()
    for batch in batches:
        yield rows(batch.slots, rejects), reader.read(batch.messages, batch.lengths)


def match_all(batches: Iterable[Batch], tracker: Tracker, found: Matcher, reader: RecordReader) -> int:
    """Decode and match all batches. Return the number of matches."""
    fired = 0
    for events, records in decoded(batches, reader):
        for occurrence in tracker.take(events, records.records, None, records.passed):
            fired += len(found.match(occurrence))
    return fired
