"""throttle.py against simple models that keep everything."""

from hypothesis import given
from hypothesis import strategies as st

from cnprocd.rules.ruleset import After, RateLimit
from cnprocd.spool.throttle import MOST_KEYS, MOST_TIMES, NS, OTHER_KEYS, HeldBack, Throttle

# Often whole seconds, so that matches fall exactly on the end of a window.
GAP_NS = st.integers(0, 5).map(lambda seconds: seconds * NS) | st.integers(0, 5 * NS)
GAPS = st.lists(st.tuples(GAP_NS, st.sampled_from("abc")), max_size=60)


def arrivals(gaps):
    now = 0
    for gap, comm in gaps:
        now += gap
        yield now, {"comm": comm}


@given(GAPS, st.integers(1, 4), st.integers(1, 8), st.sampled_from(["rule", "comm"]))
def test_rate_limit_is_a_sliding_window_per_key(gaps, count, per_s, by):
    throttle = Throttle("r", rate_limit=RateLimit(count, per_s, by))
    passed: list[tuple[int, str]] = []
    for now, record in arrivals(gaps):
        key = record["comm"] if by == "comm" else ""
        recent = [t for t, k in passed if k == key and now - t < per_s * NS]
        verdict = throttle.admit(record, now)
        assert (verdict is None) == (len(recent) < count)
        if verdict is None:
            passed.append((now, key))
        else:
            assert verdict == "rate_limit"


@given(GAPS, st.integers(1, 8))
def test_cooldown_lets_one_pass_and_then_none_for_so_long(gaps, cooldown_s):
    throttle, last = Throttle("r", cooldown_s=cooldown_s), None
    for now, record in arrivals(gaps):
        expected = last is None or now - last >= cooldown_s * NS
        assert (throttle.admit(record, now) is None) == expected
        last = now if expected else last


@given(GAPS, st.integers(1, 5), st.integers(1, 20), st.none() | st.integers(1, 20))
def test_after_fires_once_for_each_flapping(gaps, count, within_s, resets_s):
    throttle = Throttle("r", after=After(count, within_s), resets_s=resets_s)
    quiet = (within_s if resets_s is None else resets_s) * NS
    episode: list[int] = []
    fired = False
    for now, record in arrivals(gaps):
        if episode and now - episode[-1] >= quiet:
            episode, fired = [], False
        episode.append(now)
        reached = len([t for t in episode[-count:] if now - t <= within_s * NS]) == count
        assert throttle.admit(record, now) == (None if reached and not fired else "after")
        fired = fired or reached


@given(GAPS, st.integers(1, 3), st.integers(1, 8), st.integers(1, 8))
def test_only_matches_that_pass_all_limits_count(gaps, count, per_s, cooldown_s):
    throttle = Throttle("r", rate_limit=RateLimit(count, per_s), cooldown_s=cooldown_s)
    passed: list[int] = []
    for now, record in arrivals(gaps):
        cool = not passed or now - passed[-1] >= cooldown_s * NS
        within = len([t for t in passed if now - t < per_s * NS]) < count
        verdict = throttle.admit(record, now)
        assert verdict == (None if cool and within else "rate_limit" if cool else "cooldown")
        if verdict is None:
            passed.append(now)


@given(GAPS, st.integers(1, 3), st.integers(1, 8))
def test_everything_held_back_is_reported_once(gaps, count, per_s):
    throttle = Throttle("r", rate_limit=RateLimit(count, per_s, "comm"), cooldown_s=1)
    held, reported, now = 0, 0, 0
    for now, record in arrivals(gaps):
        due = throttle.next_report_ns()
        reports = throttle.reports(now)
        assert bool(reports) == (due is not None and due <= now)
        reported += sum(report.count for report in reports)
        held += throttle.admit(record, now) is not None
    reported += sum(report.count for report in throttle.reports(now + 100 * NS))
    assert reported == held
    assert throttle.next_report_ns() is None
    assert throttle.reports(now + 200 * NS) == []


def test_a_report_names_the_window_and_the_key():
    throttle = Throttle("r", rate_limit=RateLimit(1, 60, "comm"))
    for _ in range(4):
        throttle.admit({"comm": "x\n"}, 5)
    assert throttle.next_report_ns() == 5 + 60 * NS
    assert throttle.reports(5 + 60 * NS - 1) == []
    assert throttle.reports(5 + 60 * NS) == [HeldBack("r", "rate_limit", "comm", "x\n", 3, 60.0)]


def test_keys_chosen_by_processes_are_bounded():
    throttle = Throttle("r", rate_limit=RateLimit(1, 1000, "comm"))
    for number in range(3 * MOST_KEYS):
        for _ in range(2):
            throttle.admit({"comm": str(number)}, number)
    limit = throttle._limits[0]
    assert len(limit.passed) <= MOST_KEYS
    assert len(limit.held) <= MOST_KEYS + 1
    reports = throttle.reports(2000 * NS)
    assert sum(report.count for report in reports) == 3 * MOST_KEYS
    assert any(report.key == OTHER_KEYS for report in reports)


def test_the_oldest_key_is_the_one_forgotten():
    throttle = Throttle("r", rate_limit=RateLimit(1, 1000, "comm"))
    throttle.admit({"comm": "victim"}, 0)
    for number in range(MOST_KEYS - 1):
        throttle.admit({"comm": str(number)}, 1)
    assert throttle.admit({"comm": "victim"}, 2) == "rate_limit"
    throttle.admit({"comm": "one more"}, 3)
    assert throttle.admit({"comm": "victim"}, 4) is None


def test_a_huge_count_leaves_room_for_few_keys():
    throttle = Throttle("r", rate_limit=RateLimit(MOST_TIMES, 1000, "comm"))
    for number in range(10):
        throttle.admit({"comm": str(number)}, number)
    assert len(throttle._limits[0].passed) == 1


def test_without_limits_everything_passes():
    throttle = Throttle("r")
    assert [throttle.admit({}, now) for now in range(5)] == [None] * 5
    assert throttle.next_report_ns() is None
