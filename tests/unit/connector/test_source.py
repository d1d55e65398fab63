"""Batches, and a look ahead: the events behind a batch are seen, stay in their slots, and are the next batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from unit.connector.wire import datagram, proc_event

from cnprocd.connector.decode import SLOT_SIZE, Rejects
from cnprocd.connector.inflight import EVENT_SLOTS, InFlight
from cnprocd.connector.needed import NOTHING_NEEDED
from cnprocd.connector.source import MOST_AHEAD, Source
from cnprocd.connector.taskrecord import ReadRecords

EXEC, EXIT = 2, 0x80000000


class Queue:
    """A connector socket (listener.Listener) with these events in it. `overrun` is raised at the next receive."""

    def __init__(self) -> None:
        self.waiting: list[int] = []  # the pids of exec events, or of `what`
        self.member, self.what = "exec", EXEC
        self.slots = SimpleNamespace(first=0, most=EVENT_SLOTS, filled=False)
        self.rejects = Rejects()
        self.takes_mask, self.overruns, self.overrun = True, 0, False

    def set_receive_buffer(self, size: int) -> int:
        return size

    def drops(self) -> int:
        return 0

    def subscribe(self, timeout_s: float) -> None:
        pass

    def receive_into(self, data: memoryview) -> None:
        self.data = data

    def receive(self) -> memoryview | None:
        self.overruns += self.overrun
        self.overrun = False
        room = min(self.slots.most, EVENT_SLOTS - self.slots.first)
        batch, self.waiting = self.waiting[:room], self.waiting[room:]
        self.slots.filled = len(batch) == room
        if not batch:
            return None
        begin = self.slots.first * SLOT_SIZE
        for at, pid in enumerate(batch):
            one = datagram(proc_event(self.member, 0, pid * 1000, self.what, process_pid=pid, process_tgid=pid))
            self.data[begin + at * SLOT_SIZE :][: len(one)] = one
        return self.data[begin : begin + len(batch) * SLOT_SIZE]


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def source(queue: Queue) -> Source:
    listener: Any = queue
    source = Source(listener, 1 << 20, frozenset({"taskstats"}), in_flight=InFlight())
    source.subscribe()
    source.drain()  # what an earlier daemon had in flight
    return source


def pids(events: list[Any]) -> list[int]:
    return [event[4] for event in events]


def in_slots(queue: Queue) -> list[int]:
    """Return the events that a daemon would find after a kill."""
    words = queue.data.cast("I")[:: SLOT_SIZE // 4]
    return [at for at, length in enumerate(words) if length]


def test_the_next_batch_is_what_was_looked_at(queue, source):
    queue.waiting = [1, 2]
    assert pids(source.drain().events) == [1, 2]
    queue.waiting = [3, 4, 5]
    ahead = source.look_ahead()
    assert (pids(ahead.events), ahead.is_all, source.looked_ahead) == ([3, 4, 5], True, True)
    source.blank_slots(NOTHING_NEEDED)
    source.blank_slots(NOTHING_NEEDED)  # as a tick does
    assert in_slots(queue) == [0, 1, 2], "the events that were looked at"
    queue.waiting = [6]
    batch = source.drain()
    assert (pids(batch.events), batch.more, source.looked_ahead) == ([3, 4, 5], False, False)
    assert source.events_seen == 5
    source.blank_slots(NOTHING_NEEDED)
    assert in_slots(queue) == []
    assert pids(source.drain().events) == [6]


def test_an_empty_queue_shows_nothing_ahead(queue, source):
    queue.waiting = [1]
    source.drain()
    assert (source.look_ahead(), source.looked_ahead) == (([], True), False)


@pytest.mark.parametrize("count", [EVENT_SLOTS - 2, EVENT_SLOTS - 1, EVENT_SLOTS])
def test_a_look_without_room_for_all_is_not_complete(queue, source, count):
    queue.waiting = list(range(1, count + 1))
    source.drain()
    queue.waiting = [7000, 7001]
    ahead = source.look_ahead()
    assert len(ahead.events) == min(2, EVENT_SLOTS - count)
    assert not ahead.is_all, "the slots are full"
    source.blank_slots(NOTHING_NEEDED)
    seen = pids(ahead.events) + pids(source.drain().events)
    source.blank_slots(NOTHING_NEEDED)
    assert set(seen + pids(source.drain().events)) == {7000, 7001}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_look_is_not_complete_if_events_were_lost(queue, source, when):
    queue.waiting, queue.overrun = [1], when == "before"
    assert source.drain().overrun is (when == "before")
    queue.overrun = when == "meanwhile"
    assert not source.look_ahead().is_all
    assert source.looked_ahead is (when == "meanwhile"), "the next drain reports the overrun, and nothing else wakes it"
    source.blank_slots(NOTHING_NEEDED)
    assert source.drain().overrun is (when == "meanwhile")
    assert not source.looked_ahead


class Unwalked(set[int]):
    """A set of a hundred thousand elements would be walked over, or copied, for each batch."""

    def _walk(self, *_: object) -> Any:
        raise AssertionError("the set was walked over")

    __sub__ = __rsub__ = __and__ = __or__ = __iter__ = _walk


def test_thousands_of_records_ahead_cost_a_batch_nothing(queue, source):
    """After a comparison with /proc in a storm there are so many. The records of the others are still read."""
    asked: list[tuple[set[int], int]] = []

    def drain(until: set[int], ahead: int) -> ReadRecords:
        asked.append((set(until), ahead))
        return ReadRecords(passed=[*until])

    source.taskstats = SimpleNamespace(drain=drain, overruns=0)
    queue.member, queue.what = "exit", EXIT
    for known, ahead in ((range(2, 1000), 0), (range(2, 12), MOST_AHEAD - 9)):
        source._ahead = Unwalked(known)
        queue.waiting = [1, 2, 3]
        source.drain(2)  # the third one waits, so not every record is read
        assert asked.pop() == ({1}, ahead)
        assert 1 not in source._ahead and 2 not in source._ahead and 3 in source._ahead
        queue.waiting = []


def test_no_record_is_waited_for_that_the_filter_drops(queue, source):
    """While a hook runs, exits of leaders come with any status. In a storm everything queued would be read."""
    asked: list[set[int]] = []

    def drain(until: set[int], ahead: int) -> ReadRecords:
        asked.append(set(until))
        return ReadRecords()

    source.taskstats = SimpleNamespace(drain=drain, overruns=0)
    queue.member, queue.what, queue.waiting = "exit", EXIT, [1, 2, 3]
    source._recorded = frozenset()
    source.drain(2)
    assert asked.pop() == set()
    source._recorded = frozenset({0})
    queue.waiting = [4, 5, 6]
    source.drain(2)
    assert asked.pop() != set()
