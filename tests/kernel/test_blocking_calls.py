"""The running daemon makes no blocking call on the event loop's thread. The tracer sees one that is made on purpose.

With the runner, as the packages start it. Without it, hooks are children of the daemon: their programs are opened here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from kernel.blocking import runner_service
from kernel.harness import Daemon, child, rename, wait_status

from cnprocd.control.client import Client

TRACER = str(Path(__file__).with_name("traced_daemon.py"))
RULES = """
rules:
$MARKER
  - name: hooked
    events: [nonzero_exit]
    match: {comm: cnptraced}
    run: {command: [/bin/true], timeout: 10s}
  - {name: user, events: [nonzero_exit], match: {user: nobody}}
  - {name: exe, events: [nonzero_exit], match: {exe: "/bin/*"}}
"""


def offences(tmp_path: Path, **env: str) -> list[dict[str, object]]:
    """Drive a daemon under the tracer, and return what it noted."""
    file = tmp_path / "offences"
    os.chmod(tmp_path, 0o755)
    (tmp_path / "rules.yaml").write_text(RULES.replace("$MARKER", ""))
    env = {**os.environ, "CNPTEST_OFFENCES": str(file), **env}
    under = (sys.executable, TRACER)
    with runner_service(tmp_path) as (path, _):
        daemon = Daemon(tmp_path, RULES, "--runner", str(path), under=under, env=env)
        try:
            daemon.ready()
            for _ in range(20):
                wait_status(child(lambda: (rename("cnptraced"), os._exit(3))))
            daemon.mark()
            daemon.wait_for("hook_finished")
            with Client(tmp_path / "run") as client:
                for verb in ("status", "metrics", "jobs", "reload", "history"):
                    client.ask(verb)
            wait_status(child(lambda: (rename("cnptraced"), os._exit(3))))
            daemon.mark()
            assert daemon.stop() == 0
        finally:
            daemon.kill()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_loop_makes_no_blocking_call(tmp_path):
    assert offences(tmp_path) == []


def test_the_tracer_notes_a_blocking_call(tmp_path):
    assert "getpwuid" in {one["call"] for one in offences(tmp_path, CNPTEST_OFFEND="1")}
