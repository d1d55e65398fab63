"""Reading the kernel's log: bounded, and what is skipped is unknown. The descriptor is a pipe that plays the device."""

import os

import pytest

from cnprocd.process.kernel_log import KernelLog
from cnprocd.process.model import Occurrence, Process

LINE = b"3,%d,5000000,-;Out of memory: Killed process %d (x) total-vm:1kB\n"
OTHER = b"6,1,5000000,-;nothing to see\n"


class Device:
    """Lines as read(2) of /dev/kmsg returns them, one a call; an exception is raised."""

    def __init__(self, monkeypatch):
        self.lines = []
        self.reads = self.skips = 0
        monkeypatch.setattr(os, "read", self.read)
        monkeypatch.setattr(os, "lseek", self.skip)

    def read(self, fd, size):
        self.reads += 1
        line = (
            next(self.endless) if hasattr(self, "endless") else self.lines.pop(0) if self.lines else BlockingIOError()
        )
        if isinstance(line, OSError):
            raise line
        return line

    def skip(self, fd, offset, whence):
        self.skips += 1


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def killed(log, pid, end_ns=1):
    occurrence = Occurrence("exit", Process(pid), pid, 9, end_ns)
    log.explain(occurrence, 1 << 62)
    return occurrence.oom


def test_a_victim_is_found_among_other_lines(device):
    log = KernelLog(0)
    device.lines = [OTHER, LINE % (1, 7), OTHER]
    assert [killed(log, 7), killed(log, 8)] == [True, False]


def test_after_an_overrun_only_what_is_read_is_known(device):
    log = KernelLog(0)
    device.lines = [BrokenPipeError(), LINE % (1, 7), OTHER]
    assert [killed(log, 7), killed(log, 8)] == [True, "lost"]
    assert killed(log, 8, 1 << 62) is False, "a death after it"


def test_an_endless_log_is_given_up_and_hides_earlier_deaths(device):
    """Each reading takes its time at most, all of them together a tenth of it, and the next one starts at the end."""
    log = KernelLog(0)
    device.endless = iter(lambda: OTHER, None)
    assert [killed(log, pid) for pid in range(100)] == ["lost"] * 100
    assert device.skips == 100
    assert device.reads % 64 == 0, "the time is looked at every 64 lines"


def test_a_log_that_cannot_be_read_makes_kills_unknown(device):
    log = KernelLog(None, "cannot open it")
    assert killed(log, 7) == "unreadable"
    failed = Occurrence("exit", Process(7), 7, 3 << 8, 1)
    log.explain(failed, 0)
    assert failed.oom_killed is False
    log.tick(lambda pid: True)
    assert (log.read(), device.reads) == ([], 0)


def test_a_broken_device_makes_kills_unknown(device):
    log = KernelLog(0)
    device.lines = [OSError(5, "Input/output error")]
    assert killed(log, 7) == "lost"


def test_lines_from_before_the_start_are_read_at_once(device, monkeypatch):
    """An adopted descriptor stands at the oldest line: the lines of a boot must not burden the first death."""
    monkeypatch.setattr(os, "set_blocking", lambda fd, blocking: None)
    device.lines = [*[OTHER] * 1000, LINE % (1, 7)]
    log = KernelLog.open([0])
    assert device.lines == []
    assert [killed(log, 7), killed(log, 8)] == [True, False]


def test_an_adopted_descriptor_does_not_block():
    """systemd.exec(5): NonBlocking= clears the flag of every descriptor that is passed."""
    reading, writing = os.pipe()
    log = KernelLog.open([reading])
    assert not os.get_blocking(reading)
    assert log.read() == []
    log.close()
    os.close(writing)
