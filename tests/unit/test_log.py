"""The one rate limiter of log records: nothing is counted twice, and no count is lost."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cnprocd.log import LEVELS, ThrottledLog

EVERY_S = 10.0


class Records(list):
    def __call__(self, level, event, **fields):
        self.append((level, event, fields))

    def counts(self, event, name="count"):
        return [fields[name] for _, of, fields in self if of == event]


def throttled():
    records = Records()
    return ThrottledLog(records, EVERY_S), records


def test_levels_go_from_least_to_most_severe():
    assert LEVELS == ("debug", "info", "notice", "warning", "error", "critical")


def test_first_record_of_a_class_is_written_at_once():
    log, records = throttled()
    log.add("warning", "spoofed", 100.0, {"count": 3}, "dropped", reason="forged")
    assert records == [("warning", "spoofed", {"count": 3, "reason": "forged", "message": "dropped"})]
    assert not log.pending


def test_next_record_carries_the_counts_since_the_last_one():
    log, records = throttled()
    for now_s in (100.0, 101.0, 109.9, 110.0):
        log.add("warning", "spoofed", now_s, {"count": 1, "bytes": 5}, "dropped")
    assert records.counts("spoofed") == [1, 3]
    assert records.counts("spoofed", "bytes") == [5, 15]


def test_level_message_and_fields_are_those_of_the_latest():
    log, records = throttled()
    log.add("warning", "spoofed", 0.0, {"count": 1}, "first", pid=1)
    log.add("warning", "spoofed", 1.0, {"count": 1}, "second", pid=2)
    log.add("error", "spoofed", 10.0, {"count": 1}, lambda counts: f"{counts['count']} more", pid=3)
    assert records[1] == ("error", "spoofed", {"count": 2, "pid": 3, "message": "2 more"})


def test_classes_do_not_throttle_each_other():
    log, records = throttled()
    log.add("warning", "spoofed", 0.0, {"count": 1}, "dropped")
    log.add("warning", "queue_full", 0.0, {"count": 1}, "full")
    assert [event for _, event, _ in records] == ["spoofed", "queue_full"]


def test_flush_due_writes_only_what_has_waited_its_interval():
    log, records = throttled()
    log.add("warning", "spoofed", 0.0, {"count": 1}, "dropped")
    log.add("warning", "spoofed", 1.0, {"count": 2}, "dropped")
    log.flush_due(9.9)
    assert log.pending and records.counts("spoofed") == [1]
    log.flush_due(10.0)
    assert not log.pending and records.counts("spoofed") == [1, 2]
    log.flush_due(30.0)
    assert records.counts("spoofed") == [1, 2]


def test_flush_writes_everything_that_waits():
    log, records = throttled()
    for event in ("spoofed", "queue_full"):
        for now_s in (0.0, 1.0):
            log.add("warning", event, now_s, {"count": 1}, "text")
    log.flush(1.0)
    assert records.counts("spoofed") == records.counts("queue_full") == [1, 1]


steps = st.lists(st.tuples(st.floats(0, 15), st.integers(0, 5), st.booleans()), max_size=30)


@given(steps)
def test_no_count_is_lost_and_the_interval_is_kept(steps):
    """Whatever the rhythm of `add` and `flush_due`: the sums agree, and records keep their distance."""
    log, records, times, now_s, added = *throttled(), [], 0.0, 0
    for pause_s, count, flushes in steps:
        now_s += pause_s
        written = len(records)
        if flushes:
            log.flush_due(now_s)
        else:
            log.add("info", "seen", now_s, {"count": count}, "text")
            added += count
        times += [now_s] * (len(records) - written)
    assert all(later - earlier >= EVERY_S for earlier, later in pairwise(times))
    log.flush(now_s)
    assert sum(records.counts("seen")) == added
