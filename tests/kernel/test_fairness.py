"""One rule's trouble is not another's: limits by a field, the kernel's time, and fair turns. Hooks of both modes."""

from __future__ import annotations

import os
import signal
import time

from kernel.harness import child, rename, running, wait_status

ESCALATION = """
rules:
  - {name: flapping, events: [nonzero_exit], match: {comm: "cnpfair-*"}, after: {count: 3, within: 2s}}
  - {name: looping, events: [nonzero_exit], match: {comm: "cnpfair-*"}, after: {count: 3, within: 10m, by: comm}}
$MARKER
"""


def fail(comm="cnpfair-flap"):
    pid = child(lambda: (rename(comm), os._exit(3)))
    wait_status(pid)
    return pid


def test_after_counts_by_the_kernels_time_in_a_stall(tmp_path):
    """The daemon is stopped while three processes die 1.5 s apart. That is not three within two seconds."""
    with running(tmp_path, ESCALATION) as daemon:
        os.kill(daemon.process.pid, signal.SIGSTOP)
        for pause_s in (1.5, 1.5, 0):
            fail()
            time.sleep(pause_s)
        os.kill(daemon.process.pid, signal.SIGCONT)
        daemon.mark()
        assert daemon.matches("flapping") == []


def test_after_by_a_field_counts_each_value_alone(tmp_path):
    """Five programs fail once each, then one of them fails twice more: it alone is reported."""
    with running(tmp_path, ESCALATION) as daemon:
        for name in ("alpha", "beta", "gamma", "delta", "zeta"):
            fail(f"cnpfair-{name}")
        pids = [fail("cnpfair-zeta") for _ in range(2)]
        daemon.mark()
        assert [record["pid"] for record in daemon.matches("looping")] == pids[-1:]
