"""A kernel between a machine and a daemon: it delivers what was requested, byte by byte as the real one does.

The event mask is cn_filter() of drivers/connector/cn_proc.c. The two programs run on the BPF machine of
unit/connector/bpf.py over messages laid out by unit/connector/wire.py. cnprocd itself decodes the delivered messages.
"""

from unit.connector import bpf, wire

from cnprocd.connector.decode import SLOT_SIZE, Rejects, rows
from cnprocd.connector.event import Event, Exit, Row
from cnprocd.connector.filter import connector_program, taskstats_program
from cnprocd.connector.request import Features, Request
from cnprocd.connector.taskrecord import RECORD_SLOT_SIZE, ReadRecords, RecordReader, TaskRecord

FAMILY = 27
EVENT_ALL, NONZERO_EXIT, EXIT = 0xE00003C7, 0x20000000, 0x80000000


def event_message(event: Event) -> bytes:
    fields = event._asdict()
    what, cpu, at_ns = (fields.pop(name) for name in ("what", "cpu", "timestamp_ns"))
    return wire.datagram(wire.proc_event(type(event).__name__.lower(), cpu, at_ns, what, **fields))


def record_message(record: TaskRecord) -> bytes:
    fields = {
        "ac_pid": record.pid, "ac_tgid": record.tgid, "ac_ppid": record.ppid, "ac_exitcode": record.status,
        "ac_flag": 0x20 if record.last else 0, "ac_uid": record.uid, "ac_gid": record.gid,
        "ac_comm": record.comm.encode("utf-8", "surrogateescape"), "ac_btime64": record.begin_time_s,
        "ac_tgetime": record.lifetime_us, "ac_utime": record.cpu_time_us, "hiwater_rss": record.max_rss_kib,
        "ac_exe_dev": record.exe_device, "ac_exe_inode": record.exe_inode,
    }  # fmt: skip
    group = wire.taskstats(13) if record.threaded else None
    return wire.exit_record(wire.taskstats(13, **fields), group, FAMILY)


class Kernel:
    """A kernel with this `request` and without `features`."""

    def __init__(self, request: Request, features: Features) -> None:
        self._mask = request.mask if features.event_mask else EVENT_ALL
        self._connector = connector_program(request.connector) if features.socket_filter else ()
        assert not self._connector or bpf.check(self._connector) is None
        self._taskstats = None if request.taskstats is None else taskstats_program(request.taskstats)
        assert features.taskstats or self._taskstats is None, "exit records were asked for where there are none"
        self.reader = RecordReader(FAMILY)
        self.delivered = 0

    def event(self, event: Event, message: bytes) -> Row | None:
        """Return what the daemon gets of an event."""
        if not self._wants(event) or not bpf.run(self._connector, message):
            return None
        self.delivered += 1
        (got,) = rows(message + b"\0" * (SLOT_SIZE - len(message)), Rejects())
        return got

    def records(self, messages: list[bytes]) -> ReadRecords:
        """Return what the daemon gets of exit records, read in one batch."""
        passed = [one for one in messages if self._taskstats is not None and bpf.run(self._taskstats, one)]
        slots = b"".join(one.ljust(RECORD_SLOT_SIZE, b"\0") for one in passed)
        return self.reader.read(memoryview(slots), list(map(len, passed)))

    def _wants(self, event: Event) -> bool:
        if self._mask == EVENT_ALL:
            return True
        if self._mask & NONZERO_EXIT and event.what == EXIT and isinstance(event, Exit) and event.exit_code:
            return True
        return bool(self._mask & event.what)
