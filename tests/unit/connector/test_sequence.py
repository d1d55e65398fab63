"""Gaps of each CPU, compared with an oracle that knows every number that was sent, with any state of the 32-bit
counter.

The kernel numbers each CPU's events one by one and queues them in that order; events of several CPUs interleave.
"""

from hypothesis import given
from hypothesis import strategies as st

from cnprocd.connector.sequence import SequenceTracker

WRAP = 1 << 32


@st.composite
def streams(draw):
    """Return (pairs that arrived, how many a CPU lost between its first and its last arrival)."""
    arrivals, lost = [], 0
    for cpu in draw(st.lists(st.integers(0, 3) | st.just(WRAP - 1), unique=True, min_size=1, max_size=3)):
        start = draw(st.integers(0, WRAP - 1) | st.integers(WRAP - 20, WRAP - 1))
        got = draw(st.lists(st.booleans(), max_size=30))
        arrived = [i for i, came in enumerate(got) if came]
        lost += (arrived[-1] - arrived[0] + 1 - len(arrived)) if arrived else 0
        arrivals.append([((start + i) % WRAP, cpu) for i in arrived])
    order = draw(st.permutations([n for n, queue in enumerate(arrivals) for _ in queue]))
    queues = [iter(queue) for queue in arrivals]
    return [next(queues[n]) for n in order], lost


@given(streams(), st.integers(1, 7))
def test_missing_counts_equal_losses_on_any_cpu_in_any_batches(stream, batch):
    pairs, lost = stream
    tracker = SequenceTracker()
    told = sum(tracker.note(pairs[i : i + batch]) for i in range(0, len(pairs), batch))
    assert told == tracker.missing == lost


def test_the_round_of_the_counter_is_no_gap():
    tracker = SequenceTracker()
    assert tracker.note([(WRAP - 2, 0), (WRAP - 1, 0), (0, 0), (1, 0)]) == 0
    assert tracker.note([(3, 0)]) == 1


def test_a_gap_over_the_round_is_counted():
    assert SequenceTracker().note([(WRAP - 2, 5), (1, 5)]) == 2


def test_the_first_number_of_a_cpu_is_no_gap_even_late():
    tracker = SequenceTracker()
    assert tracker.note([(10, 0), (11, 0)]) == 0
    assert tracker.note([(4_000_000_000, 1), (12, 0)]) == 0


def test_a_repeated_number_is_no_loss_and_moves_nothing():
    tracker = SequenceTracker()
    assert tracker.note([(10, 0), (11, 0), (10, 0), (12, 0)]) == 0


def test_reset_forgets_the_starting_points_and_keeps_the_count():
    tracker = SequenceTracker()
    tracker.note([(1, 0), (5, 0)])
    tracker.reset()
    assert tracker.note([(100, 0)]) == 0
    assert tracker.missing == 3
