"""The commands with a kernel socket of their own: watch --events, top, record and replay, doctor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel.harness import PATIENCE_S, child, rename, running, wait_status

from cnprocd.cli import canary

RULES = """
rules:
$MARKER
  - name: killed
    events: [nonzero_exit]
    match: {comm: "cnprec-*", any: [{signal: any}, {exit_code: 7}], user: root}
  - name: born
    events: [exec]
    match: {comm: cnprec-exec}
"""


def start(*words: str) -> subprocess.Popen[str]:
    """Start cnprocctl as a process. Return when it has subscribed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cnprocd.cli.cnprocctl", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = process.stderr.readline()
    assert said.startswith("recording, ") or "Ctrl-C ends" in said, said + process.stderr.read()
    return process


def end(comm: str, status: int) -> int:
    """Run a child of this name that ends with this wait status."""

    def body() -> None:
        rename(comm)
        if status & 0x7F:
            os.kill(os.getpid(), status)
        os._exit(status >> 8)

    pid = child(body)
    assert wait_status(pid) == status
    return pid


def test_watch_events_hears_what_the_match_wants():
    match = '{comm: "cnpwatch*", exit_code: 5}'
    process = start("watch", "--events", "--kinds", "exit", "--json", "--count", "2", "--match", match)
    end("cnpwatch-a", 4 << 8)
    pids = [end("cnpwatch-a", 5 << 8), end("cnpwatch-b", 5 << 8)]
    out, err = process.communicate(timeout=PATIENCE_S)
    found = [json.loads(line) for line in out.splitlines()]
    assert [record["pid"] for record in found] == pids, err
    assert all(record["user"] == "root" and record["exit_code"] == 5 for record in found)
    assert process.returncode == 0


def test_watch_samples_for_people_and_says_so(tmp_path):
    wanted = ("--kinds", "nonzero_exit", "--match", "{comm: cnpstorm}")
    process = start("watch", "--events", *wanted, "--rate", "3", "--count", "300")
    burst(tmp_path, "cnpstorm", 300)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert "... sampled: 3 of " in out
    shown = sum("exit code 5" in line for line in out.splitlines())
    left_out = [line.split("left out ")[1] for line in out.splitlines() if "left out" in line]
    assert shown + sum(int(said.split()[0]) for said in left_out) == 300


def test_top_counts_by_comm():
    process = subprocess.Popen(
        [sys.executable, "-m", "cnprocd.cli.cnprocctl", "top", "--json", "--interval", "0.2", "--lines", "1000"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # it has subscribed
    for _ in range(20):
        end("cnptop", 3 << 8)
    failed = 0
    while failed < 20:
        rows = json.loads(process.stdout.readline())["top"]
        failed += sum(row.get("failed", 0) for row in rows if row["comm"] == "cnptop")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert failed == 20


def burst(directory: Path, comm: str, count: int) -> None:
    """Run `count` processes of this name that exit with 5, forked by a shell, which is cheap."""
    shell = directory / comm
    if not shell.exists():
        shutil.copy("/bin/sh", shell)
    script = f"i=0; while [ $i -lt {count} ]; do (exit 5); i=$((i+1)); done"
    subprocess.run([str(shell), "-c", script], check=True)


def scenario() -> list[int]:
    """Run processes, some of which match a rule. Return the PIDs of those, in order."""
    wanted = []
    for number in range(30):
        end("cnprec-ok", 0)
        end("cnpother", 7 << 8)
        wanted.append(end("cnprec-dead", 9 if number % 2 else 7 << 8))
    return wanted


def replay(file: Path, rules: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "cnprocd.cli.cnprocctl", "--json", "--rules", str(rules), "replay", str(file)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_replay_matches_what_the_daemon_matched(tmp_path):
    file = tmp_path / "recording"
    with running(tmp_path, RULES) as daemon:
        recorder = start("record", str(file), "--for", "60")
        wanted = scenario()
        daemon.mark()
        recorder.send_signal(signal.SIGINT)
        out, _ = recorder.communicate(timeout=PATIENCE_S)
        assert "0 lost" in out
        live = [(match["pid"], match["signal"], match["exit_code"]) for match in daemon.matches("killed")]
    assert file.stat().st_mode & 0o777 == 0o600
    (tmp_path / "replay").mkdir()
    rules = tmp_path / "replay" / "rules.yaml"
    rules.write_text(RULES.replace("$MARKER\n", ""))
    first, second = replay(file, rules), replay(file, rules)
    matched = [(match["pid"], match["signal"], match["exit_code"]) for match in first["matches"]]
    assert matched == live
    assert [pid for pid, _, _ in matched] == wanted
    del first["timing"], second["timing"]
    assert first == second


def test_a_recording_stays_within_its_size(tmp_path):
    file = tmp_path / "recording"
    recorder = start("record", str(file), "--for", "600", "--max-size", "64K")
    while recorder.poll() is None:
        burst(tmp_path, "cnpstorm", 200)
    assert "ended by its size" in recorder.communicate()[0]
    assert 64 << 10 <= file.stat().st_size < 1 << 20
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [{name: storm, events: [nonzero_exit], match: {comm: cnpstorm}}]")
    found = replay(file, rules)
    assert found["summary"]["cut_short"] is False
    assert found["summary"]["rules"]["storm"] > 0


def test_a_killed_recorder_leaves_what_can_be_read(tmp_path):
    file = tmp_path / "recording"
    recorder = start("record", str(file), "--for", "600")
    size = file.stat().st_size
    while file.stat().st_size == size:
        burst(tmp_path, "cnpstorm", 20)
    recorder.kill()
    recorder.wait()
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: []")
    found = replay(file, rules)
    assert found["summary"]["cut_short"] is True
    assert found["summary"]["events"] > 0


@pytest.mark.parametrize("way", ["end of input", "SIGTERM", "SIGKILL", "end of input while it records"])
def test_a_held_recording_is_gone_with_its_command(tmp_path, way):
    """It has no name at any time, so nothing stays behind, however the command ends."""
    recorder = start("--json", "record", "--hold", "--for", "600")
    assert recorder.stdin is not None and recorder.stdout is not None
    file = Path(json.loads(recorder.stdout.readline())["recording"])
    assert "deleted" in os.readlink(file)
    pid = end("cnprec-held", 7 << 8)
    if way != "end of input while it records":
        recorder.stdin.write("\n")
        recorder.stdin.flush()
        figures = json.loads(recorder.stdout.readline())
        assert (figures["file"], figures["ended"]) == (str(file), "a line on standard input")
        rules = tmp_path / "rules.yaml"
        rules.write_text(RULES.replace("$MARKER\n", ""))
        assert [match["pid"] for match in replay(file, rules)["matches"]] == [pid]
    if way.startswith("SIG"):
        recorder.send_signal(signal.Signals[way])
    out, _ = recorder.communicate(timeout=PATIENCE_S)
    assert not file.exists()
    assert recorder.returncode == (-signal.Signals[way] if way.startswith("SIG") else 0)
    assert out == "" or json.loads(out)["ended"] == "the end of standard input"


def test_the_canary_is_received():
    received = canary.round_trip()
    assert received.event is not None
    assert received.event.exit_code == canary.CODE << 8
    assert received.features.taskstats is (received.record is not None)


def test_doctor_finds_this_machine_fit(tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [{name: a, events: [exit], run: {command: [/bin/missing], timeout: 1s}}]")
    places = ["--state-dir", str(tmp_path), "--runtime-dir", str(tmp_path), "--rules", str(rules)]
    done = subprocess.run(
        [sys.executable, "-m", "cnprocd.cli.cnprocctl", "--json", "doctor", *places], capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    failed = {one["check"] for one in found if one["level"] == "fail"}
    assert (done.returncode, failed) == (1, {"rules"})  # the hook's program is missing, and nothing else
    assert any("exit(42) arrived" in one["what"] for one in found)
