"""From a recording and rules to matches. The same file and the same rules give the same matches on any machine.

Nothing of this machine is used. The recording stands for /proc: it has the scan at the start, what was read at each
exec, and the processes that are alive by the events and exit records so far. Users have the names that they had on the
recorded machine. Time comes from the events, for throttles as well. Matches that a throttle would
have held back are included and marked with `held_by`.

Pure except for the clock that measures the duration.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from cnprocd.cli.recording import Drain, Recording
from cnprocd.connector.decode import SLOT_SIZE, Rejects, decode
from cnprocd.connector.event import Event, Exec, Exit, Fork
from cnprocd.connector.request import Features
from cnprocd.connector.taskrecord import TaskRecord, UnreadableRecordError, decode_record
from cnprocd.connector.uapi import DATAGRAM_SIZE
from cnprocd.dispatch import throttle_of
from cnprocd.json_value import JsonDict, get_int_or_none
from cnprocd.output.record import match_record
from cnprocd.process.model import EVERYTHING, Occurrence, Process, Provenance, Wanted
from cnprocd.process.oom import OomKill, OomKills
from cnprocd.process.tracker import Tracker
from cnprocd.rules.compile import Matcher
from cnprocd.rules.plan import make_plan
from cnprocd.spool.throttle import Throttle

_PAD = b"\0" * (SLOT_SIZE - DATAGRAM_SIZE)
_NO_PROCESS = -1  # no process of the recording is a child of this one
_NEVER_NS = 1 << 63
_AFTER_NS = 10_000_000_000


@dataclass(slots=True)
class Replayed:
    """The result of a replay. All but `took_s` is the same every time."""

    matches: list[JsonDict] = field(default_factory=list)
    events: int = 0
    exit_records: int = 0
    occurrences: int = 0
    unreadable: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    held_back: int = 0
    span_s: float = 0.0
    took_s: float = 0.0


class RecordedProc:
    """/proc as the recording has it, at the current point of the replay."""

    def __init__(self, start: Iterable[Process], has_records: bool) -> None:
        self._known = {process.tgid: process for process in start}
        self._threads = {process.tgid: max(1, process.threads) for process in start}
        self._has_records = has_records
        self._just_read: dict[int, Process] = {}

    def begin(self, drain: Drain) -> None:
        """Use what was read from /proc after this drain, when the daemon would have read it."""
        self._just_read = {process.tgid: process for process in drain.facts}

    def note(self, events: Iterable[Event], records: Iterable[TaskRecord]) -> None:
        """Follow births and deaths of processes through the events of this drain."""
        for event in events:
            if isinstance(event, Fork):
                self._fork(event)
            elif isinstance(event, Exec) and event.process_tgid in self._just_read:
                self._known[event.process_tgid] = self._just_read[event.process_tgid]
                self._threads[event.process_tgid] = 1
            elif isinstance(event, Exit) and not self._has_records:
                self._threads[event.process_tgid] = self._threads.get(event.process_tgid, 1) - 1
                if self._threads[event.process_tgid] <= 0:
                    self._forget(event.process_tgid)
        for record in records:
            if record.last:
                self._forget(record.tgid)

    def _fork(self, event: Fork) -> None:
        if event.child_pid != event.child_tgid:
            self._threads[event.child_tgid] = self._threads.get(event.child_tgid, 0) + 1
            return
        parent = self._known.get(event.parent_tgid) or Process(event.parent_tgid)
        self._known[event.child_tgid] = replace(
            parent, tgid=event.child_tgid, ppid=event.parent_tgid, start_ns=event.timestamp_ns, threads=1, counted_ns=0
        )
        self._threads[event.child_tgid] = 1

    def _forget(self, tgid: int) -> None:
        self._known.pop(tgid, None)
        self._threads.pop(tgid, None)

    # Called by the tracker.

    def read(self, tgid: int, wanted: Wanted = EVERYTHING, source: Provenance = "procfs") -> Process | None:
        found = self._just_read.get(tgid) if source == "exec" else self._known.get(tgid)
        if found is None:
            return None
        copy = replace(found)
        copy.set_provenance(source)
        return copy

    def read_parent(self, tgid: int) -> Process | None:
        return self.read(tgid)

    def zombie(self, tgid: int, ended_ns: int, wanted: Wanted) -> Process | None:
        return None

    def is_alive(self, tgid: int) -> bool:
        return tgid in self._known

    is_ending = is_alive


def replay(recording: Recording, matcher: Matcher) -> Replayed:
    """Return every match of these rules, with figures."""
    began = time.perf_counter()
    found = Replayed()
    has_records = recording.header.get("taskstats") is True
    proc = RecordedProc(recording.start, has_records)
    plan = make_plan(matcher, Features(taskstats=has_records))
    tracker = Tracker(replace(plan.tracking, table=True, wanted=EVERYTHING), proc, _NO_PROCESS)
    tracker.adopt([replace(process) for process in recording.start])
    kills = OomKills()
    if recording.header.get("kernel_log") is not True:
        kills.overran(_NEVER_NS)
    evaluate = _Evaluator(matcher, recording, kills, found)
    first = last = None
    for drain in recording.drains:
        events = _events(drain, found)
        records = list(_records(drain, recording, found))
        if events:
            stamps = [event.timestamp_ns for event in events]
            first = min(stamps) if first is None else first
            last = max(stamps)
        proc.begin(drain)
        for tgid in drain.victims:
            kills.add(OomKill(tgid, last or 0))
        evaluate(tracker.take(list(events), records))
        proc.note(events, records)
    evaluate(tracker.take([], []))
    evaluate(tracker.sweep((last or 0) + _AFTER_NS))
    found.span_s = ((last or 0) - (first or 0)) / 1e9
    found.took_s = time.perf_counter() - began
    return found


def _events(drain: Drain, found: Replayed) -> list[Event]:
    size = DATAGRAM_SIZE
    pieces = (drain.datagrams[at : at + size] for at in range(0, len(drain.datagrams), size))
    rejects = Rejects()
    events = decode(b"".join(piece + _PAD for piece in pieces), rejects)
    found.events += len(events)
    found.unreadable += rejects.total()
    return events


def _records(drain: Drain, recording: Recording, found: Replayed) -> Iterator[TaskRecord]:
    for message in drain.messages:
        try:
            record = decode_record(message, get_int_or_none(recording.header, "family") or 0)
        except UnreadableRecordError:
            found.unreadable += 1
            continue
        found.exit_records += 1
        yield record


class _Evaluator:
    """Turn occurrences into matches, through the throttle of each rule."""

    def __init__(self, matcher: Matcher, recording: Recording, kills: OomKills, found: Replayed) -> None:
        self._matcher = matcher
        self._kills = kills
        self._names = recording.names
        self._found = found
        self._throttles: dict[str, Throttle] = {}
        self._now_ns = 0

    def __call__(self, occurrences: Iterable[Occurrence]) -> None:
        for occurrence in occurrences:
            self._found.occurrences += 1
            # Time never goes back: a batch may hold events of two CPUs out of order, and a recovered exit has no time.
            self._now_ns = max(self._now_ns, occurrence.kernel_time_ns or 0)
            if occurrence.kind == "exit":
                self._kills.explain(occurrence)
            for match in self._matcher.match(occurrence):
                record = match_record(match, lambda uid: self._names.get(uid, str(uid)))
                throttle = self._throttles.setdefault(match.rule.name, throttle_of(match.rule.rule))
                if (held_by := throttle.admit(record, occurrence.kernel_time_ns or self._now_ns)) is not None:
                    record["held_by"] = held_by
                    self._found.held_back += 1
                self._found.matches.append(record)
                self._found.rules[match.rule.name] += 1
