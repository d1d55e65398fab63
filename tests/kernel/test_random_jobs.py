"""A short random run of the whole against the job guarantees. `make test-jobs` is the long one: kernel/jobs/run.py.

In CI the schedule is the same in every run. Elsewhere it is a new one; its seed is printed, and
`make test-jobs JOBS="--seed SEED --failures 60 --disturbances 4 --quick"` runs it again.
"""

from __future__ import annotations

import os
import random

from kernel.jobs import drive, schedule

FAILURES, DISTURBANCES = 60, 4


def test_promised_jobs_run_and_finished_ones_never_again(tmp_path):
    seed = 20 if os.environ.get("CI") == "true" else random.randrange(1 << 30)
    plan = schedule.make(seed, FAILURES, DISTURBANCES, quick=True)
    print(f"seed {seed}")
    tmp_path.chmod(0o755)
    found = drive.run(tmp_path, plan)
    assert not found.problems, f"seed {seed}: {found.problems}; {found.figures}"
    assert found.figures["hooks"] >= FAILURES - found.figures["in_memory_only"] - found.figures["dropped"]
