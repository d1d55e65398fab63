"""A small daemon for test_crash.py: it enqueues numbered jobs, runs them, and is killed at any instant.

Standard output: "started" once, "committed FROM TO" after each commit (numbers FROM..TO-1), "finished" as hooks end,
"drained" at the end.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from unit.hookkit import Records, request, shell

from cnprocd.spool.disk import ChildDisk
from cnprocd.spool.scheduler import Scheduler
from cnprocd.spool.spool import Spool


class Printing(Records):
    """Prints a line when a hook has finished."""

    def __call__(self, level: str, event: str, **fields: object) -> None:
        super().__call__(level, event, **fields)
        if event == "hook_finished":
            put("finished")


def put(text: str) -> None:
    os.write(1, text.encode() + b"\n")


async def main(directory: Path, first: int, last: int) -> None:
    records = Printing()
    spool = Spool.open(directory, log=records, disk=ChildDisk(asyncio.get_running_loop()))
    ledger = directory / "ledger"
    scheduler = Scheduler(spool, {"r": shell(f'echo "$CNPROCD_PID" >>{ledger}')}, slots=4, log=records)
    put("started")
    scheduler.start()
    while first < last:
        after = min(first + 5, last)
        spool.enqueue([request("r", {"pid": n}, key=f"job-{n}") for n in range(first, after)])
        put(f"committed {first} {after}")
        scheduler.wake()
        first = after
        await asyncio.sleep(0.002)
    await records.until(lambda: not scheduler.running() and not spool.counts().waiting)
    await scheduler.stop(5)
    spool.close()
    put("drained")


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
