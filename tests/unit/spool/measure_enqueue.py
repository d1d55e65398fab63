"""Print what a job costs the loop: waiting and CPU, with the file in its own process and in this one. Run it by hand.

PYTHONPATH=tests .venv/bin/python tests/unit/spool/measure_enqueue.py [directory on the disk to measure]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from cnprocd.launch.request import AttemptResult
from cnprocd.spool.disk import ChildDisk, DirectDisk, Disk
from cnprocd.spool.job import JobRequest
from cnprocd.spool.rows import PastMatch
from cnprocd.spool.spool import Spool

JOBS, MATCHES = 1500, 10_000
RECORD = {"pid": 1, "comm": "ora_pmon", "cmdline": "x" * 300} | {f"field{number}": "value" for number in range(20)}


def quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    return " ".join(f"p{share} {ordered[len(ordered) * share // 100]:.3f}" for share in (50, 90, 99)) + " ms"


async def measure(name: str, disk: Disk, directory: Path) -> None:
    spool = Spool.open(directory, log=lambda *_, **__: None, disk=disk)
    added, ran = [], []
    cpu_s = time.process_time()
    for number in range(JOBS):
        await asyncio.sleep(0.001)
        began_s = time.perf_counter()
        (job_id,) = spool.enqueue([JobRequest(f"key {number}", "r", RECORD, kernel_time_ns=1)]).job_ids
        added.append((time.perf_counter() - began_s) * 1e3)
        assert job_id is not None
        began_s = time.perf_counter()
        spool.start(job_id, "t")
        spool.launched(job_id, 123, 4, 1.0)
        spool.finish(job_id, AttemptResult(None, 0))
        ran.append((time.perf_counter() - began_s) * 1e3)
        if number % 100 == 0:
            spool.sync()
    per_job_ms = (time.process_time() - cpu_s) / JOBS * 1e3
    cpu_s = time.process_time()
    for _ in range(MATCHES // 100):
        spool.record_matches([PastMatch(time.time_ns(), "r", "c", 1, RECORD) for _ in range(100)])
        await asyncio.sleep(0)
    per_match_ms = (time.process_time() - cpu_s) / MATCHES * 1e3
    print(
        f"{name}: enqueue {quantiles(added)}; start to finish {quantiles(ran)};"
        f" CPU {per_job_ms:.3f} ms a job, {per_match_ms:.4f} ms a match without a hook; durable: {spool.durable}"
    )
    spool.close()


async def main(parent: str | None) -> None:
    for name in ("process", "direct"):
        disk = ChildDisk(asyncio.get_running_loop()) if name == "process" else DirectDisk()
        with tempfile.TemporaryDirectory(dir=parent) as directory:
            await measure(name, disk, Path(directory))


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
