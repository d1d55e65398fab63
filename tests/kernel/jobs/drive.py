"""Carry out a schedule on a World, and return what must not have happened (verdict.py)."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from kernel.blocking import fork_storm, stopped
from kernel.harness import PATIENCE_S
from kernel.jobs import schedule, verdict
from kernel.jobs.schedule import Disturb, Fail, Schedule
from kernel.jobs.world import LONG_S, World, spool_process, until

MOST_WAITING = 12  # of one rule before the next process fails: below its share of the queue
ASK_EVERY = 10  # failures
DRAIN_S = 300.0  # for the jobs that wait at the end


def run(directory: Path, plan: Schedule) -> verdict.Verdict:
    """Carry out one schedule."""
    with contextlib.closing(World(directory, apart=plan.apart)) as world:
        world.start_runner()
        world.start_daemon()
        world.note_drops()
        for number, step in enumerate(plan.steps):
            if isinstance(step, Fail):
                world.failer.fail(step.rule, step.comm)
            else:
                disturb(world, step)
            if number % ASK_EVERY == 0:
                until("shorter queues", lambda: _short(world), DRAIN_S)
        world.journal.add("> step end")
        world.mark()
        world.note_drops()
        until("the end of all jobs", lambda: _idle(world), DRAIN_S)
        world.end_daemon(signal.SIGTERM)
        world.await_spool_closed()
        world.end_runner(signal.SIGTERM)
        found = verdict.of(world.journal.lines(), _states(world))
        found.problems += [f"a bug in cnprocd: {bug}" for bug in world.bugs]
        return found


def _short(world: World) -> bool:
    queues = world.status().get("queues", ())
    assert isinstance(queues, list | tuple)
    return all(queue["waiting"] <= MOST_WAITING for queue in queues if queue["rule"] != schedule.FLOOD)


def _idle(world: World) -> bool:
    jobs = world.status()
    return bool(jobs) and not jobs["waiting"] and not jobs["running"]


def _states(world: World) -> dict[str, int]:
    """Return the number of jobs by state and reason at the end."""
    with contextlib.closing(sqlite3.connect(world.state / "spool.sqlite3")) as db:
        rows = db.execute("SELECT state || coalesce(' ' || reason, ''), count(*) FROM jobs GROUP BY 1").fetchall()
    return dict(rows)


def disturb(world: World, step: Disturb) -> None:
    """Do one thing to cnprocd, and bring it back into service."""
    world.journal.add(f"> step {step.what}")
    _STEPS[step.what](world, step)
    world.note_drops()


def _gap(world: World, step: Disturb) -> None:
    for fail in step.gap:
        world.failer.fail(fail.rule, fail.comm)


@contextlib.contextmanager
def _at_random_instant(world: World, step: Disturb):
    """The block runs while a process fails, or a moment later."""
    fail = Fail("keyed", schedule.KINDS["keyed"][0])
    serial = world.failer.begin(fail.comm)
    time.sleep(step.pause_s)  # the instant of the schedule, not a wait for anything
    yield
    world.failer.ended(fail.rule, fail.comm, serial)


def _kill_daemon(world: World, step: Disturb) -> None:
    with _at_random_instant(world, step):
        world.end_daemon(signal.SIGKILL)
    world.await_spool_closed()
    _gap(world, step)
    world.start_daemon()


def _stop_daemon(world: World, step: Disturb) -> None:
    with _at_random_instant(world, step):
        world.end_daemon(signal.SIGTERM)
    world.await_spool_closed()
    _gap(world, step)
    world.start_daemon()


def _kill_spool(world: World, step: Disturb) -> None:
    assert world.daemon is not None
    with _at_random_instant(world, step):
        pid = spool_process(world.daemon.pid)
        if pid:
            world.journal.add("> volatile")
            os.kill(pid, signal.SIGKILL)
    _gap(world, step)
    world.await_durable()


def _end_runner(number: signal.Signals) -> Callable[[World, Disturb], None]:
    def end(world: World, step: Disturb) -> None:
        with _at_random_instant(world, step):
            world.end_runner(number)
        _gap(world, step)
        world.start_runner()

    return end


def _kill_both(world: World, step: Disturb) -> None:
    with _at_random_instant(world, step):
        world.end_runner(signal.SIGKILL)
        world.end_daemon(signal.SIGKILL)
    world.await_spool_closed()
    _gap(world, step)
    world.start_runner()
    world.start_daemon()


# -- rules -------------------------------------------------------------------------------------------------------


def _reload_good(world: World, step: Disturb) -> None:
    _gap(world, step)
    world.load_new_rules()


def _reload_bad(world: World, step: Disturb) -> None:
    outcome = world.reload(world.rules_text().replace("events", "evnts", 1))
    assert outcome == "rules_rejected", outcome
    _gap(world, step)


def _typo(world: World, step: Disturb) -> None:
    """The file stays as it is until the next reload: restarts happen with it."""
    world.rules.write_text(world.rules_text().replace("match", "mtach", 1))
    _gap(world, step)


def _truncate(world: World, step: Disturb) -> None:
    text = world.rules_text()
    world.rules.write_text(text[: text.index("events:", len(text) // 2)])
    _gap(world, step)


def _remove_rule(world: World, step: Disturb) -> None:
    """Jobs of a rule wait, it is removed, the daemon is killed, and the rule comes back."""
    for _ in range(4):
        world.failer.fail("slow", schedule.KINDS["slow"][0])
    world.mark()
    text = world.rules_text(without="slow")
    assert world.reload(text) == "rules_loaded"
    _kill_daemon(world, Disturb(step.what, step.pause_s, 0, tuple(one for one in step.gap if one.rule != "slow")))
    world.mark()
    world.load_new_rules()


# -- disk and clock ----------------------------------------------------------------------------------------------


def _lock_spool(world: World, step: Disturb) -> None:
    """Another process has locked the spool when the daemon starts after kill -9."""
    world.end_daemon(signal.SIGKILL)
    world.await_spool_closed()
    holder = sqlite3.connect(world.state / "spool.sqlite3", isolation_level=None, timeout=PATIENCE_S)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    world.journal.add("> volatile")
    world.start_daemon()
    _gap(world, step)
    holder.close()
    world.await_durable()


def _freeze_disk(world: World, step: Disturb) -> None:
    world.journal.add("> volatile")
    with world.frozen_disk():
        _gap(world, step)
        world.mark()
    world.await_durable()


def _freeze_disk_and_kill(world: World, step: Disturb) -> None:
    world.mark()  # what failed before is on the disk
    world.journal.add("> volatile")
    with world.frozen_disk():
        _gap(world, step)
        world.end_daemon(signal.SIGKILL)
        world.start_daemon()
        _gap(world, step)
    world.await_durable()


def _fill_disk(world: World, step: Disturb) -> None:
    world.journal.add("> volatile")
    with world.full_disk():
        _gap(world, step)
        world.mark()
    world.await_durable()


def _fill_disk_and_kill(world: World, step: Disturb) -> None:
    world.mark()  # what failed before is on the disk
    world.journal.add("> volatile")
    with world.full_disk():
        _gap(world, step)
        world.end_daemon(signal.SIGKILL)
        world.await_spool_closed()
    world.start_daemon()
    world.await_durable()


def _clock_step(world: World, step: Disturb) -> None:
    world.set_clock(step.clock_s)
    _gap(world, step)


def _clock_step_and_kill(world: World, step: Disturb) -> None:
    _clock_step(world, step)
    _kill_daemon(world, step)


# -- floods ------------------------------------------------------------------------------------------------------


def _flood(world: World, step: Disturb) -> None:
    serials = [world.failer.begin(schedule.FLOOD_COMM) for _ in range(schedule.FLOOD_SIZE)]
    for serial in serials:
        world.failer.ended(schedule.FLOOD, schedule.FLOOD_COMM, serial)
    _gap(world, step)


def _overrun(world: World, step: Disturb) -> None:
    """The daemon is stopped until the kernel drops events."""
    assert world.daemon is not None
    world.note_drops()
    before = world.manager.drops()
    with stopped(world.daemon.pid):
        with fork_storm(world.directory, "cnpj-noise"):
            until("an overrun", lambda: world.manager.drops() > before, LONG_S)
        _gap(world, step)
    world.mark()


_STEPS: dict[str, Callable[[World, Disturb], None]] = {
    "kill_daemon": _kill_daemon,
    "stop_daemon": _stop_daemon,
    "kill_spool": _kill_spool,
    "kill_runner": _end_runner(signal.SIGKILL),
    "stop_runner": _end_runner(signal.SIGTERM),
    "kill_both": _kill_both,
    "reload_good": _reload_good,
    "reload_bad": _reload_bad,
    "typo": _typo,
    "truncate": _truncate,
    "remove_rule": _remove_rule,
    "lock_spool": _lock_spool,
    "freeze_disk": _freeze_disk,
    "freeze_disk_and_kill": _freeze_disk_and_kill,
    "fill_disk": _fill_disk,
    "fill_disk_and_kill": _fill_disk_and_kill,
    "clock_step": _clock_step,
    "clock_step_and_kill": _clock_step_and_kill,
    "flood": _flood,
    "overrun": _overrun,
}
