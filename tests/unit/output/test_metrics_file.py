"""The metrics file is written by a process of its own, which is stopped as while the disk does not answer."""

import asyncio
import contextlib
import os
import signal

import pytest
from unit.hookkit import PATIENCE_S, Records, aio
from unit.reaping import children_reaped  # noqa: F401 (a fixture)

from cnprocd.output import metrics_file
from cnprocd.output.metrics_file import MetricsFile


@contextlib.asynccontextmanager
async def metrics_to(path):
    """Yield a MetricsFile that has written `first` to a path, its log, and the PID of its process."""
    records, pids = Records(), []
    metrics = MetricsFile(asyncio.get_running_loop(), records)

    def started():
        writer = metrics_file._Writer()
        pids.append(writer._pid)
        return writer

    metrics.edge._start = started
    try:
        metrics.write(str(path), "first\n")
        async with asyncio.timeout(PATIENCE_S):
            while not metrics.edge.counters.done:
                await asyncio.sleep(0.01)
        yield metrics, records, pids
    finally:
        metrics.close()


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("children_reaped")
@aio
async def test_a_stuck_disk_keeps_only_the_latest_metrics(tmp_path, monkeypatch):
    """It delays nothing, is reported once, and the latest text is written when the disk answers."""
    monkeypatch.setattr(metrics_file, "LATE_S", 0.0)
    path = tmp_path / "cnprocd.prom"
    async with metrics_to(path) as (metrics, records, (pid,)):
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        for number in range(20):
            metrics.write(str(path), f"{number}" * 300_000)
            await asyncio.sleep(0)
        assert path.read_text() == "first\n"
        assert metrics.waiting == 1
        assert [record["message"] for record in records.of("metrics_unwritable")] == [
            f"cannot write metrics to {path}: the disk does not answer"
        ]
        os.kill(pid, signal.SIGCONT)
        await until(lambda: metrics.edge.counters.done == 3)
        assert path.read_text() == "19" * 300_000


@pytest.mark.usefixtures("children_reaped")
@aio
async def test_metrics_are_written_again_after_a_failure(tmp_path):
    """A directory that is missing, and a process that was killed: each is reported once, and then it works again."""
    directory = tmp_path / "later"
    async with metrics_to(tmp_path / "cnprocd.prom") as (metrics, records, pids):
        path = directory / "cnprocd.prom"
        for _ in range(3):
            metrics.write(str(path), "missing\n")
        await until(lambda: metrics.edge.counters.done == 3)
        assert len(records.of("metrics_unwritable")) == 1
        directory.mkdir()
        metrics.write(str(path), "there\n")
        await until(lambda: path.exists() and path.read_text() == "there\n")
        os.kill(pids[0], signal.SIGKILL)
        while not path.read_text().startswith("after"):
            metrics.write(str(path), "after\n")
            await asyncio.sleep(0.01)
        assert len(pids) == 2
