"""Arguments of real processes: what is longer than is kept is unknown where it would decide, and marked."""

from __future__ import annotations

import subprocess
import sys

from kernel.harness import running

RULES = """
rules:
  - {name: ends, events: [nonzero_exit], match: {cmdline: "*Bootstrap start"}}
  - {name: not-ends, events: [nonzero_exit], match: {cmdline: "*-cnptest*", not: {cmdline: "*Bootstrap start"}}}
  - {name: begins, events: [nonzero_exit], match: {cmdline: "*-cnptest*"}}
$MARKER
"""


def java_like(padding: int) -> subprocess.Popen[str]:
    """A process with a long class path between its first argument and its last."""
    code = "import sys; print(flush=True); sys.stdin.read(); sys.exit(3)"
    process = subprocess.Popen(
        [sys.executable, "-ISc", code, "-cnptest", "-cp", "x" * padding, "Bootstrap", "start"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_long_command_line_is_marked_and_unknown_at_its_end(tmp_path):
    with running(tmp_path, RULES) as daemon:
        long, short = java_like(5700), java_like(100)
        daemon.mark()
        for process in (long, short):
            process.communicate("")
        daemon.mark()
        found = {
            process.pid: {record["rule"]: record.get("cmdline_truncated") for record in daemon.matches(pid=process.pid)}
            for process in (long, short)
        }
        assert found == {long.pid: {"begins": True}, short.pid: {"ends": None, "begins": None}}
