"""One truth of configuration: the hook of the rules in force runs, whatever happens to the rule files afterwards.

Each case runs in both modes: hooks as children of the daemon, and hooks in the runner service.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from kernel.harness import PATIENCE_S, Daemon, child, rename

from cnprocd.control.client import Client
from cnprocd.output.metrics import render

MODES = ["embedded", "apart"]
IDLE = "rules: []\n"


class Gate:
    """Hooks wait at it (`$GATE` in their script) until open() lets one of them through."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "gate"
        os.mkfifo(self.path)
        self._fd = os.open(self.path, os.O_RDWR)
        self.wait = f"read word < {self.path}"

    def open(self) -> None:
        os.write(self._fd, b"x\n")


class Place:
    """Daemons one after the other in one directory, and a runner that outlives them.

    `standard_files`: a command under which both run and read /etc/cnprocd, instead of --rules.
    """

    def __init__(self, directory: Path, mode: str, standard_files: Sequence[str] = ()) -> None:
        self._under = standard_files
        self.directory = directory
        self.mode = mode
        self.log = directory / "log"
        self.log.touch()
        self.gate = Gate(directory)
        self.runner: subprocess.Popen[bytes] | None = None
        self._daemons: list[Daemon] = []
        self._path = directory / "runner.sock"
        self.listen()
        if mode == "apart":
            self.start_runner()

    def listen(self) -> None:
        """Make the socket, as the socket unit does."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen(64)

    def stop_listening(self) -> None:
        """End the runner and its socket."""
        if self.runner is not None:
            self.runner.kill()
            self.runner.wait()
        self._listener.close()
        self._path.unlink()

    def start_runner(self) -> None:
        """Start a runner on the same socket, as the socket unit does."""
        files = "" if self._under else f"--rules {self.directory}/rules.yaml"
        runner = f"-m cnprocd.cli.runner {files} --state-dir {self.directory}/runner --user nobody --idle 600"
        command = f"exec 3<&{self._listener.fileno()}; LISTEN_PID=$$ exec {sys.executable} {runner}"
        with (self.directory / "runner.log").open("ab") as log:
            self.runner = subprocess.Popen(
                [*self._under, "bash", "-c", command],
                pass_fds=[self._listener.fileno()],
                env={**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "runner"},
                stdout=log,
                stderr=log,
            )

    def daemon(self, rules: str, env: dict[str, str] | None = None) -> Daemon:
        """Start a daemon that is ready. It must be stopped before the next one is started."""
        snapshots = ("--snapshot-dir", str(self.directory / "runner" / "rules"))
        options = ("--runner", str(self._path), *snapshots) if self.mode == "apart" else ()
        self._daemons.append(
            Daemon(self.directory, rules, *options, env=env, under=self._under, standard_files=bool(self._under))
        )
        return self._daemons[-1].ready()

    def rule(self, name: str = "clean", word: str = "hook", comm: str = "cnptest-snap", more: str = "") -> str:
        """Return a rule whose hook appends a word and what `more` does to the log."""
        script = self.directory / f"{name}-{word}"
        script.write_text(f"#!/bin/sh\necho {word} >> {self.log}\n{more}\n")
        script.chmod(0o755)
        return (
            f"  - {{name: {name}, events: [nonzero_exit], match: {{comm: {comm}}}, "
            f"run: {{command: [{script}], timeout: 60s}}}}\n"
        )

    def words(self) -> list[str]:
        return self.log.read_text().split()

    def close(self) -> None:
        for daemon in self._daemons:
            daemon.kill()
        if self.runner is not None:
            self.runner.kill()
            self.runner.wait()
        self._listener.close()


@pytest.fixture(params=MODES)
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    it = Place(tmp_path, request.param)
    with contextlib.closing(it):
        yield it


def fail(comm: str = "cnptest-snap") -> None:
    """Let a process of this name fail."""
    pid = child(lambda: (rename(comm), os._exit(3)))
    os.waitpid(pid, 0)


def until(what: object, holds) -> None:
    """Wait until a condition outside of the daemon's records holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def rules(*parts: str) -> str:
    return "".join(["rules:\n", *parts])


# -- the files change and are not reloaded -----------------------------------------------------------------------


@pytest.mark.parametrize("change", ["typo", "truncated", "rule taken out", "another hook", "refused reload"])
def test_files_that_are_not_loaded_change_no_hook(place, change):
    daemon = place.daemon(rules(place.rule(word="promised")))
    fail()
    daemon.wait_for("hook_finished")
    file = daemon.rules
    if change == "typo":
        file.write_text(file.read_text().replace("events", "evnts"))
    elif change == "truncated":
        file.write_text("")
    elif change == "rule taken out":
        file.write_text(IDLE)
    elif change == "another hook":
        file.write_text(rules(place.rule(word="unaccepted")))
    else:
        assert daemon.reload("rules: [")["event"] == "rules_rejected"
    if place.runner is not None:  # nothing depends on what the runner has in memory
        place.runner.kill()
        place.runner.wait()
        place.start_runner()
    fail()
    until(change, lambda: len([r for r in daemon.records if r["event"] == "hook_finished"]) == 2 or next_of(daemon))
    assert place.words() == ["promised", "promised"]
    assert not [record for record in daemon.records if record["event"] == "job_dead"]


def next_of(daemon: Daemon) -> bool:
    daemon.next_record()
    return False


def test_a_reload_that_is_accepted_changes_the_hook(place):
    daemon = place.daemon(rules(place.rule(word="before")))
    fail()
    daemon.wait_for("hook_finished")
    assert daemon.reload(rules(place.rule(word="after")))["event"] == "rules_loaded"
    fail()
    until("the new hook", lambda: place.words() == ["before", "after"])


def test_a_drop_in_written_in_place_is_seen(place):
    """The same file, first empty and then with a rule, without a new inode or directory entry."""
    daemon = place.daemon(IDLE)
    assert daemon.reload(rules(place.rule(word="second")))["event"] == "rules_loaded"
    fail()
    until("the hook of the second content", lambda: place.words() == ["second"])


def test_the_job_of_a_removed_rule_runs_as_promised(place):
    """It waits behind another job of its rule, the rule is removed, and the daemon is restarted as well."""
    one = place.rule(word="promised", more=place.gate.wait).replace("timeout:", "slots: 1, timeout:")
    daemon = place.daemon(rules(one))
    fail()
    until("the first hook", lambda: place.words() == ["promised"])
    fail()
    daemon.wait_for("hook_started")
    until("the second match", lambda: len(matches(daemon)) == 2 or next_of(daemon))
    assert daemon.reload(IDLE)["event"] == "rules_loaded"
    daemon.kill()
    daemon = place.daemon(IDLE)
    embedded = place.mode == "embedded"
    if embedded:
        daemon.wait_for("hook_started", attempt=2)  # so the first attempt has left the gate
    for _ in range(2):
        place.gate.open()
    until("both hooks", lambda: len(ends(daemon)) == 2 or next_of(daemon))
    assert place.words() == ["promised"] * (3 if embedded else 2)  # the first one was interrupted with the daemon
    assert [record for record in daemon.records if record["event"] == "job_of_former_rule"]
    assert not [record for record in daemon.records if record["event"] == "job_dead"]


def matches(daemon: Daemon) -> list[dict[str, object]]:
    return [record for record in daemon.records if record["event"] == "rule_matched"]


def ends(daemon: Daemon) -> list[dict[str, object]]:
    return [record for record in daemon.records if record["event"] == "hook_finished"]


# -- a start with a broken file ----------------------------------------------------------------------------------


def test_a_start_with_invalid_files_uses_the_last_accepted(place):
    """Loudly; --check and reload still fail. A start with another main file, or without any, fails with 78.

    In between the machine boots: /run is empty, and the runner is a new one.
    """
    daemon = place.daemon(rules(place.rule(word="accepted")))
    assert daemon.stop() == 0
    shutil.rmtree(place.directory / "run")
    if place.runner is not None:
        place.runner.kill()
        place.runner.wait()
        place.start_runner()
    broken = daemon.rules.read_text().replace("events", "evnts")
    daemon = place.daemon(broken)
    record = daemon.wait_for("rules_rejected")
    assert "using the rules that were accepted last" in str(record["message"])
    assert "evnts" in str(record["message"])
    assert "STARTED WITH THE RULES ACCEPTED LAST" in str(daemon.wait_for("started")["message"])
    with Client(place.directory / "run") as client:
        status = client.ask("status")
    assert (status["reload"]["ok"], status["reload"]["at_start"]) == (False, True)
    assert "cnprocd_last_reload_successful 0\n" in render(status)
    fail()
    until("the hook", lambda: place.words() == ["accepted"])
    assert daemon.reload(broken)["event"] == "rules_rejected"
    check = [sys.executable, "-m", "cnprocd.cli.cnprocd", "--check", "--rules", str(daemon.rules)]
    assert subprocess.run(check, capture_output=True).returncode == 78
    assert daemon.reload(rules(place.rule(word="corrected")))["event"] == "rules_loaded"
    fail()
    until("the corrected hook", lambda: place.words() == ["accepted", "corrected"])
    assert daemon.stop() == 0
    other = place.directory / "other"
    other.mkdir()
    options = ("--state-dir", str(place.directory / "state"))
    assert Daemon(other, "rules: [", *options).process.wait(PATIENCE_S) == 78


# -- hooks and their daemon --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_running_hook_outlives_a_restart_of_the_daemon(tmp_path, how):
    """With the runner: the new daemon takes it over, and it runs once."""
    with contextlib.closing(Place(tmp_path, "apart")) as place:
        text = rules(place.rule(word="once", more=place.gate.wait))
        daemon = place.daemon(text)
        fail()
        daemon.wait_for("hook_started")
        daemon.process.send_signal(how)
        daemon.process.wait(PATIENCE_S)
        daemon = place.daemon(text)
        place.gate.open()
        finished = daemon.wait_for("hook_finished")
        assert (finished["exit_code"], finished["attempt"]) == (0, 1)
        fail()
        until("the next job", lambda: place.words() == ["once", "once"])
        place.gate.open()


def test_sigterm_ends_the_runner_with_its_running_hook(tmp_path):
    """More deaths come meanwhile: their hooks are not started, and run after the runner was started again."""
    with contextlib.closing(Place(tmp_path, "apart")) as place:
        daemon = place.daemon(rules(place.rule(word="first", more=place.gate.wait), place.rule("b", "b", "cnptest-b")))
        fail()
        daemon.wait_for("hook_started")
        assert place.runner is not None
        place.runner.send_signal(signal.SIGTERM)
        for _ in range(3):
            fail("cnptest-b")
        daemon.wait_for("hook_failed", reason="the runner is stopping")
        place.gate.open()
        assert place.runner.wait(PATIENCE_S) == 0
        assert place.words() == ["first"]
        daemon.wait_for("hook_finished", rule="clean")
        place.start_runner()
        until("the other hooks", lambda: sorted(place.words()) == ["b", "b", "b", "first"])


def test_a_program_that_a_hook_left_behind_lives(place):
    """It writes to the hook's output after the hook has ended, and after the daemon has."""
    os.mkfifo(place.directory / "go")
    loop = f"while read word; do echo $word; echo left-$word >> {place.log}; done < {place.directory}/go"
    more = f"({loop}) &"
    daemon = place.daemon(rules(place.rule(word="hook", more=more)))
    fail()
    daemon.wait_for("hook_finished")
    with (place.directory / "go").open("w", buffering=1) as go:
        for word in ("one", "two"):
            print(word, file=go)
            until(word, lambda word=word: f"left-{word}" in place.words())
        if place.mode == "embedded":
            daemon.wait_for("hook_output", line="two")
        assert daemon.stop() == 0
        for word in ("three", "four"):
            print(word, file=go)
            until(word, lambda word=word: f"left-{word}" in place.words())


def test_a_job_with_too_many_events_harms_no_other(place):
    """1,000 records of hostile 4 KB command lines: the newest are handed over, and the number that was left out."""
    many = place.rule("many", "many", "cnptest-many", f"echo $CNPROCD_EVENTS+$CNPROCD_EVENTS_LEFT_OUT >> {place.log}")
    many = many.replace("events:", "coalesce: {window: 1h, max: 1000}, events:").replace(
        "timeout: 60s", 'timeout: 60s, env: {NEEDED: "{cmdline}"}'
    )
    daemon = place.daemon(rules(place.rule(word="innocent", more=place.gate.wait), many, "$MARKER\n"))
    fail()
    daemon.wait_for("hook_started")
    program = place.directory / "cnptest-many"
    program.symlink_to("/bin/sh")
    for _ in range(20):
        command = [program, "-c", "read x; exit 1", "\x01" * 4000]
        batch = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(50)]
        daemon.mark()  # their command lines have been read
        for process in batch:
            process.communicate()
    until("the job of many events", lambda: any("+" in word for word in place.words()))
    handed, left_out = next(word for word in place.words() if "+" in word).split("+")
    assert int(handed) + int(left_out) == 1000
    assert int(left_out) > 0
    place.gate.open()
    daemon.wait_for("hook_finished", rule="clean")
    assert place.words().count("innocent") == 1
