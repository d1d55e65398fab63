"""A user floods rules that count by a field, with a new value of it each time: no other process waits for it.

What must hold is that of test_edges.py; CNPTEST_BLOCKED_S sets for how long.
"""

from __future__ import annotations

import pytest
from kernel.blocking import BLOCKED_S, Endurance, fork_storm
from kernel.test_edges import MOST_WAIT, Sums, collected, memory_kib, started

COUNTED = """
  - name: cooled
    events: [nonzero_exit]
    match: {{comm: "cnp-t*"}}
    cooldown: {{for: 2s, by: {by}}}
    run: {{command: [/bin/true]}}
  - name: limited
    events: [nonzero_exit]
    match: {{comm: "cnp-t*"}}
    rate_limit: {{count: 2, per: 2s, by: {by}}}
  - name: repeated
    events: [nonzero_exit]
    match: {{comm: "cnp-t*"}}
    after: {{count: 3, within: 2s, by: {by}}}
  - name: gathered
    events: [nonzero_exit]
    match: {{comm: "cnp-t*"}}
    coalesce: {{window: 1s, by: {by}}}
    run: {{command: [/bin/true]}}
"""
NAMES = ("cooled", "limited", "repeated", "gathered")


@pytest.mark.parametrize("by", ["comm", "user"])
def test_a_storm_of_names_costs_no_other_process(tmp_path, by):
    """Two loops of processes with a new name each. What the throttles hold back is logged in a bounded number.

    Each death of another process is reported, but not within 1 s: four rules make 4,000 requests of such a storm.
    """
    tmp_path.chmod(0o755)
    endurance = Endurance(tmp_path, COUNTED.format(by=by))
    with started(tmp_path, endurance, under=("nice", "-n", "-10")) as daemon:
        with fork_storm(tmp_path, "cnp-t", source="name_storm.c") as counts:
            endurance.live(tmp_path / "run")
            peak_kib = memory_kib(daemon.process.pid)
        collected(daemon)
        endurance.wait_for_hooks()
        stopped_after_s = endurance.assert_stops(daemon.process)
        daemon.read_rest()
        sums = {name: Sums(daemon.records, name) for name in NAMES}
        rate = sum(counts) / BLOCKED_S
        print(f"\n{rate:.0f} failures a second; {peak_kib >> 10} MiB; SIGTERM {stopped_after_s:.2f} s")
        print("\n".join(f"{name}: {one}" for name, one in sums.items()))
        print(f"the daemon waited for a processor for {endurance.waits.share:.0%} of the time")
        print(endurance.figures(daemon.records))
        endurance.assert_answered()
        assert max(by_second(daemon.records, "throttled").values(), default=0) < 500
        if sums["limited"].lost or endurance.waits.share > MOST_WAIT:
            pytest.skip("the machine makes more failures than its daemon gets time to read")
        assert len(endurance.reported_after_s(daemon.records)) == len(endurance.died_at)
        endurance.assert_hooks_ran(0.0)
        assert peak_kib < 100 << 10, f"{peak_kib >> 10} MiB"


def by_second(records, event):
    """Return how many records of a class were written in each second."""
    seconds = [str(record["timestamp"])[:19] for record in records if record["event"] == event]
    return {second: seconds.count(second) for second in set(seconds)}
