"""Many jobs at once: all run, in the order of their age, and memory does not grow.

CNPROCD_BULK_JOBS=10000 is the full size; the default suits a busy machine.
"""

import os
import re
import time
from pathlib import Path

from unit.hookkit import Records, aio, hook, request, running

from cnprocd.spool.job import State
from cnprocd.spool.rows import Keep
from cnprocd.spool.spool import Spool

JOBS = int(os.environ.get("CNPROCD_BULK_JOBS", "600"))
SLOTS = 8


def rss_kib():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Counting(Records):
    """Keeps counts instead of records: the test's own memory must not grow either."""

    def __init__(self):
        super().__init__()
        self.finished = 0
        self.sizes = []

    def __call__(self, level, event, **fields):
        if event == "hook_finished":
            self.finished += 1
            if self.finished % (JOBS // 10) == 0:
                self.sizes.append(rss_kib())
            if self._news is not None:
                self._news.set()
        elif event != "hook_started":
            super().__call__(level, event, **fields)


@aio
async def test_many_jobs_at_once_run_in_order_and_memory_stays_flat(tmp_path):
    started, most = [], 0

    def on_started(pid, job_id):
        nonlocal most
        started.append(job_id)
        most = max(most, len(scheduler.running()) + 1)

    records = Counting()
    flood = running(tmp_path, {"r": hook("/bin/true")}, slots=SLOTS, records=records, on_started=on_started)
    async with flood as (spool, scheduler, _):
        spool.keep = Keep(queue_limit=JOBS)
        assert len(spool.enqueue([request("r") for _ in range(JOBS)]).job_ids) == JOBS
        begin = time.monotonic()
        scheduler.wake()
        while records.finished < JOBS:
            await records.until(lambda seen=records.finished: records.finished > seen)
        took_s = time.monotonic() - begin
        assert started == list(range(1, JOBS + 1)), "the oldest goes first, each once"
        assert most == SLOTS
        assert spool.counts().done == JOBS
        assert records.all == []
        assert {job.state for job in (await spool.find_jobs(limit=JOBS)).value} == {State.DONE}
        growth_kib = records.sizes[-1] - records.sizes[1]
        print(f"{JOBS} jobs in {took_s:.1f} s ({JOBS / took_s:.0f} a second), resident {records.sizes} KiB")
        assert growth_kib < 4096


def test_a_long_queue_of_a_busy_rule_does_not_slow_the_choice(tmp_path):
    """Without a timer: the partial index alone must answer the query, without a sort."""
    spool = Spool.open(tmp_path, log=Records())
    spool.enqueue([request("r", serialize_key="k") for _ in range(100)])
    queries = []
    spool._store._db.set_trace_callback(queries.append)
    spool.due(1, rule="r", skip_keys=["k"], skip_jobs=[1])
    spool._store._db.set_trace_callback(None)
    plan = [row[3] for row in spool._store._db.execute(f"EXPLAIN QUERY PLAN {queries[0]}")]
    assert any("USING INDEX queues" in step or "USING COVERING INDEX queues" in step for step in plan), plan
    assert not any("TEMP B-TREE" in step for step in plan), plan
    spool.close()
