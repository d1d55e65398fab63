"""`make test-jobs`: random runs of the whole against the job guarantees.

    python -m kernel.jobs.run [--runs 50] [--failures 1000] [--disturbances 14] [--seed N] [--keep DIR]

Each run prints its seed and figures. A problem prints the seed again and keeps the directory of the run. With `--seed`
there is one run with that schedule.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kernel.jobs import drive, schedule


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--failures", type=int, default=1000)
    parser.add_argument("--disturbances", type=int, default=14)
    parser.add_argument("--quick", action="store_true", help="only what takes less than 30 s")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    seeds = [random.randrange(1 << 30) for _ in range(options.runs)] if options.seed is None else [options.seed]
    totals: Counter[str] = Counter()
    failed: list[int] = []
    for number, seed in enumerate(seeds, 1):
        plan = schedule.make(seed, options.failures, options.disturbances, quick=options.quick)
        began_s = time.monotonic()
        problems = one_run(plan, totals, options.keep)
        mode = "runner apart" if plan.apart else "runner inside"
        print(
            f"run {number} seed {seed} {mode}: {time.monotonic() - began_s:.0f} s, {len(problems)} problems", flush=True
        )
        for problem in problems[:20]:
            print(f"  {problem}", flush=True)
        if problems:
            failed.append(seed)
    print(json.dumps({"runs": len(seeds), "seeds_of_failures": failed, **dict(sorted(totals.items()))}, indent=1))
    return 1 if failed else 0


def one_run(plan: schedule.Schedule, totals: Counter[str], keep: Path) -> list[str]:
    """Carry out one schedule. Return the problems; keep the directory if there are any."""
    directory = Path(tempfile.mkdtemp(prefix=f"cnprocd-jobs-{plan.seed}-"))
    directory.chmod(0o755)
    try:
        found = drive.run(directory, plan)
        problems = found.problems
        totals.update(found.figures)
    except AssertionError as error:
        problems = [f"the run ended early: {error}"]
    if problems:
        kept = keep / f"cnprocd-jobs-{plan.seed}"
        shutil.copytree(
            directory, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock", "notify", "run", "disk*")
        )
        problems.append(f"journal and logs: {kept}")
    shutil.rmtree(directory, ignore_errors=True)
    return problems


if __name__ == "__main__":
    sys.exit(main())
