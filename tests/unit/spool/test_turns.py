"""turns.py: fair turns between rules and between keys, and the slots that rules are guaranteed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleModel
from cnprocd.spool.job import Job, State
from cnprocd.spool.turns import Turns, guaranteed_slots, may_start

SLOTS = st.none() | st.integers(1, 5)


def rules_of(slots):
    """Return a rule for each wish: `slots:` of its hook, None without it."""
    wishes = [{} if wish is None else {"slots": wish} for wish in slots]
    rules = [{"name": f"r{n}", "events": "exit", "run": {"command": ["/x"], **wish}} for n, wish in enumerate(wishes)]
    return [plain(RuleModel.model_validate(rule)) for rule in rules]


def job(job_id, key=None, rule="r"):
    return Job(job_id, rule, State.WAITING, key, None, "", 0, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("slots", "total", "given_slots"),
    [
        ([2, None], 8, [2]),
        ([8, None], 8, [7]),  # a rule without slots: has one among its like
        ([8, 8], 8, [4, 4]),
        ([1, 1, 1], 2, [1, 1, 0]),  # in the order of the file
        ([1, None], 1, [0]),
        ([None, None], 8, []),
        ([3, 9, None], 8, [3, 4]),
    ],
)
def test_slots_are_guaranteed_as_far_as_they_go(slots, total, given_slots):
    assert list(guaranteed_slots(rules_of(slots), total).values()) == given_slots


def test_a_disabled_rule_keeps_no_slot_free():
    model = {"name": "r", "events": "exit", "enabled": False, "run": {"command": ["/x"], "slots": 3}}
    assert guaranteed_slots([plain(RuleModel.model_validate(model))], 8) == {}


@given(st.lists(SLOTS, min_size=1, max_size=5), st.integers(1, 8), st.lists(st.integers(0, 4), max_size=60))
def test_a_rule_below_its_guarantee_can_always_start(slots, total, starts):
    """Whatever the other rules start: limits hold, the total holds, and guaranteed slots are free."""
    guaranteed = guaranteed_slots(rules_of(slots), total)
    running = dict.fromkeys((f"r{n}" for n in range(len(slots))), 0)

    def may(name):
        limit = slots[int(name[1:])]
        return may_start(name, running, limit=limit, total=total, guaranteed=guaranteed)

    for number in starts:
        name = f"r{number % len(slots)}"
        if may(name):
            running[name] += 1
        assert sum(running.values()) <= total
        assert all(may(rule) for rule, count in guaranteed.items() if running[rule] < count)
        assert all(wish is None or running[f"r{n}"] <= wish for n, wish in enumerate(slots))


def test_the_rule_with_the_fewest_hooks_is_next():
    turns = Turns()
    turns.note_start(job(1, rule="a"), 9)
    turns.note_start(job(2, rule="b"), 9)
    assert turns.order({"a": 3, "b": 4, "c": 8}, {"a": 2, "b": 1}) == ["c", "b", "a"]
    assert turns.order({"b": 4, "a": 3}, {}) == ["a", "b"], "a started longer ago"
    assert turns.order({"x": 7, "y": 5}, {}) == ["y", "x"], "the oldest job"


def test_a_key_that_started_goes_behind_those_that_waited():
    turns = Turns()
    turns.note_start(job(1, "x"), last_job_id=100)  # jobs 2 to 100 of x wait
    flood, late = job(2, "x"), job(101, "y")
    assert min([flood, late], key=turns.of_key) is flood
    turns.note_start(flood, last_job_id=101)
    assert min([job(3, "x"), late], key=turns.of_key) is late


def test_new_keys_do_not_pass_one_that_waits():
    turns = Turns()
    turns.note_start(job(1, "x"), last_job_id=10)
    for number in range(11, 200):  # a process makes a new name for each job
        assert min([job(2, "x"), job(number, f"new-{number}")], key=turns.of_key).serialize_key == "x"
