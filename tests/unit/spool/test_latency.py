"""latency.py against the values themselves."""

from hypothesis import given
from hypothesis import strategies as st

from cnprocd.spool.latency import BOUNDS_MS, Histogram


@given(st.lists(st.floats(0, 20_000), max_size=50), st.floats(0, 1))
def test_a_quantile_is_the_bucket_with_the_value_of_that_rank(values, share):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    assert histogram.count == len(values)
    found = histogram.quantile_ms(share)
    if not values:
        assert found is None
        return
    below = sum(value <= found for value in values)
    assert below >= share * len(values)
    assert found <= max(values)
    lower = max((bound for bound in BOUNDS_MS if bound < found), default=-1.0)
    assert sum(value <= lower for value in values) < share * len(values) or share == 0 or found == max(values)


def test_values_on_a_bound_belong_to_its_bucket():
    histogram = Histogram()
    for value in (0.5, 0.6, 2.5, 9999):
        histogram.add(value)
    assert histogram.counts[0] == 1
    assert histogram.counts[BOUNDS_MS.index(2.5)] == 1
    assert histogram.counts[-1] == 1
    assert (histogram.max_ms, histogram.sum_ms) == (9999, 0.5 + 0.6 + 2.5 + 9999)
