"""Datagrams to events, compared with datagrams laid out by ctypes from the C headers (wire.py); then arbitrary bytes.

Every field of a kernel datagram must come back. Everything else must be counted in the one right counter and never
raise.
"""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.connector.wire import MEMBERS, WHAT, datagram, proc_event

from cnprocd.connector import uapi
from cnprocd.connector.decode import SLOT_SIZE, Rejects, decode, rows, sequences
from cnprocd.connector.event import Ack, Comm, Coredump, Exec, Exit, Fork, Gid, Ptrace, Sid, Uid, named

TYPES: dict[str, Any] = {
    "ack": Ack, "fork": Fork, "exec": Exec, "uid": Uid, "gid": Gid, "sid": Sid, "ptrace": Ptrace, "comm": Comm,
    "coredump": Coredump, "exit": Exit,
}  # fmt: skip
NAMES = {"ack": ("err", "ack")}  # the acknowledgement's `ack` is of struct cn_msg

pids = st.integers(1, 2**22)
words = st.integers(0, 2**32 - 1)
times = st.integers(0, 2**63)
cpus = st.integers(0, 2**32 - 1)  # the acknowledgement's is -1


def slot(message, filler=b"\0"):
    """Return a datagram as recvmmsg leaves it: at the start of its slot, with old bytes behind it."""
    return message[:SLOT_SIZE] + filler * (SLOT_SIZE - len(message))


def values_of(member):
    """Return a strategy for every field of a union member, by its C name."""
    fields = {}
    for name, kind in MEMBERS[member]._fields_:
        is_pid = name.endswith(("pid", "tgid"))
        fields[name] = st.binary(max_size=16) if name == "comm" else pids if is_pid else words
        assert name == "comm" or kind.__name__.removesuffix("_be") in ("c_int", "c_uint")
    return st.fixed_dictionaries(fields)


def test_the_table_has_all_ten_events_and_the_acknowledgement():
    assert len(TYPES) == 10
    assert {w for w in WHAT.values() if w} == set(uapi.EVENT_NAMES) - {uapi.PROC_EVENT_NONZERO_EXIT}
    assert uapi.PROC_EVENT_ALL == sum(WHAT.values()) | 0x20000000 == 0xE00003C7
    for name, event in TYPES.items():
        fields = [field for field, _ in MEMBERS[name]._fields_] if name not in NAMES else list(NAMES[name])
        assert event._fields == ("what", "cpu", "timestamp_ns", *fields)


@pytest.mark.parametrize("member", TYPES)
@given(data=st.data())
def test_every_field_of_every_event_comes_back(member, data):
    cpu, at, seq, ack = data.draw(cpus), data.draw(times), data.draw(words), data.draw(words)
    fields = data.draw(values_of(member))
    message = datagram(proc_event(member, cpu, at, **fields), seq, ack)
    assert len(message) == uapi.DATAGRAM_SIZE == 76
    if member == "comm":
        fields["comm"] = fields["comm"].split(b"\0")[0]
    if member == "ack":
        fields["ack"] = ack

    rejects = Rejects()
    (event,) = decode(slot(message), rejects)

    assert type(event) is TYPES[member]
    assert event._asdict() == {"what": WHAT[member], "cpu": cpu, "timestamp_ns": at, **fields}
    assert rejects == Rejects(acknowledgements=member == "ack")
    assert list(sequences(slot(message))) == [(seq, cpu)]


@pytest.mark.parametrize(
    "comm",
    [
        b"", b"sh", b"fifteen bytes!!", b"sixteen bytes ok", b"new\nline", b"\xff\xfe\x80", b"\x1b[31mred",
        b"a) R 1 (b", "naïve ☃".encode(),
    ],
)  # fmt: skip
def test_comm_is_the_bytes_up_to_the_first_nul(comm):
    """Old bytes behind the NUL, which the kernel may leave there, are not part of it."""
    stale = comm + b"\0stale"[: max(0, 16 - len(comm))]
    (event,) = decode(slot(datagram(proc_event("comm", process_pid=1, process_tgid=1, comm=stale))), Rejects())
    assert event.comm == comm


@given(members=st.lists(st.sampled_from(sorted(TYPES)), max_size=40))
def test_a_batch_is_decoded_in_order(members):
    batch = b"".join(slot(datagram(proc_event(m, timestamp_ns=i)), b"\xee") for i, m in enumerate(members))
    assert [(e.timestamp_ns, e.what) for e in decode(memoryview(batch), Rejects())] == [
        (i, WHAT[m]) for i, m in enumerate(members)
    ]


GOOD = proc_event("fork", 1, 2, parent_pid=3, parent_tgid=3, child_pid=4, child_tgid=4)
WRONG = {
    "nlmsg_len of another size": {"nlmsg_len": 80},
    "nlmsg_len of the payload alone": {"nlmsg_len": 40},
    "nlmsg_type NLMSG_NOOP": {"nlmsg_type": 1},
    "nlmsg_type NLMSG_ERROR": {"nlmsg_type": 2},
    "nlmsg_flags set": {"nlmsg_flags": 1},
    "another connector's idx": {"idx": 2},
    "another connector's val": {"val": 2},
    "cn_msg.len too small": {"len": 32},
    "cn_msg.len too large": {"len": 44},
    "cn_msg.flags set": {"flags": 1},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_head_id_or_size_is_dropped_and_counted(wrong):
    batch = slot(datagram(GOOD)) + slot(datagram(GOOD, **WRONG[wrong])) + slot(datagram(GOOD))
    rejects = Rejects()
    assert len(decode(batch, rejects)) == 2
    assert rejects == Rejects(wrong_id=1)
    assert rejects.total() == 1


@given(what=words.filter(lambda what: what not in WHAT.values()))
def test_an_unknown_bit_is_dropped_and_counted(what):
    rejects = Rejects()
    assert decode(slot(datagram(proc_event("ack", what=what))), rejects) == []
    assert rejects == Rejects(unknown_event=1)


def test_a_failed_exit_never_has_the_bit_that_is_asked_for():
    rejects = Rejects()
    assert decode(slot(datagram(proc_event("exit", what=uapi.PROC_EVENT_NONZERO_EXIT))), rejects) == []
    assert rejects == Rejects(unknown_event=1)


@given(st.lists(st.binary(min_size=SLOT_SIZE, max_size=SLOT_SIZE), max_size=6))
def test_random_slots_are_counted_and_never_raise(slots):
    rejects = Rejects()
    events = decode(b"".join(slots), rejects)
    assert len(events) + rejects.total() == len(slots)


@given(
    flips=st.lists(st.tuples(st.integers(0, 75), st.integers(1, 255)), min_size=1, max_size=3),
    member=st.sampled_from(sorted(TYPES)),
)
def test_a_spoiled_datagram_is_an_event_or_is_counted(flips, member):
    message = bytearray(datagram(proc_event(member)))
    for at, by in flips:
        message[at] ^= by
    rejects = Rejects()
    events = decode(slot(bytes(message)), rejects)
    head = bytes(message[:8]) + bytes(message[16:24]) + bytes(message[32:36])
    whole = datagram(proc_event(member))
    if head != whole[:8] + whole[16:24] + whole[32:36]:
        assert (events, rejects) == ([], Rejects(wrong_id=1))
    elif struct.unpack_from("=I", message, 36)[0] not in WHAT.values():
        assert (events, rejects) == ([], Rejects(unknown_event=1))
    else:
        assert len(events) == 1
        assert rejects.total() == 0


@given(counts=st.tuples(*[st.integers(0, 9)] * 5))
def test_the_total_of_rejects_is_their_sum(counts):
    assert Rejects(*counts).total() == sum(counts)


# --- requests


@pytest.mark.parametrize(("op", "name"), [(1, "PROC_CN_MCAST_LISTEN"), (2, "PROC_CN_MCAST_IGNORE")])
@given(mask=st.none() | words, ack=words)
def test_a_subscription_is_laid_out_as_the_kernel_reads_it(op, name, mask, ack):
    assert getattr(uapi, name) == op
    payload = struct.pack("=I", op) if mask is None else struct.pack("=II", op, mask)
    assert uapi.pack_subscription(op, mask, ack) == datagram(payload, ack=ack)


# --- rows


@given(members=st.lists(st.sampled_from(sorted(set(TYPES) - {"ack"})), max_size=40), data=st.data())
def test_rows_of_a_whole_batch_are_its_events(members, data):
    """A clean batch gives plain tuples, of which `named` makes what `decode` returns."""
    batch = b"".join(
        slot(datagram(proc_event(m, data.draw(cpus), data.draw(times), **data.draw(values_of(m)))), b"\xee")
        for m in members
    )
    read = rows(batch, Rejects())
    assert all(type(row) is tuple for row in read)
    assert list(map(named, read)) == decode(batch, Rejects())


@given(members=st.lists(st.sampled_from([*TYPES, *WRONG, "unknown"]), max_size=20))
def test_rows_of_a_mixed_batch_are_checked_one_by_one(members):
    """One datagram that does not fit, and the whole batch goes the careful way: the same events, the same counts."""
    batch = b""
    for member in members:
        if member in WRONG:
            batch += slot(datagram(GOOD, **WRONG[member]))
        elif member == "unknown":
            batch += slot(datagram(proc_event("fork", what=0x10)))
        else:
            batch += slot(datagram(proc_event(member)))
    rejects, careful = Rejects(), Rejects()
    read = [named(row) for row in rows(memoryview(batch), rejects)]
    assert read == [event for event in decode(batch, careful) if not isinstance(event, Ack)]
    assert rejects == careful
