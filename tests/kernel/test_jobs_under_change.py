"""Jobs stay right while a clock is wrong, the daemon or the runner is killed, or the runner is missing.

Each case runs in both modes: hooks as children of the daemon, and hooks in the runner service.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel.blocking import stopped
from kernel.harness import PATIENCE_S, Daemon, child, rename
from kernel.test_faults import STORM
from kernel.test_faults_around import DAY, SKEWED
from kernel.test_loss import CONNECTOR, GENERIC, born_as, drops_of, is_stopped
from kernel.test_snapshots import Place, fail, next_of, rules, until

from cnprocd.control.client import Client
from cnprocd.spool.spool import FORGET_EVERY


@pytest.fixture(params=["embedded", "apart"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    with contextlib.closing(Place(tmp_path, request.param)) as it:
        yield it


def job(place: Place, job_id: object) -> Any:
    with Client(place.directory / "run") as client:
        return client.ask("job", job_id=job_id)["job"]


def records(daemon: Daemon, event: str) -> list[dict[str, object]]:
    return [record for record in daemon.records if record["event"] == event]


# -- time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [30, -30], ids=["ahead", "behind"])
def test_a_clock_a_month_wrong_at_one_start_moves_no_job(place, days):
    """At the first start one job waits for a slot, and one failed and waits for ten minutes. Then the clock is right.

    The first one runs at once. The other one waits for what is left of ten minutes, neither for a month nor not at all.
    """
    site, skew = place.directory / "site", place.directory / "offset"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SKEWED)
    skew.write_text(str(days * DAY))
    more = f"[ -e {place.directory}/first ] || exit 1"
    failing = place.rule("failing", "failing", "cnptest-fail", more).replace(
        "timeout: 60s", "timeout: 60s, retries: 9, backoff: {initial: 10m, max: 10m}"
    )
    waiting = place.rule("waiting", "waiting", "cnptest-wait", place.gate.wait).replace(
        "timeout:", "slots: 1, timeout:"
    )
    env = {"PYTHONPATH": str(site), "CNPTEST_OFFSET": str(skew)}
    daemon = place.daemon(rules(failing, waiting), env=env)
    fail("cnptest-fail")
    failed = daemon.wait_for("hook_failed")
    for _ in range(2):
        fail("cnptest-wait")
    daemon.wait_for("hook_started", rule="waiting")
    until("both matches", lambda: len(records(daemon, "rule_matched")) == 3 or next_of(daemon))
    # On a busy machine the spool opens after the start, and its jobs have large numbers.
    waiting_ids = [record["job_id"] for record in records(daemon, "rule_matched")][1:]
    wrong_ns = job(place, waiting_ids[1])["created_ns"] - time.time_ns()
    assert abs(wrong_ns) > 29 * DAY * 10**9, "the clock of this daemon is wrong"
    daemon.kill()
    skew.unlink()
    daemon = place.daemon(rules(failing, waiting), env=env)
    if place.mode == "embedded":
        daemon.wait_for("hook_started", job_id=waiting_ids[0], attempt=2)  # so the first attempt has left the gate
    for _ in range(2):
        place.gate.open()
    for job_id in waiting_ids:
        daemon.wait_for("hook_finished", job_id=job_id)
    waits_s = job(place, failed["job_id"])["due_ns"] / 1e9 - time.time()
    assert 30 < waits_s <= 600, "a tenth of the back-off is its minimum"


def test_an_interrupted_attempt_gets_its_whole_deadline(place):
    """`deadline: 5s`, and kill -9 within the first attempt. The daemon, and its runner, are down for six seconds.

    The test does not wait for so long: the clocks of the next daemon are six seconds ahead.
    """
    site = place.directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SIX_SECONDS_LATER)
    limited = place.rule(word="attempt", more=place.gate.wait).replace("timeout: 60s", "deadline: 5s")
    daemon = place.daemon(rules(limited))
    fail()
    daemon.wait_for("hook_started")
    daemon.kill()
    if place.runner is not None:
        place.runner.kill()
        place.runner.wait()
        place.start_runner()
    daemon = place.daemon(rules(limited), env={"PYTHONPATH": str(site)})
    daemon.wait_for("hook_started", attempt=2)
    place.gate.open()
    place.gate.open()  # the first attempt may still have been at the gate
    finished = daemon.wait_for("hook_finished", attempt=2)
    assert job(place, finished["job_id"])["spent_ns"] == 0
    assert place.words() == ["attempt", "attempt"]


SIX_SECONDS_LATER = """
import time
real, real_ns, clock = time.time, time.time_ns, time.clock_gettime_ns
time.time = lambda: real() + 6
time.time_ns = lambda: real_ns() + 6 * 10**9
time.clock_gettime_ns = lambda which: clock(which) + 6 * 10**9
"""


# -- the runner --------------------------------------------------------------------------------------------------


def test_a_start_without_the_runner_is_made_up_for(tmp_path):
    """The runner is unreachable at the start: this is shown, jobs wait, and the rules are accepted when it is there.

    So the next start with a broken file has accepted rules to use.
    """
    with contextlib.closing(Place(tmp_path, "apart")) as place:
        place.stop_listening()
        text = rules(place.rule(word="late"))
        daemon = place.daemon(text)
        assert "the runner has no snapshot of the rules" in str(daemon.wait_for("rules_rejected")["message"])
        with Client(tmp_path / "run") as client:
            reload = client.ask("status")["reload"]
        assert (reload["ok"], reload["at_start"], reload["accepted"]) == (False, False, False)
        fail()
        daemon.wait_for("hook_failed", will_retry=True)
        place.listen()
        place.start_runner()
        daemon.wait_for("rules_loaded")
        daemon.wait_for("hook_finished")
        with Client(tmp_path / "run") as client:
            assert client.ask("status")["reload"]["ok"]
        assert daemon.stop() == 0
        daemon = place.daemon(text.replace("events", "evnts"))
        fail()
        until("the hook of the accepted rules", lambda: place.words() == ["late", "late"])


ETC = """
mkdir -p {dir}/skeleton/cnprocd {dir}/etc/rules.d &&
mount -t overlay overlay -o lowerdir={dir}/skeleton:/etc /etc && mount --bind {dir}/etc /etc/cnprocd && exec "$@"
"""


def test_an_empty_drop_in_that_is_written_in_place_is_seen(tmp_path):
    """The file keeps its inode and its directory entry. Daemon and runner read /etc/cnprocd of their namespace."""
    under = ("unshare", "--mount", "sh", "-c", ETC.format(dir=tmp_path), "sh")
    if subprocess.run([*under, "true"], capture_output=True).returncode:
        pytest.skip("the kernel has no overlay filesystem")
    for mode in ("embedded", "apart"):
        directory = tmp_path / mode
        directory.mkdir()
        etc = tmp_path / "etc"
        (etc / "rules.d").mkdir(parents=True, exist_ok=True)
        (etc / "rules.yaml").write_text("rules: []\n")
        drop_in = etc / "rules.d" / "late.yaml"
        drop_in.write_text("")
        with contextlib.closing(Place(directory, mode, standard_files=under)) as place:
            daemon = place.daemon("")
            with drop_in.open("r+") as file:
                file.write(rules(place.rule(word=mode)))
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_for("rules_loaded", rules=1)
            fail()
            until("the hook of the drop-in", lambda place=place, mode=mode: place.words() == [mode])
            assert daemon.stop() == 0
        assert os.stat(drop_in).st_size > 0


# -- lost events -------------------------------------------------------------------------------------------------


def test_deaths_of_one_pid_in_three_overruns_are_three_jobs(place):
    """There is no table. The event of each death is lost, and its PID is that of the one before."""
    clean = place.rule(comm="cnptest-held", more=f"echo code-$CNPROCD_EXIT_CODE >> {place.log}")
    daemon = place.daemon("settings: {receive_buffer: 64K}\n" + rules(clean, "$MARKER\n"))
    pid, jobs = None, {}
    for code in range(1, 100):  # of some the exit record is lost as well: other programs fill its queue
        pid, has_record = die_unseen(daemon, code, pid)
        if has_record:
            match = daemon.wait_for("rule_matched", pid=pid, exit_code=code)
            assert match["recovered"]
            jobs[code] = match["job_id"]
        if len(jobs) == 3:
            break
    assert len(set(jobs.values())) == 3
    for code, job_id in jobs.items():
        daemon.wait_for("hook_finished", job_id=job_id)
        assert place.words().count(f"code-{code}") == 1


def die_unseen(daemon: Daemon, code: int, pid: int | None) -> tuple[int, bool]:
    """Let a process fail whose event is lost. Return its PID (`pid` if given), and whether its record is kept."""

    def body() -> None:
        rename("cnptest-held")
        os._exit(code)

    with stopped(daemon.process.pid):
        until("the daemon is stopped", lambda: is_stopped(daemon.process.pid))
        dropped, records_dropped = (drops_of(daemon.process.pid, [one]) for one in (CONNECTOR, GENERIC))
        for _ in range(300):  # fill the queue of events
            if drops_of(daemon.process.pid, [CONNECTOR]) > dropped:
                break
            os.waitpid(child(lambda: os._exit(1)), 0)
        if pid is None:
            pid = child(body)
        else:
            born_as(pid, body)
        os.waitpid(pid, 0)
        return pid, drops_of(daemon.process.pid, [GENERIC]) == records_dropped


# -- the disk ----------------------------------------------------------------------------------------------------


def test_an_interrupted_job_of_a_locked_spool_is_taken_up(place):
    """kill -9, and the spool is locked when the next daemon starts. The job does not stay `running` for ever."""
    text = rules(place.rule(word="attempt", more=place.gate.wait))
    daemon = place.daemon(text)
    fail()
    daemon.wait_for("hook_started")
    daemon.kill()
    until("the process of the spool has ended", lambda: not disk_children(place))
    holder = sqlite3.connect(place.directory / "state" / "spool.sqlite3", isolation_level=None, timeout=PATIENCE_S)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    daemon = place.daemon(text)
    with Client(place.directory / "run") as client:
        until("the file is locked", lambda: "locked" in str(client.ask("status")["jobs"]["why_not_durable"]))
    holder.close()
    daemon.wait_for("spool_durable")
    attempt = 1 if place.mode == "apart" else 2  # the runner's hook goes on, and the daemon waits for it
    if attempt == 2:
        daemon.wait_for("hook_started", attempt=2)
        place.gate.open()  # the first attempt may still have been at the gate
    place.gate.open()
    assert daemon.wait_for("hook_finished")["attempt"] == attempt
    assert place.words() == ["attempt"] * attempt


def test_hooks_done_while_the_disk_is_stuck_never_run_again(place):
    """Jobs that the file has as waiting are done in memory, and the memory forgets them. Then the disk answers."""
    gated = place.rule(word="gated", more=place.gate.wait).replace("timeout:", "slots: 1, timeout:")
    text = "settings: {history_count: 1}\n" + rules(gated, place.rule("other", "other", "cnptest-other"))
    daemon = place.daemon(text)
    for _ in range(3):
        fail()
    daemon.wait_for("hook_started")
    until("three matches", lambda: len(records(daemon, "rule_matched")) == 3 or next_of(daemon))
    (disk,) = disk_children(place)
    with stopped(disk):
        for _ in range(3):
            place.gate.open()
        storm = [sys.executable, "-IS", STORM, str(FORGET_EVERY + 10), "1", "cnptest-other"]
        subprocess.run(storm, stdout=subprocess.DEVNULL, check=True)
        total = FORGET_EVERY + 13
        until("all hooks", lambda: len(records(daemon, "hook_finished")) == total or next_of(daemon))
        with Client(place.directory / "run") as client:
            until("the memory forgets", lambda: client.ask("jobs", limit=1000)["jobs"][-1]["job_id"] > 3)
    daemon.wait_for("spool_durable")
    daemon.kill()
    daemon = place.daemon(text)
    with Client(place.directory / "run") as client:
        jobs = client.ask("status")["jobs"]
    assert (jobs["waiting"], jobs["running"]) == (0, 0)
    assert len(place.words()) == total
    assert place.words().count("gated") == 3


def disk_children(place: Place) -> list[int]:
    """Return the processes that hold the spool's file."""
    file = str(place.directory / "state" / "spool.sqlite3")
    found = []
    for links in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            if any(os.readlink(link) == file for link in links.iterdir()):
                found.append(int(links.parent.name))
    return found
