"""A user floods rules that count by a field, with a new value of it each time: no other process waits for it.

What must hold is that of test_edges.py; CNPTEST_BLOCKED_S sets for how long.
"""

from __future__ import annotations

import pytest
from kernel.blocking import BLOCKED_S, PROMISE_S, Endurance, fork_storm
from kernel.test_edges import MOST_WAIT, Sums, memory_kib, started
from kernel.test_edges_floods import IS_LONG

HOOK = "run: {command: [/bin/true]}"
COUNTED = {
    "cooled": f"cooldown: {{for: 2s, by: comm}}, {HOOK}",
    "limited": "rate_limit: {count: 2, per: 2s, by: comm}",
    "repeated": "after: {count: 3, within: 2s, by: comm}",
    "gathered": f"coalesce: {{window: 1s, by: comm}}, {HOOK}",
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_storm_of_names_costs_no_other_process(tmp_path, name):
    """A loop of processes with a new name each. What a throttle holds back is logged in a bounded number.

    With several such rules and two loops the events are more than can be read (docs/threat-model.md).
    """
    tmp_path.chmod(0o755)
    rule = f'  - {{name: {name}, events: [nonzero_exit], match: {{comm: "cnp-t*"}}, {COUNTED[name]}}}'
    endurance = Endurance(tmp_path, rule)
    with started(tmp_path, endurance, under=("nice", "-n", "-10")) as daemon:
        with fork_storm(tmp_path, "cnp-t", loops=1, source="name_storm.c") as counts:
            endurance.live(tmp_path / "run")
            peak_kib = memory_kib(daemon.process.pid)
        stopped_after_s = endurance.assert_stops(daemon.process)
        daemon.read_rest()
        sums = Sums(daemon.records, name)
        rate = sum(counts) / BLOCKED_S
        print(f"\n{rate:.0f} failures a second; {peak_kib >> 10} MiB; SIGTERM {stopped_after_s:.2f} s; {sums}")
        print(f"the daemon waited for a processor for {endurance.waits.share:.0%} of the time")
        print(endurance.figures(daemon.records))
        assert max(by_second(daemon.records, "throttled").values(), default=0) < 500
        if sums.lost or endurance.waits.share > MOST_WAIT:
            pytest.skip("the machine makes more failures than its daemon gets time to read")
        endurance.assert_answered()
        after_s = endurance.reported_after_s(daemon.records)
        assert len(after_s) == len(endurance.died_at)
        assert max(after_s) < (PROMISE_S if IS_LONG else 2 * PROMISE_S)
        assert peak_kib < 80 << 10, f"{peak_kib >> 10} MiB"


def by_second(records, event):
    """Return how many records of a class were written in each second."""
    seconds = [str(record["timestamp"])[:19] for record in records if record["event"] == event]
    return {second: seconds.count(second) for second in set(seconds)}
