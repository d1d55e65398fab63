"""postponing.py: jobs of a flood wait in the backlog, and are made, logged and kept as those that are made at once."""

import asyncio
import zlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from unit.hookkit import Records
from unit.test_dispatch import NoHooks, death

from cnprocd.control.verbs import verbs_of
from cnprocd.delivery import Fate
from cnprocd.dispatch import Dispatcher
from cnprocd.flood import Flood
from cnprocd.postponing import AGAIN_S, AT_ONCE, DISK_S, EVENTS_TO_JOBS, MOST_AGAIN_S
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.load import load
from cnprocd.spool.spool import Spool
from cnprocd.stalls import Stalls

RULES = """
settings: {queue_limit: 100}
rules:
  - {name: a, events: [nonzero_exit], match: {comm: a}, log: {level: error, message: "{pid} is gone"},
     run: {command: [/bin/true]}}
  - {name: b, events: [nonzero_exit], match: {comm: b}, run: {command: [/bin/true]}}
  - {name: logged, events: [nonzero_exit], match: {comm: [a, b]}}
"""


class World:
    """Dispatchers on one state and one runtime directory, one after the other."""

    def __init__(self, directory):
        self.directory = directory
        self.file = directory / "rules.yaml"
        self.file.write_text(RULES)
        self.start()

    def load(self):
        return replace(load(self.file), snapshot=str(zlib.crc32(self.file.read_bytes())))

    def start(self):
        """Start the next daemon. The one before is killed."""
        loaded = self.load()
        self.log, self.matcher = Records(), Matcher(loaded.rules)
        self.dispatcher: Any = Dispatcher(self.directory, loaded, self.log, NoHooks(), runtime_dir=self.directory)
        scheduler: Any = self.dispatcher.scheduler
        scheduler.wake = lambda: None

    def fail(self, comm, has_time=True, at_s=1):
        """Deliver the matches of a death, and return its PID."""
        matches = [
            one._replace(has_time=has_time and one.match.runs_hook) for one in death(self.matcher, at_s, comm=comm)
        ]
        self.dispatcher.deliver(matches)
        return matches[0].record["pid"]

    def matched(self, rule):
        return [fields["pid"] for fields in self.log.of("rule_matched", rule=rule)]

    def jobs(self):
        return self.dispatcher.spool.counts().waiting


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.dispatcher.spool.close()


def test_a_job_that_has_time_is_made_and_logged_later(world):
    """Its rule's other matches wait behind it. Rules without a hook, and other rules, do not."""
    first, second, other = world.fail("a"), world.fail("a", has_time=False), world.fail("b", has_time=False)
    assert (world.matched("a"), world.matched("b"), world.jobs()) == ([], [other], 1)
    assert world.matched("logged") == [first, second, other]
    assert world.dispatcher.again_s
    (deferred,) = world.log.of("hooks_deferred")
    assert (deferred["count"], deferred["rules"]) == (1, ["a"])
    world.dispatcher.catch_up(10.0)
    assert (world.matched("a"), world.jobs()) == ([first, second], 3)
    records = world.log.of("rule_matched", rule="a")
    assert [(record["message"], record["job_id"]) for record in records] == [
        (f"{first} is gone", 2),
        (f"{second} is gone", 3),
    ]
    assert world.dispatcher.again_s is None
    assert world.fail("a", has_time=False) == world.matched("a")[-1]
    assert len(world.dispatcher._past) == 8


def test_while_events_wait_jobs_are_made_in_a_share_of_the_time(world, monkeypatch):
    monkeypatch.setattr("cnprocd.postponing.time.monotonic", lambda: now_s)
    now_s = 50.0
    commit = world.dispatcher.postponing._commit

    def slow_commit(requests):
        nonlocal now_s
        now_s += 0.005
        return commit(requests)

    world.dispatcher.postponing._commit = slow_commit
    for _ in range(3 * AT_ONCE):
        world.fail("a")
    world.dispatcher.catch_up(0.0)
    assert world.jobs() == AT_ONCE
    now_s += 0.004 * EVENTS_TO_JOBS
    world.dispatcher.catch_up(0.0)
    assert world.jobs() == AT_ONCE, "too early"
    now_s += 0.002 * EVENTS_TO_JOBS
    world.dispatcher.catch_up(0.0)
    assert world.jobs() == 2 * AT_ONCE
    world.dispatcher.catch_up(1.0)
    assert world.jobs() == 3 * AT_ONCE


def test_a_request_waits_until_its_job_is_on_the_disk(world, monkeypatch):
    """Meanwhile no more jobs are made, up to a bound. The next daemon makes them again, and knows their keys."""
    monkeypatch.setattr("cnprocd.postponing.time.monotonic", lambda: now_s)
    monkeypatch.setattr(Spool, "durable", property(lambda spool: answers))
    now_s, answers = 50.0, True
    for _ in range(3 * AT_ONCE):
        world.fail("a")
    answers = False
    world.dispatcher.catch_up(1.0)
    assert (world.jobs(), len(world.dispatcher.postponing.backlog)) == (0, 3 * AT_ONCE)
    answers = True
    commit = world.dispatcher.postponing._commit

    def late_commit(requests):
        nonlocal answers
        answers = False
        return commit(requests)

    world.dispatcher.postponing._commit = late_commit
    world.dispatcher.catch_up(1.0)
    assert world.dispatcher.again_s == AGAIN_S
    now_s += DISK_S / 2
    world.dispatcher.catch_up(1.0)
    assert (world.jobs(), len(world.dispatcher.postponing.backlog)) == (AT_ONCE, 3 * AT_ONCE)
    assert world.dispatcher.again_s == MOST_AGAIN_S, "for the disk the loop need not turn all the time"
    answers = True
    world.dispatcher.catch_up(0.0)
    assert (world.jobs(), len(world.dispatcher.postponing.backlog)) == (2 * AT_ONCE, 2 * AT_ONCE)
    now_s += DISK_S / 2
    world.dispatcher.catch_up(1.0)
    assert world.jobs() == 2 * AT_ONCE
    now_s += DISK_S
    assert world.dispatcher.again_s == AGAIN_S
    world.dispatcher.catch_up(1.0)
    assert (world.jobs(), world.dispatcher.again_s) == (3 * AT_ONCE, None)


def test_the_next_daemon_makes_the_jobs_of_one_that_was_killed(world):
    """It was killed after it had committed some of them, and before they were taken out of the backlog."""
    pids = [world.fail("a") for _ in range(5)]
    world.dispatcher.postponing.backlog.remove = lambda done: None
    world.dispatcher.catch_up(0.0)
    assert world.jobs() == 5
    world.dispatcher.spool.close()  # the file is not locked any more
    world.start()
    assert world.dispatcher.again_s
    assert world.dispatcher.spool.snapshots(9) == [world.dispatcher.scheduler.promises.snapshot]
    world.dispatcher.catch_up(10.0)
    assert (world.jobs(), world.dispatcher.spool.duplicates) == (5, 5)
    assert world.matched("a") == pids


def test_a_rule_that_is_gone_keeps_what_was_promised(world):
    """The rules that a waiting job refers to are kept, as those of jobs are."""
    world.fail("a")
    before = world.dispatcher.scheduler.promises.snapshot
    world.file.write_text(RULES.replace("name: a,", "name: other,"))
    world.dispatcher.use(world.load())
    assert world.dispatcher.scheduler.promises.snapshot != before
    world.dispatcher.catch_up(1.0)
    (job,) = world.dispatcher.spool.due(1)
    promise = world.dispatcher.scheduler.promises.of(job)
    assert (job.snapshot, promise.snapshot, promise.in_force) == (before, before, False)


def test_without_room_in_the_backlog_jobs_are_made_at_once(world):
    world.dispatcher.postponing.backlog.append = lambda requests: False
    pid = world.fail("a")
    assert (world.matched("a"), world.jobs(), world.dispatcher.again_s) == ([pid], 1, None)


def test_a_rule_that_has_filled_its_part_drops_its_own_alone(world):
    """Each match is reported or counted as dropped. The other rule's job is made at once."""
    for _ in range(100):
        world.fail("a")
    (further,), (other,) = (death(world.matcher, 2, comm=comm)[:1] for comm in "ab")
    assert world.dispatcher.decide(further.match) is Fate.DROPPED
    assert world.dispatcher.decide(other.match) is Fate.PASSES
    world.dispatcher.tick()
    assert world.dispatcher.spool.counts().shed == 1
    world.fail("b", has_time=False)
    world.dispatcher.catch_up(10.0)
    assert (world.dispatcher.spool.queues()["b"].waiting, world.jobs()) == (1, 100)
    assert world.dispatcher.spool.counts().shed == 2


def test_what_cannot_be_read_back_is_counted_as_dropped(world):
    world.fail("a")
    world.dispatcher.postponing.backlog.oldest = lambda most: []
    world.dispatcher.catch_up(1.0)
    assert world.dispatcher.again_s is None
    assert world.dispatcher.spool.shedding.by_rule == {"a": 1}


def test_a_stop_reports_what_it_leaves_to_the_next_daemon(world):
    world.fail("a")
    world.dispatcher.postponing.stop()
    _, last = world.log.of("hooks_deferred")
    assert last["waiting"] == 1
    world.dispatcher.catch_up(1.0)
    world.dispatcher.postponing.stop()
    assert len(world.log.of("hooks_deferred")) == 2


def test_deferred_jobs_are_dropped_with_those_that_wait(world):
    """Their matches were not reported: they are counted."""
    made = world.fail("a", has_time=False)
    for name in ("a", "a", "b"):
        world.fail(name)
    flood = Flood()
    pipeline, stalls = SimpleNamespace(flood=flood), Stalls(world.log)
    daemon: Any = SimpleNamespace(dispatcher=world.dispatcher, pipeline=pipeline, stalls=stalls)
    drop: Any = verbs_of(daemon)["drop_waiting"].run
    assert asyncio.run(drop({"rule": "a"})) == {"job_ids": [1], "deferred": 2}
    assert (flood.counted, flood.take_unreported()) == ({"a": 2}, {"a": 2})
    world.dispatcher.catch_up(10.0)
    assert (world.matched("a"), len(world.matched("b")), world.dispatcher.again_s) == ([made], 1, None)
    assert not world.log.of("queue_full")
