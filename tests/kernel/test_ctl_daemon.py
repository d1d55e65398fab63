"""cnprocctl against the real daemon: its output is what happened, and a change is effective when it returns."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from kernel.harness import PATIENCE_S, Daemon, child, rename, running, wait_status

from cnprocd.cli.cnprocctl import run
from cnprocd.control.client import Client
from cnprocd.control.protocol import Call, method_of, pack

RULES = """
rules:
$MARKER
  - name: failed
    events: [nonzero_exit]
    match: {comm: "cnpctl-*", exit_code: "1-9"}
  - name: hooked
    events: [nonzero_exit]
    match: {comm: cnpctl-hook}
    run: {command: [$HOOK], timeout: 1h}
"""


def rules(hook: str = "/bin/false", more: str = "") -> str:
    return RULES.replace("$HOOK", hook) + more


def ctl(daemon: Daemon, *words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "cnprocd.cli.cnprocctl", *options(daemon), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    return done.returncode, done.stdout, done.stderr


def options(daemon: Daemon) -> list[str]:
    runtime = daemon.directory / "run"
    return ["--runtime-dir", str(runtime), "--state-dir", str(daemon.state_dir), "--rules", str(daemon.rules)]


def ctl_json(daemon: Daemon, *words: str):
    status, out, err = ctl(daemon, "--json", *words)
    assert (status, err) == (0, ""), err
    return json.loads(out)


def fail(comm: str, code: int = 3) -> int:
    pid = child(lambda: (rename(comm), os._exit(code)))
    wait_status(pid)
    return pid


def burst(directory: Path, comm: str, count: int) -> None:
    """Run `count` processes of this name that exit with 5, forked by a shell, which is cheap."""
    shell = directory / comm
    if not shell.exists():
        shutil.copy("/bin/sh", shell)
    script = f"i=0; while [ $i -lt {count} ]; do (exit 5); i=$((i+1)); done"
    subprocess.run([str(shell), "-c", script], check=True)


def test_status_counts_what_happened(tmp_path):
    with running(tmp_path, rules()) as daemon:
        for _ in range(5):
            fail("cnpctl-a")
        daemon.mark()
        found = ctl_json(daemon, "status")
        hits = {rule["name"]: rule["hits"] for rule in found["rules"]}
        assert (hits["failed"], hits["hooked"]) == (5, 0)
        (failed,) = [rule for rule in found["rules"] if rule["name"] == "failed"]
        assert failed["last_hit_ns"] >= found["started_ns"]
        assert found["pid"] == daemon.process.pid
        assert found["lost"]["total"] == 0
        assert found["jobs"]["durable"] is True
        human = ctl(daemon, "status")[1]
        assert "nothing" in human
        assert "failed" in human


def test_status_and_metrics_show_the_stalls(tmp_path):
    with running(tmp_path, rules()) as daemon:
        fail("cnpctl-a")
        daemon.mark()
        stalls = ctl_json(daemon, "status")["stalls"]
        assert 0 < stalls["p99_s"] <= stalls["worst_s"]
        assert stalls["worst_last_minute_s"] > 0
        assert "stalls  at most" in ctl(daemon, "status")[1]
        assert 'cnprocd_stall_worst_seconds{since="start"}' in ctl(daemon, "metrics")[1]


def test_status_shows_the_owner_the_log_and_the_edges(tmp_path):
    with running(tmp_path, rules()) as daemon:
        found = ctl_json(daemon, "status")
        assert sorted(found["owned_directories"]) == [str(tmp_path / "run"), str(tmp_path / "state")]
        assert found["log"] == {"queued": 0, "lost": 0, "lost_matches": 0, "lost_by_rule": {}}
        assert {"proc", "names", "disk", "metrics"} <= {edge["name"] for edge in found["edges"]}
        assert (found["events"]["counted"], found["events"]["not_remembered"]) == (0, 0)
        assert f"holds {tmp_path / 'run'}" in ctl(daemon, "status")[1]
        assert 'cnprocd_edge_pieces_total{edge="disk",end="done"}' in ctl(daemon, "metrics")[1]


def test_reload_returns_when_the_rules_are_in_force(tmp_path):
    with running(tmp_path, rules()) as daemon:
        daemon.write_rules(rules(more="  - {name: new, events: [nonzero_exit], match: {comm: cnpctl-new}}\n"))
        checked = ctl_json(daemon, "check", str(daemon.rules))["rules_hash"]
        assert ctl_json(daemon, "status")["rules_hash"] != checked
        status, out, _ = ctl(daemon, "reload")
        assert (status, "4 rules in force" in out) == (0, True)
        assert ctl_json(daemon, "status")["rules_hash"] == daemon.wait_for("rules_loaded")["rules_hash"] == checked
        assert f'cnprocd_rules_info{{hash="{checked}"}} 1\n' in ctl(daemon, "metrics")[1]
        pid = fail("cnpctl-new")
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("new")] == [pid]


def test_a_bad_reload_shows_the_mistakes_and_changes_nothing(tmp_path):
    with running(tmp_path, rules()) as daemon:
        daemon.write_rules(rules(more="  - {name: new, events: [died]}\n"))
        status, out, err = ctl(daemon, "reload")
        assert (status, out) == (78, "")
        assert f"{daemon.rules}:" in err
        assert "^" in err
        assert "keeping the current rules" in err
        pid = fail("cnpctl-a")
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed")] == [pid]


def test_a_failed_reload_is_shown_until_one_succeeds(tmp_path):
    with running(tmp_path, rules()) as daemon:
        assert ctl_json(daemon, "status")["reload"] | {"time_ns": 0, "loaded_ns": 0} == {
            "ok": True, "at_start": False, "accepted": True, "time_ns": 0, "error": None, "loaded_ns": 0,
            "changed_files": [],
        }  # fmt: skip
        good = daemon.rules.read_text()
        daemon.write_rules(rules(more="  - {name: new, events: [died]}\n"))
        found = ctl_json(daemon, "status")["reload"]
        assert (found["ok"], found["changed_files"]) == (True, [str(daemon.rules)])
        assert f"NOT LOADED: {daemon.rules}" in ctl(daemon, "status")[1]
        assert "cnprocd_rule_files_changed 1\n" in ctl(daemon, "metrics")[1]
        assert ctl(daemon, "reload")[0] == 78
        found = ctl_json(daemon, "status")["reload"]
        assert (found["ok"], found["time_ns"] > found["loaded_ns"]) == (False, True)
        assert 'unknown event: "died"' in found["error"]
        daemon.write_rules(good)  # as loaded, but the last reload failed all the same
        found = ctl_json(daemon, "status")["reload"]
        assert (found["ok"], found["changed_files"]) == (False, [])
        assert 'unknown event: "died"; these rules are from' in ctl(daemon, "status")[1]
        assert "cnprocd_last_reload_successful 0\n" in ctl(daemon, "metrics")[1]
        assert ctl(daemon, "reload")[0] == 0
        assert ctl_json(daemon, "status")["reload"]["ok"] is True
        human = ctl(daemon, "status")[1]
        assert "FAILED" not in human
        assert "NOT LOADED" not in human


def test_reload_prints_the_warnings_of_check(tmp_path):
    with running(tmp_path, rules("/nowhere/hook")) as daemon:
        status, out, err = ctl(daemon, "reload")
        assert status == 0
        assert "in force" in out
        assert "warning (hook): " in err
        assert "warning (fakeable): " in err
        warnings = ctl_json(daemon, "reload")["warnings"]
        checked = ctl_json(daemon, "check", "--rules", str(daemon.rules))["warnings"]
        assert {one["kind"] for one in warnings} == {"hook", "fakeable"}
        assert warnings == checked


def test_the_log_level_takes_effect_on_reload(tmp_path):
    with running(tmp_path, rules()) as daemon:
        fail("cnpctl-a")
        daemon.write_rules("settings: {log_level: debug}\n" + rules())
        assert ctl(daemon, "reload")[0] == 0
        pid = fail("cnpctl-a")
        daemon.wait_for("identity_sources", pid=pid)
        assert {one["pid"] for one in daemon.records if one["event"] == "identity_sources"} == {pid}


def test_a_dead_job_is_shown_and_retried(tmp_path):
    flag = tmp_path / "flag"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntest -e {flag}\n")
    hook.chmod(0o755)
    with running(tmp_path, rules(str(hook))) as daemon:
        pid = fail("cnpctl-hook")
        dead = daemon.wait_for("job_dead", rule="hooked")
        job_id = str(dead["job_id"])
        (listed,) = ctl_json(daemon, "jobs", "list", "--state", "dead")
        assert (str(listed["job_id"]), listed["rule"]) == (job_id, "hooked")
        shown = ctl_json(daemon, "jobs", "show", job_id)
        event = shown["events"][0]
        assert (event["pid"], event["job_id"], shown["exit_code"]) == (pid, int(job_id), 1)
        explained = ctl_json(daemon, "explain", "--job", job_id)
        assert {one["rule"]: one["fires"] for one in explained} == {"marker": False, "failed": True, "hooked": True}
        flag.touch()
        assert ctl(daemon, "jobs", "retry", job_id)[0] == 0
        daemon.wait_for("hook_finished", job_id=dead["job_id"])
        assert ctl_json(daemon, "jobs", "list", "--state", "dead") == []
        status, _, err = ctl(daemon, "jobs", "retry", job_id)
        assert (status, "is not dead" in err) == (1, True)


def test_a_waiting_job_is_dropped(tmp_path):
    more = "settings: {hook_slots: 1}\n"
    with running(tmp_path, rules("/bin/cat", more).replace("/bin/cat", "/bin/sleep, '10'")) as daemon:
        for _ in range(2):
            fail("cnpctl-hook")
        daemon.mark()
        (waiting,) = ctl_json(daemon, "jobs", "list", "--state", "waiting")
        assert ctl(daemon, "jobs", "drop", str(waiting["job_id"]))[0] == 0
        assert ctl_json(daemon, "jobs", "list", "--state", "waiting") == []
        assert ctl_json(daemon, "jobs", "show", str(waiting["job_id"]))["state"] == "dead"


def test_history_with_and_without_the_daemon(tmp_path):
    with running(tmp_path, rules()) as daemon:
        pids = [fail("cnpctl-a"), fail("cnpctl-b")]
        daemon.mark()
        assert daemon.stop() == 0
        found = ctl_json(daemon, "history", "--rule", "failed")
        assert [match["pid"] for match in found] == pids
        assert [match["pid"] for match in ctl_json(daemon, "history", "--comm", "cnpctl-b")] == pids[1:]
        assert ctl_json(daemon, "history", "--rule", "failed", "--limit", "1")[0]["pid"] == pids[1]
        assert ctl_json(daemon, "jobs", "list") == []


class Watching:
    """`cnprocctl watch` as a process; its lines are read as they come."""

    def __init__(self, daemon: Daemon, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cnprocd.cli.cnprocctl", *options(daemon), "--json", "watch", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        bound = threading.Timer(2 * PATIENCE_S, self.process.kill)  # what does not come ends the test, not the run
        bound.daemon = True
        bound.start()
        assert "Ctrl-C ends" in self.process.stderr.readline()

    def next(self) -> dict[str, object]:
        return json.loads(self.process.stdout.readline())


def test_watch_shows_matches_as_they_happen(tmp_path):
    with running(tmp_path, rules()) as daemon:
        plain = Watching(daemon, "--rule", "failed", "--count", "2")
        filtered = Watching(daemon, "--count", "1", "--match", "{comm: cnpctl-b, exit_code: 7, user: root}")
        pids = [fail("cnpctl-a"), fail("cnpctl-b", 7)]
        assert [plain.next()["pid"] for _ in pids] == pids
        assert filtered.next()["pid"] == pids[1]
        assert (plain.process.wait(PATIENCE_S), filtered.process.wait(PATIENCE_S)) == (0, 0)


def test_watch_marks_what_a_throttle_held_back(tmp_path):
    cooling = "  - {name: cooling, events: [nonzero_exit], match: {comm: cnpcool}, cooldown: 1m}\n"
    with running(tmp_path, rules(more=cooling)) as daemon:
        watching = Watching(daemon, "--count", "2")
        for _ in range(2):
            fail("cnpcool")
        assert [watching.next().get("held_by") for _ in range(2)] == [None, "cooldown"]


def test_watch_ends_cleanly_with_the_daemon(tmp_path):
    with running(tmp_path, rules()) as daemon:
        watching = Watching(daemon)
        daemon.stop()
        assert watching.process.wait(PATIENCE_S) == 69
        assert "Traceback" not in watching.process.stderr.read()


def test_a_watcher_that_is_stopped_holds_nothing_up(tmp_path):
    with running(tmp_path, rules()) as daemon:
        watching = Watching(daemon)
        watching.process.send_signal(signal.SIGSTOP)
        try:
            burst(tmp_path, "cnpctl-burst", 2000)
            daemon.mark_burst()
            (failed,) = [rule for rule in ctl_json(daemon, "status")["rules"] if rule["name"] == "failed"]
            assert len(daemon.matches("failed", comm="cnpctl-burst")) == 2000 == failed["hits"]
        finally:
            watching.process.kill()
            watching.process.wait()


def test_hostile_clients_do_not_reach_the_events(tmp_path):
    with running(tmp_path, rules()) as daemon:
        path = str(tmp_path / "run" / "control.sock")
        crowd = []
        for noise in (b"", b'{"method":', b"\xff" * 64, pack(Call(method_of("status"))) * 300) * 20:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.send(noise)
            crowd.append(connection)
        pids = [fail("cnpctl-a") for _ in range(50)]
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed")] == pids
        for connection in crowd:
            connection.close()
        with Client(tmp_path / "run") as client:
            assert client.ask("status")["pid"] == daemon.process.pid


def test_rules_are_switched_off_and_on_at_once(tmp_path):
    with running(tmp_path, rules()) as daemon:
        assert ctl(daemon, "rules", "disable", "failed")[0] == 0
        fail("cnpctl-a")
        daemon.mark()
        assert daemon.matches("failed") == []
        assert ctl(daemon, "rules", "enable", "failed")[0] == 0
        pid = fail("cnpctl-a")
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed")] == [pid]


def test_metrics_by_the_socket_and_by_file(tmp_path):
    file = tmp_path / "cnprocd.prom"
    with running(tmp_path, rules(more=f"settings: {{metrics_file: {file}}}\n")) as daemon:
        fail("cnpctl-a")
        daemon.mark()
        assert 'cnprocd_matches_total{rule="failed"} 1' in ctl(daemon, "metrics")[1].splitlines()
        assert ctl(daemon, "reload")[0] == 0  # which rewrites the file, some time soon
        deadline = time.monotonic() + PATIENCE_S
        while 'cnprocd_matches_total{rule="failed"} 1' not in file.read_text().splitlines():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_socket_of_a_killed_daemon_is_taken_over(tmp_path):
    with running(tmp_path, rules()) as daemon:
        daemon.kill()
        status, _, err = ctl(daemon, "status")
        assert (status, "connection refused" in err) == (69, True)
    with running(tmp_path, rules()) as daemon:
        assert ctl_json(daemon, "status")["pid"] == daemon.process.pid
        daemon.stop()
        assert not Path(tmp_path / "run" / "control.sock").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_is_refused_with_the_reason(tmp_path):
    with running(tmp_path, rules()) as daemon:
        for directory in (tmp_path, *tmp_path.parents[:-2]):
            directory.chmod(0o755)
        (tmp_path / "run" / "control.sock").chmod(0o666)
        reading, writing = os.pipe()
        # A fork without exec: another user may not have access to this interpreter.
        pid = child(lambda: as_nobody(writing, [*options(daemon), "status"]))
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        assert os.waitstatus_to_exitcode(wait_status(pid)) == 77
        assert "neither root nor in the group cnprocd" in said


def as_nobody(stderr: int, words: list[str]) -> None:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    sys.stderr = os.fdopen(stderr, "w")
    status = run(words)
    sys.stderr.flush()
    os._exit(status)
