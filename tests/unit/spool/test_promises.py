"""Which hook a job runs, when a job that is interrupted again and again is given up, and which jobs wait. Pure."""

from __future__ import annotations

from unit.hookkit import hook

from cnprocd.spool.job import NS, Job, State
from cnprocd.spool.pauses import MOST_INTERRUPTIONS, Interruptions, Postponements
from cnprocd.spool.promises import MOST_SNAPSHOTS, Promise, Promises

OLD, NEW = hook("/bin/old", slots=2), hook("/bin/new")


def job(rule: str, snapshot: str) -> Job:
    return Job(1, rule, State.WAITING, None, None, "boot", 0, 0, 0, 0, 1, snapshot=snapshot)


def test_a_rule_in_force_wins_and_a_former_one_is_kept():
    promises = Promises({"kept": OLD, "gone": OLD}, "a")
    promises.use({"kept": NEW}, "b", ["a"])
    assert promises.of(job("kept", "a")) == Promise(NEW, "b", in_force=True)
    assert promises.of(job("gone", "a")) == Promise(OLD, "a", in_force=False)
    assert promises.of(job("gone", "other")) is None
    assert promises.slots_of("gone") == 2


def test_former_rules_are_kept_only_while_jobs_need_them():
    promises = Promises({"gone": OLD}, "a")
    promises.use({}, "b", [])
    assert promises.of(job("gone", "a")) is None
    promises.remember({"a": {"gone": OLD}})
    promises.use({}, "c", ["a", "b"])
    assert promises.of(job("gone", "a")) == Promise(OLD, "a", in_force=False)


def test_former_rules_are_kept_if_the_needed_are_unknown():
    promises = Promises({"gone": OLD}, "a")
    promises.use({}, "b", None)
    assert promises.of(job("gone", "a")) == Promise(OLD, "a", in_force=False)
    for number in range(MOST_SNAPSHOTS):
        promises.use({}, str(number), None)
    assert promises.of(job("gone", "a")) is None


def test_a_job_that_alone_is_interrupted_is_given_up():
    interruptions = Interruptions()
    reasons = [interruptions.note(1, ended=number) for number in range(MOST_INTERRUPTIONS)]
    assert reasons[:-1] == [None] * (MOST_INTERRUPTIONS - 1)
    assert reasons[-1] == f"interrupted {MOST_INTERRUPTIONS} times while other hooks ran to their end"


def test_a_job_is_not_given_up_if_nothing_else_ends_either():
    interruptions = Interruptions()
    assert {interruptions.note(1, ended=5) for _ in range(5 * MOST_INTERRUPTIONS)} == {None}


def test_pauses_after_interruptions_grow_and_end_with_success():
    interruptions = Interruptions()
    pauses = []
    for _ in range(9):
        interruptions.note(1, ended=0)
        pauses.append(interruptions.pause_s(1, 0.5))
    assert pauses == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    interruptions.forget(1)
    interruptions.note(1, ended=0)
    assert interruptions.pause_s(1, 0.5) == 0


def test_a_rule_waits_when_several_of_its_jobs_cannot_start():
    """Its pauses grow with each round, not with each job. A job that alone cannot be started holds no other."""
    postponements, now_ns = Postponements(), 5 * NS
    assert postponements.note("r", 1, now_ns) == (now_ns + NS, False)
    assert postponements.note("r", 1, now_ns + NS) == (now_ns + 3 * NS, False)
    assert postponements.note("r", 2, now_ns + 2 * NS) == (now_ns + 3 * NS, False)
    assert postponements.note("r", 3, now_ns + 2 * NS, alone=True) == (now_ns + 3 * NS, False)
    assert postponements.note("other", 4, now_ns) == (now_ns + NS, False)
    assert postponements.note("r", 5, now_ns + 2 * NS) == (now_ns + 3 * NS, True)
    assert postponements.note("r", 1, now_ns + 3 * NS) == (now_ns + 7 * NS, True)
    postponements.forget("r")
    assert postponements.note("r", 1, now_ns) == (now_ns + NS, False)
    longest_ns = max(postponements.note("r", 1, n * 100 * NS)[0] - n * 100 * NS for n in range(1, 50))
    assert longest_ns == 30 * NS
