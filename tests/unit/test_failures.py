"""An unexpected exception costs one event or one match, with a record that has its traceback; the others go on."""

from types import SimpleNamespace
from typing import Any

import pytest
from unit.hookkit import Records
from unit.process.machine import INIT, SECOND, WHAT, Machine, MachineProcFs
from unit.test_dispatch import NoHooks

from cnprocd.connector.ahead import nothing_ahead
from cnprocd.connector.event import Exit
from cnprocd.connector.source import Batch, Losses
from cnprocd.connector.taskrecord import ReadRecords
from cnprocd.crowd import MOST_QUEUED
from cnprocd.dispatch import Dispatcher
from cnprocd.failures import Failures
from cnprocd.output.match_id import UNKNOWN_MACHINE
from cnprocd.pipeline import LEAST_EVENTS, MOST_RECOVERED, Pipeline
from cnprocd.process.death import Death
from cnprocd.process.model import EVERYTHING
from cnprocd.process.tracker import Tracker
from cnprocd.process.tracking import Tracking
from cnprocd.recovery import Recovery
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.load import load

MACHINE = UNKNOWN_MACHINE._replace(boot_id="b" * 32)
OWN, VICTIMS = 50, (60, 61, 62)
RULES = """rules:
  - {name: logged, events: [nonzero_exit], match: {comm: worker}, rate_limit: {count: 100, per: 1s}}
  - {name: hooked, events: [nonzero_exit], match: {comm: worker}, run: {command: [/bin/true]}}
"""


class Line:
    """The pipeline with its real parts, on three processes of a machine in memory that fail in one batch."""

    def __init__(self, directory):
        file = directory / "rules.yaml"
        file.write_text(RULES)
        loaded = load(file)
        machine = Machine(own=OWN)
        for pid in VICTIMS:
            machine.put(pid, INIT, "worker", exe="/bin/worker")
        procfs: Any = MachineProcFs(machine.proc())
        procfs.user_name = lambda uid: None
        self.log = Records()
        failures = Failures(self.log, lambda: 100.0)  # the time stands
        tracking = Tracking(True, False, EVERYTHING, frozenset({"exit"}), frozenset())
        self.tracker = Tracker(tracking, procfs, OWN, failures=failures)
        self.tracker.adopt(procfs.scan(EVERYTHING))
        self.matcher = Matcher(loaded.rules)
        self.dispatcher: Any = Dispatcher(directory, loaded, self.log, NoHooks(), failures=failures)
        scheduler: Any = self.dispatcher.scheduler
        scheduler.wake = lambda: None
        self.matched_at_blanking: list[list[Any]] = []
        source = SimpleNamespace(
            drain=self.drain,
            look_ahead=nothing_ahead,
            looked_ahead=False,
            shed=lambda sheds: None,
            losses=Losses(),
            count_losses=lambda: None,
            rejects=SimpleNamespace(total=lambda: 0),
            blank_slots=lambda tids: self.matched_at_blanking.append(self.matched("hooked")),
        )
        recovery = Recovery(source, self.tracker, procfs, None, self.log)
        self.pipeline = Pipeline(
            source, self.tracker, self.matcher, self.dispatcher, recovery, procfs, self.log, MACHINE, failures=failures
        )

    def drain(self, most, all_records):
        return Batch([failure_of(pid) for pid in VICTIMS], ReadRecords(), False, False)

    def matched(self, rule):
        return [fields["pid"] for fields in self.log.of("rule_matched", rule=rule)]


def failure_of(pid):
    at_ns = 5_000 * SECOND + pid
    return Exit(WHAT[Exit], 0, at_ns, pid, pid, 256, 17, INIT, INIT)


def raises_for(real, pid, pid_of):
    """Return `real`, but raising for one process."""

    def call(one, *rest):
        if pid_of(one) == pid:
            raise ZeroDivisionError(f"\x1b[2Ja\nb {pid}")
        return real(one, *rest)

    return call


def of_occurrence(occurrence):
    return occurrence.process.tgid


def of_record(record):
    return record["pid"]


def of_recorded(recorded):
    return recorded.record["pid"]


@pytest.fixture
def line(tmp_path):
    made = Line(tmp_path)
    yield made
    made.dispatcher.spool.close()


def test_without_an_exception_every_match_is_delivered(line):
    line.pipeline.turn()
    assert line.matched("logged") == line.matched("hooked") == list(VICTIMS)
    assert line.pipeline.failures.count == 0


def break_evaluation(line):
    line.matcher.match = raises_for(line.matcher.match, 61, of_occurrence)


def break_identification(line):
    line.tracker._handlers[Exit] = raises_for(line.tracker._handlers[Exit], 61, lambda event: event.process_tgid)


def break_job(line):
    line.dispatcher._request = raises_for(line.dispatcher._request, 61, of_recorded)


def break_commit(line):
    """The spool raises for a batch with one of its requests, and for that one alone."""
    real = line.dispatcher.spool.enqueue

    def enqueue(requests, *in_commit):
        if any(request.event["pid"] == 61 for request in requests):
            raise ZeroDivisionError("\x1b[2J61")
        return real(requests, *in_commit)

    line.dispatcher.spool.enqueue = enqueue


def break_throttle(line):
    throttle = line.dispatcher._throttles["logged"]
    line.dispatcher._throttles["logged"] = SimpleNamespace(admit=raises_for(throttle.admit, 61, of_record))


def break_log(line):
    line.dispatcher._log_match = raises_for(line.dispatcher._log_match, 61, of_recorded)


@pytest.mark.parametrize(
    ("break_it", "step", "failed", "logged", "jobs"),
    [
        (break_evaluation, "evaluate", 1, [60, 62], 2),
        (break_identification, "identify", 1, [60, 62], 2),
        (break_job, "dispatch", 1, [60, 61, 62], 2),
        (break_commit, "dispatch", 1, [60, 61, 62], 2),
        (break_throttle, "dispatch", 1, [60, 61, 62], 3),
        (break_log, "log", 2, [60, 62], 3),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_an_exception_costs_one_match_of_the_batch(line, break_it, step, failed, logged, jobs):
    break_it(line)
    line.pipeline.turn()
    line.pipeline.flush_log()
    assert line.matched("logged") == logged
    assert line.dispatcher.spool.counts().waiting == jobs
    assert line.pipeline.failures.count == failed
    record, *rest = line.log.of("event_failed")
    assert sum(one["count"] for one in (record, *rest)) == failed
    assert record["step"] == step
    assert any("ZeroDivisionError" in text for text in record["traceback"])
    assert all(text.isprintable() for text in (record["message"], record["subject"], *record["traceback"]))


def test_many_exceptions_make_one_record_in_ten_seconds(line):
    line.matcher.match = raises_for(line.matcher.match, 61, of_occurrence)
    for _ in range(50):
        line.pipeline._evaluate([SimpleNamespace(kind="uid", process=SimpleNamespace(tgid=61, comm="worker"))])
    assert len(line.log.of("event_failed")) == 1
    line.pipeline.flush_log()
    assert [record["count"] for record in line.log.of("event_failed")] == [1, 49]


GONE = SimpleNamespace(kind="uid", process=SimpleNamespace(tgid=61, comm="worker"))


def test_a_stop_evaluates_lost_deaths_for_a_bounded_time(line):
    """After an overrun thousands may be left. How many is in the record of the stop."""
    times = iter(range(100))
    line.pipeline._clock = lambda: float(next(times))
    line.tracker.without_event = lambda waiting: [GONE] * (MOST_RECOVERED * 5)
    line.matcher.match = lambda occurrence: []
    assert 0 < line.pipeline.finish() < MOST_RECOVERED * 5


def in_a_flood(line):
    """Let each batch be one of a flood that has used up its budgets."""
    line.pipeline.flood.note_batch = lambda *times: None
    line.pipeline.flood.active = True
    line.pipeline.flood.admits = lambda *of: False


def test_a_floods_matches_are_reported_when_no_events_wait(line):
    """Those with a hook at once. The throttle of the others is asked once."""
    in_a_flood(line)
    line.pipeline.source.drain = lambda most, all_records: Batch(
        [failure_of(pid) for pid in VICTIMS], ReadRecords(), True, False
    )
    line.pipeline.turn()
    assert (line.matched("logged"), line.matched("hooked")) == ([], list(VICTIMS))
    assert len(line.pipeline.deferred) == len(VICTIMS)
    assert line.pipeline.again_s is not None
    line.pipeline.source.drain = lambda most, all_records: Batch([], ReadRecords(), False, False)
    line.pipeline.turn()
    assert line.matched("logged") == list(VICTIMS)
    assert line.pipeline.again_s is None
    assert not line.pipeline.flood.counted


@pytest.mark.parametrize("is_commit", [True, False])
def test_the_wait_for_a_commit_makes_no_batch_smaller(line, is_commit):
    """Smaller batches would wait more often, and each match of a flood of hooks for longer."""
    now_s, real = [100.0, 0.0], line.dispatcher.spool.enqueue
    line.pipeline._clock, line.pipeline._waited_s = lambda: now_s[0], lambda: now_s[1]

    def enqueue(requests, *in_commit):
        now_s[0] += 0.1
        now_s[1] += 0.1 if is_commit else 0.0
        return real(requests, *in_commit)

    line.dispatcher.spool.enqueue = enqueue
    before = line.pipeline._most
    line.pipeline.turn()
    assert line.pipeline._most == (before if is_commit else LEAST_EVENTS)


def test_deferred_matches_wait_while_the_log_is_slow(line):
    in_a_flood(line)
    queued = MOST_QUEUED
    line.pipeline._log_queued = lambda: queued
    line.pipeline.turn()
    assert line.matched("logged") == []
    queued = 0
    line.pipeline.turn()
    assert line.matched("logged") == list(VICTIMS)


def test_a_stop_counts_what_the_log_has_no_room_for(line):
    in_a_flood(line)
    line.pipeline._log_queued = lambda: MOST_QUEUED
    line.pipeline.turn()
    line.pipeline.flush_log()
    (counted,) = line.log.of("matches_counted")
    assert (counted["rule"], counted["count"]) == ("logged", len(VICTIMS))


def test_an_exception_in_the_housekeeping_costs_one_death(line):
    """Exit records whose events were lost: one of them is not understood, the others are deaths."""
    died = line.tracker._died
    line.tracker._died = raises_for(died, 61, lambda death: death.tgid)
    line.tracker.deaths.without_event = lambda waited: [death_of(pid) for pid in VICTIMS]
    found = line.tracker.without_event({})
    assert [occurrence.process.tgid for occurrence in found] == [60, 62]
    line.tracker.deaths.record = raises_for(line.tracker.deaths.record, 61, lambda record: record)
    assert list(line.tracker.take([], [61], 0)) == []
    assert line.pipeline.failures.count == 2


def death_of(pid):
    return Death(pid, 256, failure_of(pid), None, None)
