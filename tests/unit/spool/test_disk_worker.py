"""The process of the spool is started before the rest of the daemon, and ends with a start that fails."""

import asyncio
import os

import pytest
from unit.hookkit import Records, aio, request
from unit.reaping import children_reaped  # noqa: F401 (a fixture)

from cnprocd.cli import cnprocd as program
from cnprocd.errors import ConfigError
from cnprocd.spool import disk_worker
from cnprocd.spool.disk import ChildDisk
from cnprocd.spool.disk_worker import DiskWorker
from cnprocd.spool.spool import Spool


@aio
async def test_a_spool_uses_the_process_that_was_started_before(tmp_path):
    worker = DiskWorker()
    disk = ChildDisk(asyncio.get_running_loop(), first=worker)
    spool = Spool.open(tmp_path, log=Records(), disk=disk)
    spool.enqueue([request("r")])
    assert disk._worker is worker
    spool.close()
    os.waitpid(worker._pid, 0)


def test_a_start_that_fails_lets_the_process_end():
    with pytest.raises(ConfigError), program._disk_worker() as worker:
        raise ConfigError("invalid rules")
    assert worker.fileno() == -1
    assert os.waitpid(worker._pid, 0)[0] == worker._pid


def test_a_start_without_that_process_goes_on(monkeypatch):
    """The spool starts it when it needs it, and reports if it cannot."""

    def fail():
        raise OSError(11, os.strerror(11))

    monkeypatch.setattr(disk_worker, "DiskWorker", fail)
    with program._disk_worker() as worker:
        assert worker is None
