"""Without exit records a name is read from /proc: a short life is matched, or counted as unknown."""

from __future__ import annotations

import os
import shutil
from collections import Counter

import pytest
from kernel.harness import running

from cnprocd.control.client import Client

RULES = """
rules:
  - {{name: comm, events: [nonzero_exit], match: {{comm: cnptest-short}}}}
  - {{name: exe, events: [nonzero_exit], match: {{comm: cnptest-short, exe: "{directory}/*"}}}}
$MARKER
"""


@pytest.mark.parametrize("count", [100, 1000])
def test_without_records_each_short_life_is_matched_or_counted(tmp_path, count):
    program = shutil.copy("/bin/false", tmp_path / "cnptest-short")
    with running(tmp_path, RULES.format(directory=tmp_path), "--refuse=taskstats") as daemon:
        pids = {os.posix_spawn(program, [program], {}) for _ in range(count)}
        for pid in pids:
            os.waitpid(pid, 0)
        daemon.mark_burst()
        with Client(tmp_path / "run") as client:
            unknown = client.ask("status")["events"]["identity_unknown"]
        counted = Counter[str]()
        for one in unknown:
            counted[one["attribute"]] += int(one["count"])
        for rule, attributes in (("comm", ["comm"]), ("exe", ["comm", "exe"])):
            found = [record["pid"] for record in daemon.matches(rule)]
            assert len(found) == len(set(found)) and set(found) <= pids
            missing = pids - set(found)
            assert len(missing) <= sum(counted[one] for one in attributes), f"{rule}: {len(found)} matched; {unknown}"
