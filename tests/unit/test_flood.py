"""What is reported at once, and what is not, during a flood."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cnprocd.flood import (
    BACKLOG_S,
    BEHIND_S,
    CALM_S,
    CAUGHT_UP_S,
    COMMON,
    COMMON_BURST_S,
    HOOKS,
    HOOKS_AT_ONCE,
    JOBS,
    JOBS_AT_ONCE,
    LEAST_COMMON,
    MANY,
    PATIENCE_S,
    REQUESTS,
    REQUESTS_AT_ONCE,
    SHARE,
    Flood,
)

ROOT, USER = 0, 1000
STORM = 20_000  # matches a second


class Clock:
    """A flood, and a daemon that reads batches of 10 ms `lag_s` after they happened."""

    def __init__(self, lag_s: float = 0.0) -> None:
        self.flood, self.now_s, self.lag_s = Flood(), 100.0, lag_s

    def batch(self, matches: int, rule: str = "a", uid: int | None = USER) -> int:
        """Read one batch with so many matches. Return how many were reported."""
        self.now_s += 0.01
        at_s = self.now_s - self.lag_s
        self.flood.note_batch(at_s, at_s, self.now_s)
        reported = sum(self.flood.admits(rule, uid, at_s) for _ in range(matches))
        for _ in range(matches - reported):
            self.flood.count(rule)
        return reported

    def seconds(self, seconds: float, matches: int, rule: str = "a") -> int:
        return sum(self.batch(matches // 100, rule) for _ in range(round(100 * seconds)))


def flooded() -> Clock:
    clock = Clock(BEHIND_S + 0.1)
    clock.batch(0)
    clock.lag_s = CAUGHT_UP_S / 2
    assert clock.flood.active
    return clock


def test_a_daemon_that_keeps_up_reports_everything():
    clock = Clock(BEHIND_S / 2)
    assert clock.seconds(2, STORM) == 2 * STORM
    assert not clock.flood.counted


def test_a_backlog_after_a_standstill_is_reported():
    """After SIGSTOP for two seconds, 2,150 of 2,251 failures were counted instead of reported."""
    clock = Clock(4.0)
    for _ in range(400):
        clock.lag_s -= 0.01  # a batch of 20 ms of the backlog in every 10 ms
        assert clock.batch(22) == 22
    assert not clock.flood.counted


def test_each_second_has_its_budget():
    clock = flooded()
    clock.seconds(1, STORM)
    reported = clock.seconds(5, STORM)
    assert 0.95 < reported / (5 * (COMMON + SHARE)) < 1.05
    assert clock.flood.counted.total() + reported > 5 * STORM


def test_matches_at_once_are_bounded():
    """The report of a match delays the matches of other rules."""
    assert flooded().batch(STORM) <= COMMON * COMMON_BURST_S + SHARE


def test_a_rule_that_floods_costs_no_other_rule():
    clock = flooded()
    clock.seconds(3, STORM, "flood")
    assert clock.batch(int(SHARE), "quiet") == SHARE
    assert clock.flood.counted.keys() == {"flood"}


def test_a_user_floods_no_match_of_root():
    clock = flooded()
    clock.seconds(3, STORM)
    assert clock.batch(int(SHARE), uid=ROOT) == SHARE
    assert clock.batch(int(SHARE), uid=ROOT) < SHARE


def test_a_flood_goes_on_though_no_event_waits():
    """While matches are counted the daemon keeps up. It used to report again, until it was behind again."""
    clock = flooded()
    for _ in range(20):
        clock.seconds(CALM_S, STORM)
        assert clock.flood.active


def test_it_ends_when_all_was_reported_for_a_while():
    clock = flooded()
    clock.seconds(1, STORM)
    clock.seconds(CALM_S / 2, 100)
    assert clock.flood.active
    clock.seconds(CALM_S, 100)
    assert not clock.flood.active
    assert clock.seconds(1, STORM) == STORM


def test_it_does_not_end_while_events_wait():
    clock = flooded()
    clock.lag_s = (BEHIND_S + CAUGHT_UP_S) / 2
    clock.seconds(3 * CALM_S, 100)
    assert clock.flood.active


def test_a_slow_machine_reports_less():
    """If events wait longer and longer, the common budget is halved; the rules' own shares stay."""
    clock = flooded()
    for step in range(20):
        clock.lag_s = 0.5 + step / 10
        clock.seconds(PATIENCE_S, STORM)
    reported = clock.seconds(PATIENCE_S, STORM)
    assert reported <= 1.1 * PATIENCE_S * (LEAST_COMMON + SHARE)
    clock.lag_s = 0.0
    for _ in range(20):
        clock.seconds(PATIENCE_S, STORM)
    assert clock.seconds(1, STORM) > 0.95 * COMMON


def test_a_rule_that_gathers_hooks_has_a_budget_of_its_own():
    """Its matches need no room in the spool, so nothing else bounds them. A crowd that ends at once is not a flood."""
    clock = flooded()
    assert sum(clock.flood.admits_hook("a", clock.now_s) for _ in range(STORM)) == HOOKS_AT_ONCE
    assert sum(clock.flood.admits_hook("b", clock.now_s) for _ in range(100)) == 100
    assert sum(clock.flood.admits_hook("a", clock.now_s + 1) for _ in range(STORM)) == HOOKS
    assert clock.flood.counted == {"a": 2 * STORM - HOOKS_AT_ONCE - HOOKS}


def test_few_events_that_waited_are_no_flood():
    """The daemon started, or its loop stood still: what a throttle holds back is shown to watchers as ever."""
    flood = Flood()
    flood.note_batch(99.0, 99.5, 100.0, MANY - 1)
    assert not flood.active
    flood.note_batch(99.0, 99.5, 100.0, MANY)
    assert flood.active


def test_a_log_without_room_gets_each_rules_share_alone():
    """The rest is deferred. Events of a standstill of seconds find the budgets of all of them."""
    clock = flooded()
    reported = sum(clock.flood.admits("a", USER, clock.now_s, has_room=False) for _ in range(STORM))
    assert reported == SHARE
    assert clock.flood.admits("b", USER, clock.now_s, has_room=False)
    assert clock.flood.admits("a", USER, clock.now_s)


def test_a_match_without_a_time_counts_at_the_latest_event():
    """Recovered exits have none. Two matches at one moment must not refill the budget."""
    clock = flooded()
    reported = sum(clock.flood.admits("a", USER, None) for _ in range(STORM))
    assert reported <= COMMON * COMMON_BURST_S + SHARE


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 1), st.sampled_from([ROOT, USER, None]), st.booleans())),
)
def test_reported_and_counted_add_up(matches):
    flood = Flood()
    reported, taken = 0, 0
    for number, (rule, lag_s, uid, has_time) in enumerate(matches):
        now_s = number / 50
        flood.note_batch(now_s - lag_s, now_s, now_s)
        for _ in range(300):
            if flood.admits(rule, uid, now_s - lag_s if has_time else None):
                reported += 1
            else:
                flood.count(rule)
        if number % 7 == 0:
            taken += flood.take_unreported().total()
    assert reported + taken + flood.take_unreported().total() == 300 * len(matches)
    assert reported + flood.counted.total() == 300 * len(matches)


def test_each_rule_with_a_hook_makes_so_many_jobs_at_once():
    """Those of the first seconds are of the budget, the others have time. Outside of a flood none has."""
    clock = flooded()
    assert sum(clock.flood.admits_job("a", clock.now_s) for _ in range(STORM)) == JOBS_AT_ONCE
    assert sum(clock.flood.admits_job("b", clock.now_s) for _ in range(100)) == 100
    assert sum(clock.flood.admits_job("a", clock.now_s + 1) for _ in range(STORM)) == JOBS
    assert not clock.flood.counted
    clock.flood.active = False
    assert all(clock.flood.admits_job("a", clock.now_s + 1) for _ in range(STORM))


@given(st.integers(0, 300), st.floats(0.0, 2.0), st.booleans())
def test_room_is_what_is_admitted(taken, later_s, has_room):
    clock = flooded()
    flood, at_s = clock.flood, clock.now_s
    for _ in range(taken):
        flood.admits("a", USER, at_s, has_room)
    flood.seen_s = at_s + later_s
    room = flood.room("a", USER, has_room)
    assert [flood.admits("a", USER, flood.seen_s, has_room) for _ in range(room + 1)] == [True] * room + [False]


def test_jobs_are_made_without_end_while_nothing_waits_for_long():
    clock = flooded()
    assert clock.flood.room_for_requests("a") is None
    assert all(clock.flood.admits_request("a", clock.now_s) for _ in range(5 * int(REQUESTS_AT_ONCE)))


def test_a_flood_of_jobs_is_bounded_while_others_wait():
    clock = flooded()
    clock.lag_s = BACKLOG_S + 0.1
    clock.batch(0)
    at_s = clock.flood.seen_s
    assert clock.flood.room_for_requests("a") == REQUESTS_AT_ONCE
    admitted = sum(clock.flood.admits_request("a", at_s) for _ in range(5 * int(REQUESTS_AT_ONCE)))
    assert admitted == REQUESTS_AT_ONCE and clock.flood.room_for_requests("a") == 0
    assert clock.flood.admits_request("b", at_s), "of each rule"
    assert not clock.flood.admits_hook("a", at_s) and clock.flood.admits_hook("b", at_s)
    later_s = at_s + 1.0
    assert sum(clock.flood.admits_request("a", later_s) for _ in range(5 * int(REQUESTS))) == REQUESTS
