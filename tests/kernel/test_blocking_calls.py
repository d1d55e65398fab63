"""The running daemon makes no blocking call on the event loop's thread. The tracer sees one that is made on purpose.

With the runner, as the packages start it, and without it, when hooks are children of the daemon.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from kernel.blocking import runner_service
from kernel.harness import Daemon, child, rename, wait_status

from cnprocd.control.client import Client
from cnprocd.json_value import JsonValue

TRACER = str(Path(__file__).with_name("traced_daemon.py"))
RULES = """
settings: {receive_buffer: 64K}
rules:
$MARKER
  - name: hooked
    events: [nonzero_exit]
    match: {comm: cnptraced}
    run: {command: [/bin/true], timeout: 10s}
  - {name: fails, events: [nonzero_exit], match: {comm: cnptraced}, run: {command: [/bin/false], retries: 0}}
  - {name: user, events: [nonzero_exit], match: {user: nobody, comm: "cnptraced*"}}
  - {name: exe, events: [nonzero_exit], match: {exe: "/bin/*", comm: "cnptraced*"}}
"""
NEEDS_A_TABLE = '  - {name: parent, events: [nonzero_exit], match: {comm: "cnptraced*", parent: {cmdline: "*"}}}'
QUESTIONS: list[tuple[str, dict[str, JsonValue]]] = [
    ("status", {}), ("metrics", {}), ("digests", {}), ("rule", {"name": "user"}), ("jobs", {}), ("job", {"job_id": 1}),
    ("output", {"job_id": 1}), ("retry_dead", {}), ("history", {}), ("history", {"comm": "cnp*"}),
]  # fmt: skip
FAILURES = 300  # more than the receive buffer holds


def offences(tmp_path: Path, mode: str, **env: str) -> list[dict[str, object]]:
    """Drive a daemon under the tracer, and return what it noted."""
    file = tmp_path / "offences"
    os.chmod(tmp_path, 0o755)
    (tmp_path / "rules.yaml").write_text(RULES.replace("$MARKER", ""))
    env = {**os.environ, "CNPTEST_OFFENCES": str(file), **env}
    under = (sys.executable, TRACER)
    with contextlib.ExitStack() as stack:
        options: tuple[str, ...] = ()
        if mode == "runner":
            options = ("--runner", str(stack.enter_context(runner_service(tmp_path))[0]))
        daemon = Daemon(tmp_path, RULES, *options, under=under, env=env)
        try:
            daemon.ready()
            for _ in range(20):
                wait_status(child(lambda: (rename("cnptraced"), os._exit(3))))
            daemon.mark()
            daemon.wait_for("hook_finished")
            daemon.wait_for("hook_failed", rule="fails")
            with Client(tmp_path / "run") as client:
                for verb, parameters in QUESTIONS:
                    client.ask(verb, **parameters)
                daemon.write_rules(RULES + NEEDS_A_TABLE)
                client.ask("reload")
            os.kill(daemon.process.pid, signal.SIGSTOP)
            for _ in range(FAILURES):
                wait_status(child(lambda: os._exit(3)))
            os.kill(daemon.process.pid, signal.SIGCONT)
            daemon.wait_for("overrun")
            wait_status(child(lambda: (rename("cnptraced"), os._exit(3))))
            daemon.mark()
            assert daemon.stop() == 0
        finally:
            daemon.kill()
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["embedded", "runner"])
def test_the_loop_makes_no_blocking_call(tmp_path, mode):
    assert offences(tmp_path, mode) == []


def test_the_tracer_notes_a_blocking_call(tmp_path):
    assert "getpwuid" in {one["call"] for one in offences(tmp_path, "runner", CNPTEST_OFFEND="1")}
