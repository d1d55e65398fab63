"""Print the cost of a commit of the spool at each level of PRAGMA synchronous. Not a test; run it by hand.

PYTHONPATH=tests .venv/bin/python tests/unit/spool/measure_sync.py [directory on the disk to measure]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from unit.hookkit import request

from cnprocd.spool import database
from cnprocd.spool.store import Store


def main(parent: str | None) -> None:
    for level in ("OFF", "NORMAL", "FULL"):
        for batch, rounds in ((1, 300), (100, 50)):
            with tempfile.TemporaryDirectory(dir=parent) as directory:
                db = database.in_file(Path(directory) / "spool")
                db.execute(f"PRAGMA synchronous = {level}")
                store = Store(db)
                took = []
                for _ in range(rounds):
                    requests = [request("r", {"pid": 1, "cmdline": "x" * 300}) for _ in range(batch)]
                    begin = time.perf_counter()
                    store.enqueue(requests, boot_id="b", now_ns=1, queue_limit=1 << 30)
                    took.append((time.perf_counter() - begin) * 1e3)
                begin = time.perf_counter()
                with open(f"{directory}/spool-wal", "rb") as wal:
                    os.fsync(wal.fileno())
                synced = (time.perf_counter() - begin) * 1e3
                begin = time.perf_counter()
                store.checkpoint()
                moved = (time.perf_counter() - begin) * 1e3
                took.sort()
                print(
                    f"synchronous={level:6} {batch:3} jobs a commit: p50 {took[rounds // 2]:.2f} ms"
                    f"  p99 {took[rounds * 99 // 100]:.2f} ms   after {batch * rounds} jobs: fsync() {synced:.1f} ms"
                    f"  checkpoint() {moved:.1f} ms"
                )
                store.close()


main(sys.argv[1] if len(sys.argv) > 1 else None)
