"""What could not be known is counted by attribute and reason, and reported: never silent, never a match."""

from __future__ import annotations

import os
import shutil
import subprocess

from kernel.harness import running

from cnprocd.control.client import Client

RULES = """
rules:
  - {{name: by-exe, events: [nonzero_exit], match: {{comm: expr, exe: "{directory}/*"}}}}
$MARKER
"""


def test_a_rule_that_could_not_be_decided_is_counted(tmp_path):
    """A program in another mount namespace: its path is a claim, so the rule neither matches nor fails to."""
    program = os.path.realpath(shutil.which("expr") or "")
    own = shutil.copy("/bin/false", tmp_path / "own")
    with running(tmp_path, RULES.format(directory=os.path.dirname(program))) as daemon:
        for _ in range(5):
            subprocess.run(
                ["unshare", "--mount", "sh", "-c", f"mount --bind {own} {program} && exec {program}"], check=False
            )
        daemon.mark()
        assert daemon.matches("by-exe") == []
        with Client(tmp_path / "run") as client:
            status = client.ask("status")
        unknown = [one for one in status["events"]["identity_unknown"] if one["attribute"] == "exe"]
        assert {one["reason"] for one in unknown} <= {"unverified", "gone"}, "it may be gone before it is read"
        assert sum(one["count"] for one in unknown) == 5
