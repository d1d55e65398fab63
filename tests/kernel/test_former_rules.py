"""Jobs of former rules, when what they need is missing: the spool's file at the start, or their snapshot.

And a reload while the runner has read half of a frame. The cases with `place` run in both modes.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel.blocking import stopped
from kernel.harness import PATIENCE_S, Daemon
from kernel.test_snapshots import Place, fail, matches, next_of, rules, until

from cnprocd.control.client import Client
from cnprocd.rules.snapshot_files import LATEST_KEPT


@pytest.fixture(params=["embedded", "apart"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    with contextlib.closing(Place(tmp_path, request.param)) as it:
        yield it


def two_jobs_of_a_former_rule(place: Place) -> Daemon:
    """The first one runs and waits at the gate, the other one waits for its slot. Only the rule `other` is in force."""
    former = place.rule("former", "promised", "cnptest-former", place.gate.wait).replace(
        "timeout:", "slots: 1, timeout:"
    )
    other = place.rule("other", "other", "cnptest-other")
    daemon = place.daemon(rules(former, other))
    for _ in range(2):
        fail("cnptest-former")
    daemon.wait_for("hook_started")
    until("both matches", lambda: len(matches(daemon)) == 2 or next_of(daemon))
    assert daemon.reload(rules(other))["event"] == "rules_loaded"
    return daemon


def former_ids(daemon: Daemon) -> list[object]:
    """Return the numbers of both jobs. On a busy machine the spool opens after the start, and they are large."""
    return [record["job_id"] for record in matches(daemon) if record["rule"] == "former"]


def delete_snapshots(place: Place) -> None:
    """As by mistake."""
    shutil.rmtree(place.directory / ("state" if place.mode == "embedded" else "runner") / "rules")


def restart_runner(place: Place) -> None:
    if place.runner is not None:
        place.runner.kill()
        place.runner.wait()
        place.start_runner()


def reasons(daemon: Daemon) -> str:
    """Return why attempts of hooks failed that are made again."""
    failed = [one for one in daemon.records if one["event"] == "hook_failed" and one["will_retry"]]
    return "; ".join(str(one["reason"]) for one in failed)


def dead(daemon: Daemon) -> list[dict[str, object]]:
    return [record for record in daemon.records if record["event"] == "job_dead"]


def test_a_former_rules_job_of_a_locked_spool_runs(place):
    """kill -9, and the spool is locked when the next daemon starts: which rules its jobs need is known later.

    Reloads come meanwhile. They delete no snapshot, because a job may need it.
    """
    daemon = two_jobs_of_a_former_rule(place)
    ids = former_ids(daemon)
    daemon.kill()
    database = place.directory / "state" / "spool.sqlite3"
    holder = sqlite3.connect(database, isolation_level=None, timeout=PATIENCE_S)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    daemon = place.daemon(daemon.rules.read_text())
    with Client(place.directory / "run") as client:
        until("the file is locked", lambda: "locked" in str(client.ask("status")["jobs"]["why_not_durable"]))
    text = daemon.rules.read_text()
    for number in range(LATEST_KEPT + 1):
        assert daemon.reload(f"{text}# {number}\n")["event"] == "rules_loaded"
    holder.close()
    daemon.wait_for("spool_durable")
    for _ in range(3):  # an embedded hook was interrupted, and may still have been at the gate
        place.gate.open()
    for job_id in ids:
        daemon.wait_for("hook_finished", job_id=job_id)
    assert not dead(daemon)


def test_deleted_snapshots_cost_only_former_rules_jobs(place):
    """Both services are killed as well. The jobs are dead, with the reason. Other jobs run, before and after."""
    daemon = two_jobs_of_a_former_rule(place)
    ids = former_ids(daemon)
    delete_snapshots(place)
    fail("cnptest-other")
    daemon.wait_for("hook_finished", rule="other")
    daemon.kill()
    restart_runner(place)
    daemon = place.daemon(daemon.rules.read_text())
    for job_id in ids:
        reason = daemon.wait_for("job_dead", job_id=job_id)["reason"]
        assert "the rules that promised its hook are not kept" in str(reason)
    fail("cnptest-other")
    daemon.wait_for("hook_finished", rule="other")
    with Client(place.directory / "run") as client:
        assert client.ask("status")["jobs"]["dead"] == 2


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Place]:
    with contextlib.closing(Place(tmp_path, "apart")) as it:
        yield it


def test_without_its_snapshot_in_the_runner_a_job_is_dead(apart):
    """The daemon has the rules in memory; the runner was restarted. `jobs retry` works when the file is back."""
    daemon = two_jobs_of_a_former_rule(apart)
    ids = former_ids(daemon)
    kept = apart.directory / "kept"
    shutil.copytree(apart.directory / "runner" / "rules", kept)
    delete_snapshots(apart)
    restart_runner(apart)
    apart.gate.open()  # the first attempt was interrupted
    for job_id in ids:
        assert "has no snapshot" in str(daemon.wait_for("job_dead", job_id=job_id)["reason"])
    fail("cnptest-other")
    daemon.wait_for("hook_finished", rule="other")
    shutil.copytree(kept, apart.directory / "runner" / "rules", dirs_exist_ok=True)
    with Client(apart.directory / "run") as client:
        client.ask("retry", job_id=ids[1])
    apart.gate.open()
    daemon.wait_for("hook_finished", job_id=ids[1])


def test_without_the_snapshot_in_force_jobs_wait_for_reload(apart):
    """The files differ by now. The record says what to do, and the jobs run after it."""
    daemon = apart.daemon(rules(apart.rule(word="first")))
    daemon.write_rules(rules(apart.rule(word="second")))
    delete_snapshots(apart)
    restart_runner(apart)
    fail()
    # The daemon may have sent the hook before it noticed the end of the runner: then that attempt was interrupted.
    until("the reason", lambda: "the rule files differ; reload them" in reasons(daemon) or next_of(daemon))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("hook_finished")
    assert apart.words() == ["second"]
    assert not dead(daemon)


def test_a_running_hook_without_a_snapshot_runs_once(apart):
    """The runner runs it, its rule and the snapshot are gone, and the daemon is killed. The next gets the result."""
    daemon = two_jobs_of_a_former_rule(apart)
    ids = former_ids(daemon)
    delete_snapshots(apart)
    daemon.kill()
    daemon = apart.daemon(daemon.rules.read_text())
    apart.gate.open()
    assert daemon.wait_for("hook_finished", job_id=ids[0])["attempt"] == 1
    daemon.wait_for("job_dead", job_id=ids[1])
    assert apart.words() == ["promised"]


# -- half a frame ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["continued", "killed", "daemon killed"])
def test_a_reload_while_a_frame_is_cut_loses_no_job(apart, then):
    """The runner is stopped with half of a job of 300 long events in its socket, and the rules are reloaded meanwhile.

    The job runs once with all its events, and later jobs run the new hook.
    """
    count = f"echo $CNPROCD_EVENTS >> {apart.log}"
    many = apart.rule("many", "many", "cnptest-many", count)
    many = many.replace("events:", "coalesce: {window: 1h, max: 300}, events:").replace(
        "timeout: 60s", 'timeout: 60s, env: {NEEDED: "{cmdline}"}'
    )
    held = apart.rule("held", "held", "cnptest-held", apart.gate.wait)  # keeps the connection
    before = rules(many, held, apart.rule(word="before"), "$MARKER\n")
    after = rules(many, held, apart.rule(word="after"), "$MARKER\n")
    daemon = apart.daemon(before)
    fail()
    daemon.wait_for("hook_finished")
    fail("cnptest-held")
    daemon.wait_for("hook_started", rule="held")
    assert apart.runner is not None
    with stopped(apart.runner.pid):
        fail_with_long_arguments(apart, daemon, 300)
        daemon.mark()
        daemon.write_rules(after)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for("runner_silent")
        if then == "daemon killed":
            daemon.kill()
        elif then == "killed":
            apart.runner.kill()
    if then == "killed":
        apart.runner.wait()
        apart.start_runner()
    if then == "daemon killed":
        daemon = apart.daemon(after)
    else:
        daemon.wait_for("rules_loaded", 2 * PATIENCE_S)  # on a busy machine the runner is asked a second time
    daemon.wait_for("hook_finished", rule="many")
    fail()
    until("the new hook", lambda: "after" in apart.words())
    assert [word for word in apart.words() if word != "held"] == ["before", "many", "300", "after"]
    assert not dead(daemon)


def fail_with_long_arguments(place: Place, daemon: Daemon, count: int) -> None:
    program = place.directory / "cnptest-many"
    program.symlink_to("/bin/sh")
    for _ in range(count // 50):
        command = [program, "-c", "read x; exit 1", "x" * 4000]
        batch = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(50)]
        daemon.mark()  # their command lines have been read
        for process in batch:
            process.communicate()
