"""Print the latency of hooks, as the scheduler sees it: isolated jobs, then a burst. Not a test; run it by hand.

PYTHONPATH=tests .venv/bin/python tests/unit/spool/measure_latency.py [jobs]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from unit.hookkit import hook

from cnprocd.spool.job import JobRequest
from cnprocd.spool.scheduler import Scheduler
from cnprocd.spool.spool import Spool


def quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    return " ".join(f"p{share}={ordered[len(ordered) * share // 100]:.2f}" for share in (10, 50, 90, 99)) + " ms"


async def main(jobs: int) -> None:
    started: list[float] = []

    def log(level: str, event: str, **fields: object) -> None:
        if event == "hook_started":
            started.append(float(str(fields["latency_ms"])))

    spool = Spool.open(Path(tempfile.mkdtemp()), log=log)
    for program in ("/bin/true", "/bin/sh"):
        argv = [program] if program == "/bin/true" else [program, "-c", "exit 0"]
        scheduler = Scheduler(spool, {"r": hook(*argv, user="nobody")}, slots=8, log=log)
        scheduler.start()
        await asyncio.sleep(0.2)
        held = []
        for number in range(jobs):
            await asyncio.sleep(0.02)
            now_ns = time.monotonic_ns()
            spool.enqueue([JobRequest(f"{program}{number}", "r", {"pid": number}, kernel_time_ns=now_ns)])
            scheduler.wake()
            held.append((time.monotonic_ns() - now_ns) / 1e6)
        await asyncio.sleep(0.3)
        print(f"{program}: {len(started)} isolated jobs: {quantiles(started)}; loop held {quantiles(held)}")
        started.clear()
        begin = time.monotonic()
        now_ns = time.monotonic_ns()
        spool.enqueue([JobRequest(f"{program}b{i}", "r", {"pid": i}, kernel_time_ns=now_ns) for i in range(jobs)])
        scheduler.wake()
        while spool.counts().waiting or spool.counts().running:
            await asyncio.sleep(0.01)
        print(f"{program}: a burst of {jobs}: {jobs / (time.monotonic() - begin):.0f} hooks a second")
        started.clear()
        await scheduler.stop(1)
    spool.close()


asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
