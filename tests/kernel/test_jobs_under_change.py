"""Jobs stay right while a clock is wrong, the daemon or the runner is killed, or the runner is missing.

Each case runs in both modes: hooks as children of the daemon, and hooks in the runner service.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel.harness import Daemon
from kernel.test_faults_around import DAY, SKEWED
from kernel.test_snapshots import Place, fail, next_of, rules, until

from cnprocd.control.client import Client


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


def test_a_clock_a_month_ahead_at_one_start_delays_no_job(place):
    """At the first start one job waits for a slot, and one failed and waits for ten minutes. Then the clock is right.

    The first one runs at once. The other one waits for what is left of ten minutes, not for a month.
    """
    site, skew = place.directory / "site", place.directory / "offset"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SKEWED)
    skew.write_text(str(30 * DAY))
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
    assert job(place, 3)["created_ns"] > time.time_ns() + 29 * DAY * 10**9, "the clock of this daemon is wrong"
    daemon.kill()
    skew.unlink()
    daemon = place.daemon(rules(failing, waiting), env=env)
    for _ in range(2):
        place.gate.open()
    for job_id in (2, 3):
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
    daemon.wait_for("hook_finished", attempt=2)
    assert job(place, 1)["spent_ns"] == 0
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
        assert "RULES NOT ACCEPTED" in str(daemon.wait_for("started")["message"])
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
