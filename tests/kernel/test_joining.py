"""A socket that joins the group during storms of other listeners is not overrun by events that it did not request.

Between joining and the first read, the kernel can send more events than the default receive buffer holds (212,992 bytes
are 256 events). After an overrun it drops everything for that socket until the socket has been read empty.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
from kernel.harness import child

from cnprocd.connector import uapi
from cnprocd.connector.ack import AckWatch
from cnprocd.connector.listener import Listener
from cnprocd.connector.needed import NOTHING_NEEDED
from cnprocd.connector.netlink import read_drops
from cnprocd.connector.source import MOST_AHEAD, Source
from cnprocd.connector.taskstats import Taskstats

BUFFER = 256 << 20  # there may be other storms on this machine
SMALL = 32  # events of a batch
MORE_THAN_FITS = 400  # processes; two events each


@contextmanager
def somebody_listening():
    other = Listener.open(BUFFER)
    other.subscribe()
    try:
        yield
    finally:
        other.unsubscribe()


def make_a_storm():
    for _ in range(MORE_THAN_FITS):
        os.waitpid(child(lambda: os._exit(0)), 0)


def test_the_answer_to_a_request_is_heard():
    with somebody_listening(), AckWatch() as watch:
        make_a_storm()
        ticket = watch.ticket()
        watch.socket.send(uapi.pack_subscription(uapi.PROC_CN_MCAST_LISTEN, None, ticket))
        ack = watch.wait(ticket, 1.0)
        watch.socket.send(uapi.pack_subscription(uapi.PROC_CN_MCAST_IGNORE, None))
        assert ack is not None
        assert read_drops(watch.socket) == 0


def test_nothing_is_lost_between_joining_and_the_first_read():
    with somebody_listening():
        listener = Listener.open(BUFFER)
        make_a_storm()
        source = Source(listener, BUFFER)
        source.subscribe()
        assert not source.drain().overrun
        source.count_losses()
        assert listener.drops() == source.losses.total() == 0
        source.close()


def test_no_record_is_lost_between_registering_and_reading():
    records = Taskstats(BUFFER)
    make_a_storm()
    assert len(records.drain()) >= MORE_THAN_FITS
    assert (records.overruns, records.drops()) == (0, 0)
    records.close()


def test_records_of_a_backlog_wait_in_the_socket():
    """Until then all queued records were read with the first batch, and held up and filled a daemon that was behind."""
    source = Source(Listener.open(BUFFER), BUFFER)
    source.subscribe()
    source.drain()
    failed = {fail_now() for _ in range(MORE_THAN_FITS)}
    with_record: set[int] = set()
    more = True
    while more:
        batch = source.drain(SMALL)
        more = batch.more
        with_record |= {record.pid for record in batch.records.records}
        exited = {row[3] for row in batch.events if row[0] == uapi.PROC_EVENT_EXIT}
        assert failed & exited <= with_record, "each exit has its record with it or before it"
        # All queued records are read for an exit whose record came earlier, between two drains, or never.
        strangers = exited - failed - {record.pid for record in batch.records.records}
        assert not more or strangers or len(batch.records) <= SMALL + MOST_AHEAD
        source.blank_slots(NOTHING_NEEDED)
    assert failed <= with_record
    source.close()


def fail_now() -> int:
    pid = child(lambda: os._exit(1))
    os.waitpid(pid, 0)
    return pid


@pytest.mark.parametrize("size", [4096, 1 << 20])
def test_the_buffer_is_as_large_as_was_asked_for(size):
    listener = Listener.open(size)
    assert listener.set_receive_buffer(size) == size
    listener.unsubscribe()
