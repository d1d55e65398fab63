"""dispatch.py: matches through the throttles into a real spool. No hook is started: there is no event loop."""

import asyncio
import itertools
import time

import pytest
from unit.hookkit import Records

from cnprocd.delivery import Fate, RecordedMatch
from cnprocd.dispatch import LEAST_PAST, MOST_PAST, Dispatcher, gather_of
from cnprocd.output.match_id import Machine
from cnprocd.output.record import match_record
from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.load import load
from cnprocd.spool.rows import CountFilter

NS = 1_000_000_000
_PIDS = itertools.count(1000)
MACHINE = Machine("db1", "5" * 32, "b" * 32)


class NoHooks:
    """A HookRegistry for rules that run nothing."""

    def follow(self):
        raise AssertionError("a hook was started")

    def register_hook(self, hook_pid):
        raise AssertionError("a hook was started")

    def register_runner(self, runner_pid):
        raise AssertionError("a hook was started")


@pytest.fixture
def dispatcher_of(tmp_path):
    """Return a function that makes a dispatcher of the text of a rule file."""
    made = []

    def make(text):
        file = tmp_path / "rules.yaml"
        file.write_text(text)
        loaded = load(file)
        dispatcher = Dispatcher(tmp_path, loaded, Records(), NoHooks())
        made.append(dispatcher)
        return dispatcher, Matcher(loaded.rules)

    yield make
    for dispatcher in made:
        dispatcher.spool.close()


def death(matcher, at_s, comm="worker", **fields):
    """Return the recorded matches of a death with exit code 1."""
    at_ns = None if at_s is None else int(at_s * NS)
    process = Process(next(_PIDS), 1, comm=comm, start_ns=1)
    for name, value in fields.items():
        setattr(process, name, value)
    occurrence = Occurrence("exit", process, process.tgid, 256, at_ns, recovered=at_ns is None)
    unique = str(next(_PIDS))
    return [
        RecordedMatch(match, match_record(match, machine=MACHINE, unique=unique), None)
        for match in matcher.match(occurrence)
    ]


def rules_of(tmp_path, text):
    file = tmp_path / "other.yaml"
    file.write_text(text)
    return load(file).rules


def held(matches):
    return [one.record.get("held_by") for one in matches]


def test_after_counts_by_the_kernels_time(dispatcher_of):
    """Three deaths 3 s apart are delivered in one batch, after a stall of the daemon: they are not within 2 s."""
    rule = "rules: [{name: r, events: [nonzero_exit], after: {count: 3, within: 2s}}]"
    dispatcher, matcher = dispatcher_of(rule)
    slow = [match for at_s in (100, 103, 106) for match in death(matcher, at_s)]
    dispatcher.deliver(slow)
    assert held(slow) == ["after"] * 3
    fast = [match for at_s in (200, 200.5, 201) for match in death(matcher, at_s)]
    dispatcher.deliver(fast)
    assert held(fast) == ["after", "after", None]


def test_cooldown_and_rate_limit_use_the_kernels_time(dispatcher_of):
    rules = """rules:
  - {name: cooling, events: [nonzero_exit], cooldown: 2s}
  - {name: limited, events: [nonzero_exit], rate_limit: {count: 1, per: 2s}}"""
    dispatcher, matcher = dispatcher_of(rules)
    batch = [match for at_s in (100, 101, 103) for match in death(matcher, at_s)]
    dispatcher.deliver(batch)
    assert held(batch) == [None, None, "cooldown", "rate_limit", None, None]


def test_the_history_has_matches_of_each_rule_in_a_flood(dispatcher_of):
    """A user's loop made more than 1,000 matches between two ticks, and a match of another rule was left out."""
    rules = """rules:
  - {name: flooded, events: [nonzero_exit], match: {comm: loop}}
  - {name: quiet, events: [nonzero_exit], match: {comm: worker}}"""
    dispatcher, matcher = dispatcher_of(rules)
    dispatcher.deliver([match for _ in range(MOST_PAST + 5) for match in death(matcher, 100, "loop")])
    dispatcher.deliver([match for _ in range(LEAST_PAST + 2) for match in death(matcher, 101)])
    assert dispatcher.not_remembered == 5 + 2
    dispatcher.store_past_matches()
    dispatcher.deliver(death(matcher, 102, "loop"))
    assert dispatcher.not_remembered == 5 + 2, "counted anew after each tick"
    dispatcher.store_past_matches()
    count = asyncio.run(dispatcher.spool.count_matches(CountFilter("rule", 0, time.time_ns(), 10**18)))
    assert {one.key: one.count for one in count.value} == {"flooded": MOST_PAST + 1, "quiet": LEAST_PAST}


def test_recovered_matches_are_counted_at_their_detection(dispatcher_of):
    dispatcher, matcher = dispatcher_of("rules: [{name: r, events: [exit], after: {count: 2, within: 1h}}]")
    batch = [match for _ in range(2) for match in death(matcher, None)]
    dispatcher.deliver(batch)
    assert held(batch) == ["after", None]


def test_discarded_counts_are_logged(dispatcher_of, monkeypatch):
    monkeypatch.setattr("cnprocd.spool.throttle.MOST_KEYS", 2)
    monkeypatch.setattr("cnprocd.spool.throttle.DISCARDS_EVERY_NS", 0)
    rule = "rules: [{name: r, events: [nonzero_exit], after: {count: 2, within: 1h, by: comm}}]"
    dispatcher, matcher = dispatcher_of(rule)
    dispatcher.deliver([match for comm in "abcd" for match in death(matcher, 100, comm)])
    assert dispatcher.holds_back
    dispatcher.tick()
    (record,) = dispatcher._log.of("throttle_keys_discarded")
    assert (record["rule"], record["held_by"], record["by"]) == ("r", "after", "comm")
    assert (record["count"], record["limit"]) == (2, 2)


def test_coalesce_by_a_field_gathers_equal_values_only(dispatcher_of):
    rule = """rules:
  - name: r
    events: [nonzero_exit]
    coalesce: {window: 1h, by: comm}
    run: {command: [/bin/true], timeout: 1s}"""
    dispatcher, matcher = dispatcher_of(rule)
    matches = [match for comm in ("a", "b", "a", None, None) for match in death(matcher, 100, comm)]
    keys = [gather.key if (gather := gather_of(one.match.rule.rule, one.record)) else None for one in matches]
    assert keys == ["r/comm=a", "r/comm=b", "r/comm=a", None, None]
    dispatcher._submit(matches)
    ids = [one.record["job_id"] for one in matches]
    assert ids[0] == ids[2] and len(set(ids)) == 4


def test_deaths_of_one_pid_at_unknown_times_have_their_own_keys(dispatcher_of):
    """After three overruns, without a table: neither the time of the death nor that of the start is known."""
    rule = "rules: [{name: a, events: [nonzero_exit], on_unknown_exit: match, run: {command: [/bin/true]}}]"
    dispatcher, matcher = dispatcher_of(rule)
    unknown = [death(matcher, None, tgid=77, start_ns=None)[0] for _ in range(3)]
    assert len({one.record["match_id"] for one in unknown}) == 3
    dispatcher._submit(unknown)
    assert len({one.record["job_id"] for one in unknown}) == dispatcher.spool.counts().waiting == 3
    started = [death(matcher, None, tgid=77, start_ns=5)[0].record["match_id"] for _ in range(2)]
    assert len(set(started)) == 1, "seen twice"


def test_what_is_held_back_is_logged_at_reload_and_end(dispatcher_of, tmp_path):
    """The counts of open windows, if the limits change or the daemon stops."""

    def rules(count):
        return f"rules: [{{name: r, events: [nonzero_exit], rate_limit: {{count: {count}, per: 1h}}}}]"

    dispatcher, matcher = dispatcher_of(rules(1))
    dispatcher.deliver([match for _ in range(4) for match in death(matcher, 100)])
    throttled = dispatcher._log.of("throttled")
    assert not throttled
    dispatcher._use_throttles(rules_of(tmp_path, rules(2)))
    assert [record["count"] for record in dispatcher._log.of("throttled")] == [3]
    dispatcher.deliver([match for _ in range(7) for match in death(matcher, 200)])
    asyncio.run(dispatcher.stop(0.0))
    assert [record["count"] for record in dispatcher._log.of("throttled")] == [3, 5]


# -- before the record is made, in a flood ---------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["rule", "comm", "uid"])
def test_a_throttle_decides_without_a_record(dispatcher_of, by):
    """And once for each match: what it let pass is not counted again when the match is delivered."""
    rule = f"rules: [{{name: r, events: [nonzero_exit], rate_limit: {{count: 2, per: 1m, by: {by}}}}}]"
    dispatcher, matcher = dispatcher_of(rule)
    matches = [match for second in range(5) for match in death(matcher, 100 + second, uid=7)]
    fates = [dispatcher.decide(recorded.match) for recorded in matches]
    assert fates == [Fate.PASSES, Fate.PASSES, Fate.HELD, Fate.HELD, Fate.HELD]
    passed = matches[:2]
    dispatcher.deliver(passed)
    assert held(passed) == [None, None]
    (further,) = death(matcher, 106, uid=7)
    dispatcher.deliver([further])
    assert held([further]) == ["rate_limit"]


def test_a_throttle_by_a_strange_comm_has_one_key(dispatcher_of):
    """The early key equals the key of the record, also if the comm must be escaped."""
    rule = "rules: [{name: r, events: [nonzero_exit], rate_limit: {count: 1, per: 1m, by: comm}}]"
    dispatcher, matcher = dispatcher_of(rule)
    (first,) = death(matcher, 100, comm="a\udcff\n")
    dispatcher.deliver([first])
    (second,) = death(matcher, 101, comm="a\udcff\n")
    assert dispatcher.decide(second.match) is Fate.HELD


@pytest.mark.parametrize(("by", "known"), [("exe", {"exe": "/bin/x"}), ("comm", {"comm": None}), ("uid", {})])
def test_a_throttle_that_needs_the_record_is_left_open(dispatcher_of, by, known):
    rule = f"rules: [{{name: r, events: [nonzero_exit], cooldown: {{for: 1m, by: {by}}}}}]"
    dispatcher, matcher = dispatcher_of(rule)
    (recorded,) = death(matcher, 100, **known)
    assert dispatcher.decide(recorded.match) is Fate.OPEN


def test_a_full_queue_drops_without_a_record(dispatcher_of, monkeypatch):
    """Only while it is full, and only of the rule that has filled it. Each is counted as a dropped job."""
    monkeypatch.setattr("cnprocd.dispatch.time.monotonic", lambda: now_s)
    now_s = 50.0
    rules = """
settings: {queue_limit: 3}
rules:
  - {name: a, events: [nonzero_exit], match: {comm: a}, run: {command: [/bin/true]}}
  - {name: b, events: [nonzero_exit], match: {comm: b}, run: {command: [/bin/true]}}
"""
    dispatcher, matcher = dispatcher_of(rules)
    dispatcher.scheduler.wake = lambda: None
    for second in range(3):
        (match,) = death(matcher, second, comm="a")
        assert dispatcher.decide(match.match) is Fate.PASSES
        dispatcher.deliver([match])
    (fourth,) = death(matcher, 4, comm="a")
    assert dispatcher.decide(fourth.match) is Fate.PASSES, "nothing was dropped yet"
    dispatcher.deliver([fourth])
    (fifth,), (other,) = death(matcher, 5, comm="a"), death(matcher, 5, comm="b")
    assert dispatcher.decide(fifth.match) is Fate.DROPPED
    assert dispatcher.decide(other.match) is Fate.PASSES
    now_s += 1
    assert dispatcher.decide(fifth.match) is Fate.PASSES
    dispatcher.tick()
    assert dispatcher.spool.counts().shed == 2
