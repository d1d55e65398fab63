"""A short run of every fuzz target with a fixed seed; `make fuzz` does it at length."""

import pytest
from fuzz.fuzz import fuzz, table
from fuzz.targets import TARGETS

# Few enough for half a second each; the targets that take batches overshoot.
EXECUTIONS = {"rules": 500, "recordings": 200, "spool": 150}


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run_finds_nothing(name):
    target = TARGETS[name]()
    try:
        result = fuzz(target, EXECUTIONS.get(name, 3000), float("inf"), seed=1)
    finally:
        target.close()
    assert not result.findings, table([result])
    assert result.executions >= EXECUTIONS.get(name, 3000)


def test_every_target_names_its_invariant_and_runs_10_million():
    assert all("Invariant:" in __import__(one.__module__, fromlist=["x"]).__doc__ for one in TARGETS.values())
    assert sum(one.executions for one in TARGETS.values()) >= 10_000_000
