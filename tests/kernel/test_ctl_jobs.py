"""jobs and history against the real daemon: log, kill, retry of many, outcomes, follow, and hits over a restart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from kernel.harness import PATIENCE_S, running
from kernel.test_ctl_daemon import burst, ctl, ctl_json, fail, options, rules
from unit.hookkit import alive

from cnprocd.spool.spool import DROPPED_AT_ONCE


def hook(tmp_path: Path, script: str) -> str:
    path = tmp_path / "hook"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_running_hook_is_shown_and_killed(tmp_path):
    with running(tmp_path, rules(hook(tmp_path, "echo started; exec sleep 1000"))) as daemon:
        fail("cnpctl-hook")
        started = daemon.wait_for("hook_output", line="started")
        job_id = str(started["job_id"])
        assert ctl(daemon, "jobs", "log", job_id)[1] == "started\n"
        (match,) = ctl_json(daemon, "history", "--rule", "hooked")
        assert (match["job_id"], match["job_state"]) == (started["job_id"], "running")
        follower = subprocess.Popen(
            [sys.executable, "-m", "cnprocd.cli.cnprocctl", *options(daemon), "jobs", "log", "-f", job_id],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert follower.stdout.readline() == "started\n"
        status, out, err = ctl(daemon, "jobs", "kill", job_id, "99")
        assert (status, f"job {job_id} is being ended" in out) == (1, True)
        assert err.startswith("cnprocctl: no such job: 99")
        dead = daemon.wait_for("job_dead", job_id=started["job_id"])
        assert dead["reason"] == "killed by an operator"
        assert not alive(started["hook_pid"])
        assert follower.wait(PATIENCE_S) == 0
        (row,) = [line for line in ctl(daemon, "history")[1].splitlines() if "hooked" in line]
        assert row.endswith("dead: killed by an operator")
        status, _, err = ctl(daemon, "jobs", "kill", job_id)
        assert (status, "is not running" in err) == (1, True)


def test_dead_jobs_of_a_rule_are_retried_together(tmp_path):
    flag = tmp_path / "flag"
    with running(tmp_path, rules(hook(tmp_path, f"echo attempt; test -e {flag}"))) as daemon:
        for _ in range(2):
            fail("cnpctl-hook")
        dead = [daemon.wait_for("job_dead", job_id=number)["job_id"] for number in (1, 2)]
        flag.touch()
        status, _, err = ctl(daemon, "jobs", "retry", "--rule", "hookd")
        assert (status, 'did you mean "hooked"' in err) == (1, True)
        assert ctl(daemon, "jobs", "retry", "--rule", "failed") == (0, "no dead jobs\n", "")
        assert ctl(daemon, "jobs", "retry", "--rule", "hook*") == (0, "2 jobs wait again\n", "")
        for job_id in dead:
            daemon.wait_for("hook_finished", job_id=job_id)
        assert ctl(daemon, "jobs", "retry", "--all") == (0, "no dead jobs\n", "")
        status, _, err = ctl(daemon, "jobs", "retry", "99", "1")
        assert (status, [line.split(": ")[1] for line in err.splitlines()]) == (1, ["no such job", "job 1 is not dead"])


def test_waiting_jobs_of_a_rule_are_dropped_together(tmp_path):
    """After a storm of a user thousands of jobs of one rule wait, and have to go."""
    slots = "settings: {hook_slots: 1}\n"
    with running(tmp_path, slots + rules(hook(tmp_path, "exec sleep 1000"))) as daemon:
        burst(tmp_path, "cnpctl-hook", DROPPED_AT_ONCE + 2)
        first = daemon.wait_for("hook_started")["job_id"]
        daemon.mark_burst()
        last = ctl_json(daemon, "jobs", "list", "-n1")[0]["job_id"]
        assert ctl(daemon, "jobs", "drop", "--rule", "fail*") == (0, "no waiting jobs\n", "")
        many = f"{DROPPED_AT_ONCE} jobs are dead and will not run\n"
        assert ctl(daemon, "jobs", "drop", str(last))[0] == 0
        assert ctl(daemon, "jobs", "drop", "--rule", "hook*") == (0, many, "")
        assert ctl(daemon, "jobs", "drop", "--all") == (0, "no waiting jobs\n", "")
        assert [job["job_id"] for job in ctl_json(daemon, "jobs", "list", "--state", "running")] == [first]
        assert ctl(daemon, "jobs", "kill", str(first))[0] == 0
        daemon.wait_for("job_dead", job_id=first)


def test_history_has_the_matches_of_this_moment(tmp_path):
    """History waits for no tick: a match is there as soon as its record is."""
    with running(tmp_path, rules()) as daemon:
        pid = fail("cnpctl-a")
        daemon.mark()
        assert [match["pid"] for match in ctl_json(daemon, "history", "--pid", str(pid))] == [pid]
        assert [match["pid"] for match in ctl_json(daemon, "history", "--user", "root", "--comm", "cnpctl-*")] == [pid]
        assert ctl_json(daemon, "history", "--until", "1m ago") == []


def test_history_follows_past_and_next_matches_once_each(tmp_path):
    with running(tmp_path, rules()) as daemon:
        pids = [fail("cnpctl-a")]
        daemon.mark()
        words = ["--json", "history", "-f", "--rule", "fail*", "--comm", "cnpctl-*"]
        follower = subprocess.Popen(
            [sys.executable, "-m", "cnprocd.cli.cnprocctl", *options(daemon), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "Ctrl-C ends" in follower.stderr.readline()
        pids += [fail("cnpctl-b"), fail("cnpctl-c")]
        assert [json.loads(follower.stdout.readline())["pid"] for _ in pids] == pids
        follower.terminate()
        assert follower.wait(PATIENCE_S) == 130


def test_watch_and_history_go_on_after_a_match(tmp_path):
    """A collector that was away: matches meanwhile come from the history, also of the daemon before this one."""
    with running(tmp_path, rules()) as daemon:
        pids = [fail("cnpctl-a") for _ in range(3)]
        daemon.mark()
        known = ctl_json(daemon, "history", "--comm", "cnpctl-*")[0]
        assert daemon.stop() == 0
    with running(tmp_path, rules()) as daemon:
        pids.append(fail("cnpctl-a"))
        daemon.mark()
        (first,) = ctl_json(daemon, "history", "--after", known["match_id"], "--limit", "1")
        assert first["pid"] == pids[1]
        words = ["--json", "watch", "--after", known["match_id"], "--match", "{comm: 'cnpctl-*'}", "--count", "4"]
        watcher = subprocess.Popen(
            [sys.executable, "-m", "cnprocd.cli.cnprocctl", *options(daemon), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "Ctrl-C ends" in watcher.stderr.readline()
        pids.append(fail("cnpctl-b"))
        out, _ = watcher.communicate(timeout=PATIENCE_S)
        assert [json.loads(line)["pid"] for line in out.splitlines()] == pids[1:]
        status, _, err = ctl(daemon, "history", "--after", "0" * 32)
        assert (status, "is not in the history" in err) == (1, True)


def test_watch_of_an_unknown_rule_ends_at_once(tmp_path):
    with running(tmp_path, rules()) as daemon:
        status, out, err = ctl(daemon, "watch", "--rule", "faled")
        assert (status, out, err) == (1, "", 'cnprocctl: no rule named "faled": did you mean "failed"?\n')


def test_hits_survive_a_restart_and_end_with_their_rule(tmp_path):
    def hits(daemon):
        found = ctl_json(daemon, "status")
        return {rule["name"]: rule["hits"] for rule in found["rules"]}, found["hits_since_ns"]

    with running(tmp_path, rules()) as daemon:
        for _ in range(3):
            fail("cnpctl-a")
        daemon.mark()
        first, since_ns = hits(daemon)
        assert first["failed"] == 3
        assert daemon.stop() == 0
    with running(tmp_path, rules()) as daemon:
        fail("cnpctl-a")
        daemon.mark()
        assert hits(daemon)[0]["failed"] == 4
        assert hits(daemon)[1] == since_ns
        daemon.reload(rules().replace("name: failed", "name: other"))
        daemon.reload(rules())
        assert hits(daemon)[0]["failed"] == 0
