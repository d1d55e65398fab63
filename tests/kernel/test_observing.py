"""A daemon with --observe-only logs matches, refuses rules with hooks, and starts no job of an earlier daemon."""

from __future__ import annotations

import os
from pathlib import Path

from kernel.harness import PATIENCE_S, child, rename, running, wait_status

from cnprocd.control.client import Client
from cnprocd.json_value import get_dict

PLAIN = "rules:\n  - {name: seen, events: [nonzero_exit], match: {comm: cnptest-obs}}\n$MARKER\n"
HOOKED = PLAIN.replace("}}", "}, run: {command: [HOOK], retries: 3, backoff: {initial: 4s}}}")


def die() -> int:
    pid = child(lambda: (rename("cnptest-obs"), os._exit(3)))
    wait_status(pid)
    return pid


def test_an_observing_daemon_starts_no_job_of_an_earlier_one(tmp_path: Path) -> None:
    """The job of the first daemon waits for a retry. The second one keeps it waiting, and the third one runs it."""
    hook, ran = tmp_path / "hook", tmp_path / "ran"
    hook.write_text(f"#!/bin/sh\n[ -e {tmp_path}/may-work ] || exit 1\ntouch {ran}\n")
    hook.chmod(0o755)
    hooked = HOOKED.replace("HOOK", str(hook))
    with running(tmp_path, hooked) as daemon:
        die()
        daemon.wait_for("hook_failed")
        daemon.kill()
    (tmp_path / "may-work").touch()
    with running(tmp_path, PLAIN, "--observe-only") as daemon:
        pid = die()
        daemon.wait_for("rule_matched", rule="seen", pid=pid)
        refused = daemon.reload(hooked)
        assert refused["event"] == "rules_rejected"
        assert "hooks are refused: --observe-only is in effect" in str(refused["message"])
        with Client(tmp_path / "run", PATIENCE_S) as client:
            jobs = get_dict(client.ask("status"), "jobs")
        assert (jobs["waiting"], jobs["hooks_refused"], jobs["runner_silent"]) == (1, True, False)
        assert not ran.exists()
        assert daemon.stop() == 0
    with running(tmp_path, hooked) as daemon:
        daemon.wait_for("hook_finished")
    assert ran.exists()
