"""recvmmsg into slots, over real datagram sockets. An AF_UNIX pair has the needed properties: datagrams, their lengths,
MSG_TRUNC and EAGAIN. Only netlink has a sender's nl_pid, so EventSlots gets its batches and headers from the test here,
and from the real kernel in tests/kernel.
"""

import errno
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.connector.wire import datagram, proc_event

from cnprocd.connector.decode import SLOT_SIZE, Rejects, decode
from cnprocd.connector.eventslots import EventSlots
from cnprocd.connector.recvmmsg import HEADER_SIZE, SOCKADDR_NL, Slots

GOOD = datagram(proc_event("exec", process_pid=7, process_tgid=7))


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        yield ours, theirs


def test_datagrams_are_received_whole_and_in_order(pair):
    ours, theirs = pair
    slots = Slots(8, 16)
    sent = [b"a", b"bc", b"", b"0123456789abcdef"]
    for message in sent:
        theirs.send(message)
    assert slots.receive(ours.fileno()) == 4
    assert [slots.length(i) for i in range(4)] == [1, 2, 0, 16]
    assert [bytes(slots.slot(i)[: slots.length(i)]) for i in range(4)] == sent
    assert not any(slots.truncated(i) for i in range(4))


def test_a_longer_datagram_is_marked_truncated(pair):
    ours, theirs = pair
    slots = Slots(2, 16)
    theirs.send(b"x" * 17)
    assert slots.receive(ours.fileno()) == 1
    assert slots.truncated(0)
    assert slots.length(0) == 16


def test_an_empty_queue_gives_none_and_does_not_wait(pair):
    assert Slots(2, 16).receive(pair[0].fileno()) == 0


def test_more_than_the_slots_hold_is_left_for_the_next_call(pair):
    ours, theirs = pair
    slots = Slots(3, 16)
    for n in range(7):
        theirs.send(bytes([n]))
    got = []
    while count := slots.receive(ours.fileno()):
        got += [slots.slot(i)[0] for i in range(count)]
    assert got == list(range(7))


def test_a_failure_is_an_oserror_with_its_errno():
    with pytest.raises(OSError) as caught:
        Slots(1, 16).receive(-1)
    assert caught.value.errno == errno.EBADF


def test_only_whole_datagrams_of_the_kernel_are_handed_over(pair):
    ours, theirs = pair
    slots = Slots(4, 16)
    for message in (b"first", b"forged", b"x" * 20, b"last"):
        theirs.send(message)
    count = slots.receive(ours.fileno())
    SOCKADDR_NL.pack_into(slots.names, 1 * SOCKADDR_NL.size, socket.AF_NETLINK, 0, 4711, 1)
    assert [bytes(d) for d in slots.datagrams(count)] == [b"first", b"last"]


def test_an_empty_event_queue_is_none(pair):
    assert EventSlots(4).receive(pair[0].fileno(), Rejects()) is None


def test_an_unclean_batch_is_looked_at_slot_by_slot(pair):
    """AF_UNIX leaves other addresses than netlink, so the fast comparison fails and every slot is checked alone."""
    ours, theirs = pair
    slots, rejects = EventSlots(8), Rejects()
    for message in (GOOD, GOOD[:40], GOOD, GOOD + b"four", GOOD + b"12345", GOOD):
        theirs.send(message)
    batch = slots.receive(ours.fileno(), rejects)
    assert len(decode(batch, Rejects())) == 3
    assert rejects == Rejects(wrong_length=2, truncated=1)


KINDS = ["good", "forged", "short", "truncated"]


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
def test_the_good_slots_of_a_mixed_batch_are_kept_in_order(kinds):
    event_slots, rejects = EventSlots(12), Rejects()
    slots = event_slots._slots
    for i, kind in enumerate(kinds):
        message = datagram(proc_event("exec", timestamp_ns=i, process_pid=i, process_tgid=i))
        slots.view[i * SLOT_SIZE : i * SLOT_SIZE + len(message)] = message
        header = slots._mmsghdrs[i]
        header.len = 60 if kind == "short" else 76
        header.hdr.flags = 0x20 if kind == "truncated" else 0
        sender = 99 if kind == "forged" else 0
        SOCKADDR_NL.pack_into(slots.names, i * SOCKADDR_NL.size, socket.AF_NETLINK, 0, sender, 1)

    batch = event_slots._pick_clean(0, len(kinds), rejects)

    kept = [event.timestamp_ns for event in decode(batch, Rejects())]
    assert kept == [i for i, kind in enumerate(kinds) if kind == "good"]
    assert rejects == Rejects(
        foreign_sender=kinds.count("forged"), wrong_length=kinds.count("short"), truncated=kinds.count("truncated")
    )
    assert bytes(slots.headers) == event_slots._clean_headers, "the next batch is compared with clean headers again"


def test_headers_are_compared_as_the_kernel_writes_them():
    event_slots = EventSlots(2)
    assert len(event_slots._clean_headers) == 2 * HEADER_SIZE
    assert event_slots._clean_names == SOCKADDR_NL.pack(socket.AF_NETLINK, 0, 0, 1) * 2
