"""Recordings: they are read as written, damage is rejected, and a replay is the same every time."""

import contextlib
import io
import json
import os
import stat
import struct
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.cli.cnprocctl import run
from cnprocd.cli.recording import MAGIC, Drain, RecordingError, Writer, facts_of, read
from cnprocd.cli.replaying import RecordedProc, replay
from cnprocd.connector import uapi
from cnprocd.connector.decode import SLOT_SIZE, Rejects, decode
from cnprocd.process.model import Process
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.load import load

HEADER = {"version": "0", "byte_order": sys.byteorder, "taskstats": False, "family": None}
SECOND = 1_000_000_000
texts = st.text().map(lambda text: text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"))
processes = st.builds(
    Process,
    tgid=st.integers(1, 2**22),
    ppid=st.none() | st.integers(0, 2**22),
    start_ns=st.none() | st.integers(0, 2**62),
    comm=st.none() | texts,
    uid=st.none() | st.integers(0, 2**32 - 2),
    exe=st.none() | texts,
    cmdline=st.none() | texts,
)


def datagram(what, at_ns, *words, cpu=0):
    event = struct.pack("=IIQ", what, cpu, at_ns) + struct.pack(f"={len(words)}I", *words).ljust(24, b"\0")
    message = uapi.CN_MSG.pack(uapi.CN_IDX_PROC, uapi.CN_VAL_PROC, 0, 0, len(event), 0) + event
    return uapi.NLMSGHDR.pack(uapi.DATAGRAM_SIZE, uapi.NLMSG_DONE, 0, 0, 0) + message


def forked(at_ns, parent, child):
    return datagram(uapi.PROC_EVENT_FORK, at_ns, parent, parent, child, child)


def execed(at_ns, pid):
    return datagram(uapi.PROC_EVENT_EXEC, at_ns, pid, pid)


def exited(at_ns, pid, status, parent):
    return datagram(uapi.PROC_EVENT_EXIT, at_ns, pid, pid, status, 17, parent, parent)


def a_recording():
    """PID 100 (an oracle user's shell) starts ora_pmon_X, which is killed, and then one that succeeds."""
    file = io.BytesIO()
    writer = Writer(file)
    writer.values(b"H", HEADER)
    shell = Process(
        100, 1, 5 * SECOND, comm="bash", uid=54321, gid=54321, exe="/bin/bash", cgroup="/system.slice/o.service"
    )
    writer.values(b"S", [facts_of(Process(1, 0, 0, comm="systemd")), facts_of(shell)])
    writer.values(b"N", {"54321": "oracle"})
    start = 10 * SECOND
    for pid, status in ((200, 9), (201, 0)):
        image = Process(pid, 100, start, comm="ora_pmon_X", uid=54321, gid=54321, exe="/opt/oracle", threads=1)
        writer.drain(Drain(forked(start, 100, pid) + execed(start + 5, pid), [], [image]))
        writer.drain(Drain(exited(start + SECOND, pid, status, 100)))
        start += 2 * SECOND
    writer.end({"ended": "its time", "lost": 0})
    return file.getvalue()


RULES = """
rules:
  - name: died
    events: [nonzero_exit]
    match: {comm: "ora_*", user: oracle, exe: "/opt/*", parent: {comm: bash}, unit: o.service, lifetime: "< 2s"}
  - {name: born, events: [exec], match: {comm: "ora_*"}}
  - {name: elsewhere, events: [exit], match: {comm: other}}
"""


@pytest.fixture
def rules(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(RULES.replace("user: oracle", "user: 54321"))
    return file


def test_a_replay_gives_the_matches_the_daemon_would_have_made(rules):
    found = replay(read(io.BytesIO(a_recording())), Matcher(load(rules).rules))
    assert [(one["rule"], one["pid"]) for one in found.matches] == [("born", 200), ("died", 200), ("born", 201)]
    died = found.matches[1]
    assert (died["signal"], died["user"], died["exe"], died["parent_comm"]) == (
        "SIGKILL",
        "oracle",
        "/opt/oracle",
        "bash",
    )
    assert (found.events, found.unreadable) == (6, 0)


def test_a_replay_is_the_same_every_time(rules):
    data, matcher = a_recording(), Matcher(load(rules).rules)
    first, second = (replay(read(io.BytesIO(data)), matcher) for _ in range(2))
    assert first.matches == second.matches
    assert (first.rules, first.events, first.span_s) == (second.rules, second.events, second.span_s)


def test_who_is_alive_follows_from_the_recording():
    proc = RecordedProc([Process(100, 1, 0, comm="bash", threads=1)], has_records=False)
    proc.note(decoded(forked(5, 100, 200)), [])
    assert proc.is_alive(200)
    assert proc.read(200).comm == "bash"  # inherited
    thread = datagram(uapi.PROC_EVENT_FORK, 6, 1, 1, 201, 200)
    proc.note(decoded(thread + datagram(uapi.PROC_EVENT_EXIT, 7, 200, 200, 0, 17, 1, 1)), [])
    assert proc.is_alive(200)  # its second thread runs
    proc.note(decoded(datagram(uapi.PROC_EVENT_EXIT, 8, 201, 200, 0, 17, 1, 1)), [])
    assert not proc.is_alive(200)
    assert proc.read(200) is None
    assert proc.is_alive(100)


def decoded(data):
    size = uapi.DATAGRAM_SIZE
    slots = (data[at : at + size].ljust(SLOT_SIZE, b"\0") for at in range(0, len(data), size))
    return decode(b"".join(slots), Rejects())


def test_users_have_the_names_of_the_machine_that_recorded(tmp_path, capsys):
    (tmp_path / "rules.yaml").write_text(RULES)  # user: oracle, which this machine may not have
    (tmp_path / "file").write_bytes(a_recording())
    status = run(["--json", "--rules", str(tmp_path / "rules.yaml"), "replay", str(tmp_path / "file")])
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert found["summary"]["rules"] == {"born": 2, "died": 1}
    assert set(found["timing"]) == {"seconds", "events_per_second", "microseconds_per_event"}


def test_replay_shows_figures(tmp_path, rules, capsys):
    (tmp_path / "file").write_bytes(a_recording())
    assert run(["--rules", str(rules), "replay", str(tmp_path / "file"), "--rule", "died"]) == 0
    out = capsys.readouterr().out
    assert out.count("SIGKILL") == 1
    assert "6 events and 0 exit records of 3.0 s, 3 matches, born 2, died 1" in out


@given(
    st.lists(processes, max_size=4), st.binary(max_size=300), st.lists(st.binary(min_size=16, max_size=60), max_size=4)
)
def test_what_is_written_is_read(start, noise, messages):
    file = io.BytesIO()
    writer = Writer(file)
    writer.values(b"H", HEADER)
    writer.values(b"S", [facts_of(one) for one in start])
    datagrams = noise[: len(noise) // uapi.DATAGRAM_SIZE * uapi.DATAGRAM_SIZE]
    writer.drain(Drain(datagrams, messages, start))
    writer.end({"lost": 3})
    found = read(io.BytesIO(file.getvalue()))
    assert [facts_of(one) for one in found.start] == [facts_of(one) for one in start]
    assert (found.drains[0].datagrams, found.drains[0].messages) == (datagrams, messages)
    assert (found.end, found.cut_short) == ({"lost": 3}, False)


@given(st.integers(0, 10**6))
def test_a_truncated_recording_is_read_partly_or_refused(length):
    data = a_recording()
    try:
        found = read(io.BytesIO(data[: length % len(data)]))
    except RecordingError:
        return
    assert found.cut_short


@given(st.binary(max_size=300))
def test_garbage_is_refused(data):
    with pytest.raises(RecordingError):
        read(io.BytesIO(MAGIC + data))


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_byte_never_does_worse_than_be_refused(place, flip):
    data = bytearray(a_recording())
    data[place % len(data)] ^= flip
    with contextlib.suppress(RecordingError):
        replay(read(io.BytesIO(bytes(data))), Matcher([]))


def test_a_bomb_is_refused():
    file = io.BytesIO()
    writer = Writer(file)
    writer.values(b"H", HEADER)
    writer._put(writer._compress.compress(struct.pack(">cI", b"D", 0xFFFFFFFF)))
    writer.flush()
    with pytest.raises(RecordingError, match="a chunk of"):
        read(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (b"S", [{"tgid": "x"}]),
        (b"S", [{"comm": "x"}]),
        (b"S", [{"tgid": 1, "evil": 1}]),
        (b"S", {"tgid": 1}),
        (b"S", [7]),
        (b"H", []),
        (b"H", {"family": "x"}),
        (b"?", 1),
        # Found by fuzzing: what the kernel could not have said, and no later step can hold.
        (b"S", [{"tgid": 1, "comm": "\ud800"}]),
        (b"S", [{"tgid": 1, "start_ns": 10**400}]),
        (b"N", {"9" * 4301: "oracle"}),
        (b"N", {"7": "\ud800"}),
        (b"N", {"7": 7}),
    ],
)
def test_chunks_of_another_shape_are_refused(kind, value):
    file = io.BytesIO()
    writer = Writer(file)
    writer.values(b"H", HEADER)
    writer.values(kind, value)
    writer.end({})
    with pytest.raises(RecordingError):
        read(io.BytesIO(file.getvalue()))


def test_record_does_not_overwrite(tmp_path, capsys):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("precious", "link"):
        assert run(["record", str(tmp_path / name)]) != 0
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "target").exists()
    assert "File exists" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may subscribe")
def test_record_without_privilege_leaves_a_private_file_at_most(tmp_path):
    assert run(["record", str(tmp_path / "file")]) != 0
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def unpacking_to(chunk, times):
    """Return a small file that unpacks to many chunks."""
    compress = zlib.compressobj(9)
    head = struct.pack(">cI", b"H", 2) + b"{}"
    file = MAGIC + compress.compress(head)
    for _ in range(times):
        file += compress.compress(chunk * 1000)
    return file + compress.flush()


def test_found_by_fuzzing_what_a_file_unpacks_to_is_bounded(monkeypatch):
    monkeypatch.setattr("cnprocd.cli.recording._MOST_HELD", 1 << 20)
    file = unpacking_to(struct.pack(">cI", b"D", 0), 10)
    assert len(file) < 1000
    with pytest.raises(RecordingError, match="unpacks to more than"):
        read(io.BytesIO(file))


def test_what_stands_behind_the_end_is_not_even_read():
    """zlib would keep all of it, copied once for every piece."""
    whole = a_recording()
    file = io.BytesIO(whole + bytes(4 << 20))
    assert not read(file).cut_short
    assert file.tell() < len(whole) + (1 << 20)
