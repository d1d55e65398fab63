"""throttle.py against simple models that keep everything."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.rules.ruleset import After, Cooldown, RateLimit
from cnprocd.spool.throttle import (
    DISCARDS_EVERY_NS,
    MOST_KEYS,
    MOST_SHOWN,
    MOST_TIMES,
    NS,
    OTHER_KEYS,
    Discarded,
    HeldBack,
    Throttle,
)

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
    throttle, last = Throttle("r", cooldown=Cooldown(cooldown_s)), None
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
    throttle = Throttle("r", rate_limit=RateLimit(count, per_s), cooldown=Cooldown(cooldown_s))
    passed: list[int] = []
    for now, record in arrivals(gaps):
        cool = not passed or now - passed[-1] >= cooldown_s * NS
        within = len([t for t in passed if now - t < per_s * NS]) < count
        verdict = throttle.admit(record, now)
        assert verdict == (None if cool and within else "rate_limit" if cool else "cooldown")
        if verdict is None:
            passed.append(now)


KINDS = st.fixed_dictionaries(
    {},
    optional={
        "rate_limit": st.builds(RateLimit, st.integers(1, 3), st.integers(1, 8), st.sampled_from(["rule", "comm"])),
        "cooldown": st.builds(Cooldown, st.integers(1, 8), st.sampled_from(["rule", "comm"])),
        "after": st.builds(After, st.integers(1, 4), st.integers(1, 8), st.sampled_from(["rule", "comm"])),
    },
)


@given(GAPS, KINDS)
def test_what_is_certainly_held_back_is_held_back(gaps, kinds):
    """And counting it by `hold` is the same as asking about it."""
    asked, counted = Throttle("r", **kinds), Throttle("r", **kinds)
    for now, record in arrivals(gaps):
        held = counted.holds(record, now) or counted.is_below(record, 0)
        if held:
            counted.hold(record, now, 1)
            assert asked.admit(record, now) is not None
        else:
            assert asked.admit(record, now) == counted.admit(record, now)
    assert asked.take_open() == counted.take_open()


@given(GAPS, st.integers(1, 3), st.integers(1, 8))
def test_everything_held_back_is_reported_once(gaps, count, per_s):
    throttle = Throttle("r", rate_limit=RateLimit(count, per_s, "comm"), cooldown=Cooldown(1))
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


@given(GAPS, st.integers(1, 3), st.integers(1, 8))
def test_at_its_end_a_throttle_reports_open_windows(gaps, count, per_s):
    throttle = Throttle("r", rate_limit=RateLimit(count, per_s, "comm"), cooldown=Cooldown(1))
    held = sum(throttle.admit(record, now) is not None for now, record in arrivals(gaps))
    assert sum(report.count for report in throttle.take_open()) == held
    assert throttle.take_open() == [] and throttle.next_report_ns() is None


@pytest.mark.parametrize("take", [Throttle.take_open, lambda throttle: throttle.reports(100 * NS)], ids=["end", "tick"])
def test_few_keys_are_reported_one_by_one(take):
    """A user can make thousands, and each is a log record."""
    throttle = Throttle("r", rate_limit=RateLimit(1, 60, "comm"))
    for number in range(MOST_SHOWN + 50):
        for _ in range(3 if number == 140 else 2):
            throttle.admit({"comm": str(number)}, 5)
    reports = {report.key: report.count for report in take(throttle)}
    assert len(reports) == MOST_SHOWN + 1
    assert (reports["140"], reports[OTHER_KEYS]) == (2, 50)


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
    assert len(limit.keys) <= MOST_KEYS
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
    assert len(throttle._limits[0].keys) == 1


def test_without_limits_everything_passes():
    throttle = Throttle("r")
    assert [throttle.admit({}, now) for now in range(5)] == [None] * 5
    assert throttle.next_report_ns() is None


def test_after_by_unit_counts_each_unit_alone():
    """Five services fail once each: none of them is in a crash loop. Then zeta loops, and is reported at once."""
    throttle = Throttle("loop", after=After(5, 60, "unit"), cooldown=Cooldown(600, "unit"))
    for second, unit in enumerate(["alpha", "beta", "gamma", "delta", "epsilon"]):
        assert throttle.admit({"unit": f"{unit}.service"}, second * NS) == "after"
    zeta = [throttle.admit({"unit": "zeta.service"}, (10 + second) * NS) for second in range(6)]
    assert zeta == ["after"] * 4 + [None, "after"]


def test_cooldown_by_unit_holds_back_that_unit_alone():
    throttle = Throttle("r", cooldown=Cooldown(600, "unit"))
    assert [throttle.admit({"unit": unit}, now * NS) for now, unit in enumerate("abab")] == [
        None,
        None,
        *["cooldown"] * 2,
    ]
    assert throttle.admit({"unit": "a"}, 600 * NS) is None
    assert throttle.admit({"unit": "b"}, 600 * NS) == "cooldown"


def test_an_unknown_value_is_not_counted_with_others():
    unknown = {"unit": None}
    after = Throttle("r", after=After(2, 60, "unit"))
    assert [after.admit(unknown, 0) for _ in range(5)] == ["after"] * 5
    cooldown = Throttle("r", cooldown=Cooldown(600, "unit"))
    assert [cooldown.admit(unknown, 0) for _ in range(5)] == [None] * 5


def test_rate_limit_counts_all_unknown_values_together():
    throttle = Throttle("r", rate_limit=RateLimit(2, 60, "unit"))
    assert [throttle.admit({"unit": None}, 0) for _ in range(4)] == [None, None, *["rate_limit"] * 2]
    assert throttle.admit({"unit": "a.service"}, 0) is None


def test_events_out_of_order_are_counted_in_order():
    """Events of two CPUs: the third arrives after the fourth. Three within two seconds fire, and no others."""
    throttle = Throttle("r", after=After(3, 2), resets_s=1000)
    times = [0, 10, 20, 13, 21, 12, 19.5]
    passed = [time for time in times if throttle.admit({}, int(time * NS)) is None]
    assert passed == [19.5]


def test_names_that_look_alike_have_counts_of_their_own():
    throttle = Throttle("r", cooldown=Cooldown(60, "comm"))
    assert throttle.admit({"comm": "a\\x1b"}, 0) is None
    assert throttle.admit({"comm": "a\\x1b", "comm_hex": "611b"}, 0) is None
    assert throttle.admit({"comm": "a\\x1b", "comm_hex": "611b"}, 1) == "cooldown"
    assert [report.key for report in throttle.reports(100 * NS)] == ["a\\x1b"]


def test_keys_of_after_are_bounded_and_discards_reported():
    """A user's process makes many names: memory stays bounded, and the discarded counts are reported once a minute."""
    throttle = Throttle("r", after=After(2, 1000, "comm"))
    throttle.admit({"comm": "victim"}, 0)
    for number in range(MOST_KEYS):
        throttle.admit({"comm": str(number)}, number)
    assert throttle.admit({"comm": "victim"}, MOST_KEYS) == "after"
    assert throttle.discarded(MOST_KEYS) == []
    assert throttle.next_report_ns() == MOST_KEYS - 1 + DISCARDS_EVERY_NS
    assert throttle.discarded(2 * DISCARDS_EVERY_NS) == [Discarded("r", "after", "comm", 2, MOST_KEYS)]
    assert throttle.next_report_ns() is None


def test_a_users_names_discard_no_count_of_another_user():
    """A loop of zeta, a process of root, is detected although user 1000 makes far more names than are counted."""
    throttle = Throttle("r", after=After(3, 60.0, "comm"))
    held = []
    for second in range(3):
        held.append(throttle.admit({"comm": "zeta", "uid": 0}, second * NS))
        for number in range(2 * MOST_KEYS):
            throttle.admit({"comm": f"name-{second}-{number}", "uid": 1000}, second * NS + number)
    assert held == ["after", "after", None]
    assert len(throttle._after.keys) == MOST_KEYS


def test_a_key_whose_time_is_over_is_discarded_silently():
    throttle = Throttle("r", after=After(2, 1, "comm"))
    for number in range(2 * MOST_KEYS):
        throttle.admit({"comm": str(number)}, number * NS)
    assert throttle.next_report_ns() is None
    assert throttle.discarded(10**9 * NS) == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=80))
def test_the_user_with_the_most_keys_loses_one(uses):
    """The oldest key of such a user; of all, if each user has one."""
    keys = Throttle("r", rate_limit=RateLimit(MOST_TIMES // 8, 1000, "comm"))._limits[0].keys
    owned: dict[str, int] = {}  # in the order of their use
    for now, (number, owner) in enumerate(uses):
        key = f"{number}"
        if key not in owned and len(owned) == keys.most:
            counts = Counter(owned.values())
            before = set(keys._times)
            keys.use(key, now, owner)
            (lost,) = before - set(keys._times)
            assert counts[owned[lost]] == max(counts.values())
            same = [one for one in owned if max(counts.values()) == 1 or owned[one] == owned[lost]]
            assert lost == same[0]
            del owned[lost]
        else:
            keys.use(key, now, owner)
        owned[key] = owned.pop(key, owner)
        counts = Counter(owned.values())
        assert len(keys._with) - 1 == max(counts.values())
        assert keys._with[-1].keys() == {one for one, count in counts.items() if count == max(counts.values())}
