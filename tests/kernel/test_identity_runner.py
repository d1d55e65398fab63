"""A runner service ends when it is idle, and its PID is given away again."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from kernel.harness import Daemon, child
from kernel.test_loss import born_as
from kernel.test_snapshots import Place, fail, rules, until

from cnprocd.control.client import Client

FAILED = "  - {name: failed, events: [nonzero_exit], match: {exit_code: 47}}\n"


def asks_for_forks(daemon: Daemon) -> bool:
    with Client(daemon.directory / "run") as client:
        asked: Any = client.ask("status")["events"]["asked"]
    return "fork" in asked


def test_children_of_a_program_with_a_former_runners_pid_match(tmp_path):
    """Children of the runner are hooks and match no rule. Those of the program that has its PID now are not.

    A hook of the next runner runs meanwhile, so the daemon asks for every fork.
    """
    go, told, ended = os.pipe(), os.pipe(), tmp_path / "ended"

    def program() -> None:
        os.read(go[0], 1)
        pids = []
        for _ in range(3):
            pids.append(child(lambda: os._exit(47)))
            os.waitpid(pids[-1], 0)
        os.write(told[1], json.dumps(pids).encode() + b"\n")
        os.read(go[0], 1)

    with contextlib.closing(Place(tmp_path, "apart")) as place, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(ended.touch)
        at_the_end.callback(os.write, go[1], b"xx")
        daemon = place.daemon(rules(place.rule(more=f"while [ ! -e {ended} ]; do sleep 0.05; done")) + FAILED)
        ended.touch()
        fail()
        daemon.wait_for("hook_finished")
        assert place.runner is not None
        place.runner.terminate()  # as an idle one ends
        place.runner.wait()
        former = place.runner.pid
        until("no fork is asked for, so the next owner of the PID is not seen", lambda: not asks_for_forks(daemon))
        born_as(former, program)
        ended.unlink()
        place.start_runner()
        fail()
        until("every fork is asked for", lambda: asks_for_forks(daemon))
        os.write(go[1], b"x")
        pids = json.loads(os.read(told[0], 1000))
        for pid in pids:
            match = daemon.wait_for("rule_matched", rule="failed", pid=pid)
            assert match["ppid"] == former
