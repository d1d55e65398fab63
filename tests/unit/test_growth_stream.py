"""The generated events of many CPUs (tests/bench/growth.py) are in an order in which a kernel could send them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import growth
import stream

from cnprocd.connector.decode import Rejects, rows, sequences
from cnprocd.connector.sequence import SequenceTracker

PROCESSES = 1_500  # of which 14 fail, some of them called worker-b


@pytest.mark.parametrize("cpus", [1, 4, 64])
def test_events_of_many_cpus_make_the_same_matches(cpus):
    found = stream.matcher(*stream.EVERYTHING)
    tracker = stream.tracker_for(found)
    batches = list(growth.side_by_side(PROCESSES, cpus))
    failing = [i for i in range(PROCESSES) if i % 101 == 100 and stream.NAMES[i % 4] == "worker-b"]
    assert stream.match_all(batches, tracker, found, stream.reader_for(tracker)) == len(failing) > 0
    assert tracker.deaths.without_record == 0


def test_events_of_one_cpu_arrive_in_order_and_of_many_do_not():
    sequence, times = SequenceTracker(), list[tuple[int, int]]()
    for batch in growth.side_by_side(PROCESSES, 16):
        assert sequence.note(sequences(batch.slots)) == 0
        times += [(row[1], row[2]) for row in rows(batch.slots, Rejects())]
    for cpu in range(16):
        of_cpu = [at_ns for at, at_ns in times if at == cpu]
        assert of_cpu == sorted(of_cpu)
    assert [at_ns for _, at_ns in times] != sorted(at_ns for _, at_ns in times)
