"""Exec rules and short lives: every exec of the program is matched or counted."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from kernel.harness import Daemon, running, wait_status

from cnprocd.control.client import Client

RULES = """
rules:
  - {{name: exec, events: [exec], match: {{comm: "true"{more}}}}}
$MARKER
"""


def unknown_comms(directory) -> int:
    with Client(directory / "run") as client:
        unknown = client.ask("status")["events"]["identity_unknown"]
    return sum(one["count"] for one in unknown)


def matched(daemon: Daemon) -> list[object]:
    daemon.mark()
    return [record["pid"] for record in daemon.matches("exec")]


@pytest.mark.parametrize(("count", "pause_s"), [(500, 0), (40, 0.05)], ids=["a tight loop", "one every 50 ms"])
@pytest.mark.parametrize("more", ["", ', exe: "*/true", cmdline: "true*"'], ids=["comm", "exe"])
def test_each_exec_of_a_short_life_is_matched_or_counted(tmp_path, count, pause_s, more):
    """Most are gone before the daemon can read their names."""
    with running(tmp_path, RULES.format(more=more)) as daemon:
        pids = set()
        for _ in range(count):
            pids.add(os.posix_spawn("/bin/true", ["true"], os.environ))
            time.sleep(pause_s)  # the load that is described, not a wait for something
        for pid in pids:
            wait_status(pid)
        found = matched(daemon)
        assert len(found) == len(set(found))
        missing = pids - set(found)
        assert len(missing) <= unknown_comms(tmp_path), f"{len(found)} of {count} matched; the others are not counted"


NAMED = """
rules:
  - {name: exec, events: [exec], match: {comm: "true"}}
  - {name: named, events: [exec], match: {comm: "*"}, include_hooks: true}
$MARKER
"""


def counts(daemon: Daemon, client: Client) -> tuple[Any, Any, Any]:
    """Return how many execs were evaluated, how many of them had a name, and how many were counted without one."""
    daemon.mark_burst()
    status = client.ask("status")
    events, hits = status["events"], {one["name"]: one["hits"] for one in status["rules"]}
    unknown = {one["attribute"]: one["count"] for one in events["identity_unknown"]}
    assert set(unknown) <= {"comm"}
    return events["occurrences"].get("exec", 0), hits["named"], unknown.get("comm", 0)


def test_each_exec_has_a_name_or_is_counted_once(tmp_path):
    """Of every program of the machine, also of the daemon, whose processes count as hooks."""
    with running(tmp_path, NAMED) as daemon, Client(tmp_path / "run") as client:
        before = counts(daemon, client)
        pids = {os.posix_spawn("/bin/true", ["true"], os.environ) for _ in range(500)}
        for pid in pids:
            wait_status(pid)
        execs, named, unknown = (now - then for now, then in zip(counts(daemon, client), before, strict=True))
        assert execs == named + unknown
        assert execs >= len(pids)
        found = {record["pid"] for record in daemon.matches("exec")} & pids
        assert len(pids) - len(found) <= unknown
