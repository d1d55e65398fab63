"""The journal's native protocol, read back by a parser written from its specification, over a real datagram socket."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.output import journal
from cnprocd.output.sink import JournalSink

REPOSITORY = Path(__file__).resolve().parents[3]

MATCH = {
    "timestamp": "2026-01-02T03:04:05.678901Z",
    "level": "error",
    "event": "rule_matched",
    "rule": "oracle-process-died",
    "pid": 4711,
    "comm": "ora_pmon",
    "exe": None,
    "recovered": False,
    "exit_code": 3,
    "cmdline": ["ora_pmon", "-x"],
    "message": "ora_pmon[4711] died of exit 3",
}


def parse(data: bytes) -> dict[str, bytes]:
    """systemd.io/JOURNAL_NATIVE_PROTOCOL, strictly: a malformed entry or a repeated field raises."""
    entry: dict[str, bytes] = {}
    position = 0
    while position < len(data):
        end = data.index(b"\n", position)
        line = data[position:end]
        if b"=" in line:
            name, value = line.split(b"=", 1)
            position = end + 1
        else:
            name = line
            size = int.from_bytes(data[end + 1 : end + 9], "little")
            value = data[end + 9 : end + 9 + size]
            assert len(value) == size
            assert data[end + 9 + size : end + 10 + size] == b"\n"
            position = end + 10 + size
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name), name
        assert name.decode() not in entry, f"{name!r} twice"
        entry[name.decode()] = value
    return entry


class Journald:
    """What journald does with its socket: read the datagram, or the memfd that comes with an empty one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(5)
        self.seals: int | None = None

    def receive(self) -> dict[str, bytes]:
        data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        for level, kind, payload in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            assert data == b""
            descriptor = array.array("i", payload)[0]
            self.seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            size = os.fstat(descriptor).st_size
            data = os.pread(descriptor, size, 0)
            os.close(descriptor)
        return parse(data)


@pytest.fixture
def journald(tmp_path):
    server = Journald(tmp_path / "journal.sock")
    yield server
    server.socket.close()


@pytest.fixture
def sink(journald):
    sink = JournalSink(journald.path)
    yield sink
    sink.close()


def test_a_match_arrives_with_all_its_fields(journald, sink):
    sink.put(journal.encode(MATCH))
    assert journald.receive() == {
        "MESSAGE": b"ora_pmon[4711] died of exit 3",
        "PRIORITY": b"3",
        "SYSLOG_IDENTIFIER": b"cnprocd",
        "SYSLOG_FACILITY": b"3",
        "MESSAGE_ID": b"2b761c5a2a174400bfd70bbfcdc48658",
        "OBJECT_PID": b"4711",
        "CNPROCD_TIMESTAMP": b"2026-01-02T03:04:05.678901Z",
        "CNPROCD_EVENT": b"rule_matched",
        "CNPROCD_RULE": b"oracle-process-died",
        "CNPROCD_PID": b"4711",
        "CNPROCD_COMM": b"ora_pmon",
        "CNPROCD_RECOVERED": b"false",
        "CNPROCD_EXIT_CODE": b"3",
        "CNPROCD_CMDLINE": b'["ora_pmon", "-x"]',
    }  # and no CNPROCD_EXE: null is a field that is not there


@pytest.mark.parametrize(
    ("level", "priority"),
    [("debug", 7), ("info", 6), ("notice", 5), ("warning", 4), ("error", 3), ("critical", 2), ("odd", 6)],
)
def test_levels_are_syslog_priorities(journald, sink, level, priority):
    sink.put(journal.encode({"event": "started", "level": level}))
    assert journald.receive()["PRIORITY"] == str(priority).encode()


@pytest.mark.parametrize(
    "comm",
    [
        b"x\nPRIORITY=0",
        b"x\nMESSAGE_ID=fc2e22bc6ee647b6b90729ab34a250b1",
        b"\n\n\n",
        b"a\0b",
        b"\x1b[2J\x1b]0;pwn",
        b"\xff\xfe\xc3(",
        b"=",
        b"",
        "\u202eevil".encode(),
    ],
)
def test_a_hostile_comm_stays_in_its_field(journald, sink, comm):
    text = os.fsdecode(comm)
    sink.put(journal.encode({"event": "rule_matched", "level": "error", "comm": text, "message": f"{text}[1] died"}))
    entry = journald.receive()
    assert entry["CNPROCD_COMM"] == comm
    assert entry["PRIORITY"] == b"3"
    assert entry["MESSAGE_ID"] == journal.MESSAGE_IDS["rule_matched"].encode()
    shown = entry["MESSAGE"].decode("utf-8")
    assert shown.isprintable(), shown


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=30),
        st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.lists(st.text()),
        max_size=8,
    )
)
def test_any_record_is_one_well_formed_entry(record):
    names = [journal.field_name(key) for key, value in record.items() if value is not None]
    if len(set(names)) == len(names):
        parse(journal.encode({"event": "started", "level": "info"} | record))


def test_a_message_is_made_when_the_record_has_none():
    assert journal.message({"event": "rules_loaded", "level": "info", "count": 3, "file": None}) == (
        "rules loaded: count=3"
    )


def test_a_rejected_rule_file_keeps_its_lines():
    text = "rules.yaml:3:5: no such event\n    evnts: [exit]\n    ^"
    assert journal.message({"event": "rules_rejected", "message": text}) == text
    assert "\n" not in journal.message({"event": "rule_matched", "message": text})


@pytest.mark.parametrize("size", [100_000, 5_000_000])
def test_a_large_record_arrives_whole(journald, sink, size):
    """5 MB do not fit into a datagram: the record comes as a sealed memfd."""
    sink.put(journal.encode({"event": "hook_output", "level": "info", "output": "x" * size}))
    assert journald.receive()["CNPROCD_OUTPUT"] == b"x" * size
    if size > 1_000_000:
        assert journald.seals == fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def test_without_a_journal_the_sink_is_broken(tmp_path):
    sink = JournalSink(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        sink.put(journal.encode(MATCH))
    sink.close()


def test_a_restarted_journal_is_found_again(journald, sink):
    sink.put(journal.encode(MATCH))
    journald.socket.close()
    with pytest.raises(OSError, match="refused"):
        sink.put(journal.encode(MATCH))
    journald.path.unlink()
    again = Journald(journald.path)
    sink.put(journal.encode(MATCH))
    assert again.receive()["CNPROCD_PID"] == b"4711"
    again.socket.close()


def test_a_stuck_journal_is_not_waited_for(journald, sink):
    with pytest.raises(BlockingIOError):
        for _ in range(10_000):
            sink.put(journal.encode(MATCH))

    async def until_ready():
        ready = asyncio.get_running_loop().create_future()
        sink.when_ready(asyncio.get_running_loop(), lambda: ready.set_result(None))
        await asyncio.sleep(0.02)
        assert not ready.done()
        journald.receive()
        await asyncio.wait_for(ready, 30)

    asyncio.run(until_ready())
    sink.put(journal.encode(MATCH))


def test_journal_stream_is_believed_only_for_that_descriptor(tmp_path):
    left, right = socket.socketpair()
    status = os.fstat(left.fileno())
    environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    assert journal.is_journal_stream(environ, left.fileno())
    assert not journal.is_journal_stream(environ, right.fileno())
    assert not journal.is_journal_stream({}, left.fileno())
    with (tmp_path / "file").open("w") as file:
        status = os.fstat(file.fileno())
        assert not journal.is_journal_stream({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, file.fileno())
    left.close()
    right.close()


def test_message_ids_are_distinct_and_catalogued():
    """One catalog entry for each class, with the same id: `journalctl -x` explains every record."""
    ids = journal.MESSAGE_IDS
    assert len(set(ids.values())) == len(ids)
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in ids.values())
    catalog = (REPOSITORY / "systemd" / "cnprocd.catalog").read_text(encoding="utf-8")
    assert set(re.findall(r"^-- ([0-9a-f]{32})$", catalog, re.M)) == set(ids.values())
