"""Both kernel sockets as one source: batches of events and exit records, and the exact count of losses.

The order matters. The connector is drained first and taskstats second, so that every exit event in a batch has its
record in the same batch. When the request changes, taskstats is registered before the connector is widened.

Restarts: the service manager can keep both sockets after the daemon has ended. The first drains of the next daemon read
what is queued in them. Before that comes what the last daemon had in flight (inflight.py).

Losses: ENOBUFS reports an overrun, and `Drops` counts the lost events exactly. While every event is asked for, gaps in
the per-CPU sequence also show the events that the kernel could not queue. Nothing is estimated.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from cnprocd.connector.ahead import Ahead
from cnprocd.connector.decode import SLOT_SIZE, Rejects, rows, sequences
from cnprocd.connector.event import Row
from cnprocd.connector.filter import NOTHING, connector_program, taskstats_program
from cnprocd.connector.inflight import EVENT_SLOTS, RECORD_SLOTS, InFlight, Leftover
from cnprocd.connector.listener import Listener
from cnprocd.connector.needed import Needed
from cnprocd.connector.request import Features, Request
from cnprocd.connector.sequence import SequenceTracker
from cnprocd.connector.status import EVERY_STATUS, StatusSet
from cnprocd.connector.taskrecord import AsksFor, ReadRecords, Sheds, TaskRecord
from cnprocd.connector.taskstats import Taskstats, TaskstatsAbsent
from cnprocd.connector.uapi import PROC_EVENT_EXIT

REFUSED = "refused on request"  # with --refuse
MOST_AHEAD = 64  # records read before their event's batch: a sibling's may follow that of the last thread
_RECORD_IN_EVENTS = 3  # a queued record takes up to 2,304 bytes of buffer and an event 832: room for as many of both


class Batch(NamedTuple):
    """The result of one drain. `more`: the connector's queue may hold more. `overrun`: events were lost before it.

    Without `more` the queue was empty after the batch; an event that comes later wakes the loop again.
    """

    events: list[Row]
    records: ReadRecords
    more: bool
    overrun: bool
    events_lost: bool = False  # the overrun was of the connector, not of the exit records' socket


@dataclass(slots=True)
class Losses:
    """Counters since start; they only grow."""

    connector_drops: int = 0  # `Drops` of the socket: events dropped because its buffer was full
    taskstats_drops: int = 0
    missing: int = 0  # events missing by sequence number while every event was asked for; includes drops
    overruns: int = 0  # how often the kernel raised ENOBUFS

    def total(self) -> int:
        return self.connector_drops + self.taskstats_drops + self.sequence_gaps

    @property
    def sequence_gaps(self) -> int:
        """Events that only the sequence shows to be missing: the kernel could not queue them (see sequence.py)."""
        return max(0, self.missing - self.connector_drops)


class Source:
    """The kernel's events and exit records."""

    def __init__(
        self,
        listener: Listener,
        receive_buffer_bytes: int,
        refused: frozenset[str] = frozenset(),
        taskstats_fd: int | None = None,
        keep_taskstats: Callable[[int | None], None] = lambda fd: None,
        in_flight: InFlight | None = None,
    ) -> None:
        """`taskstats_fd`: a socket that was kept. `keep_taskstats` is called with the descriptor to keep, or None."""
        self.listener = listener
        self._in_flight = in_flight or InFlight()
        self._adopted_taskstats = taskstats_fd
        self._keep_taskstats = keep_taskstats
        self._leftover: Leftover | None = self._in_flight.leftover
        self.taskstats: Taskstats | None = None
        self.granted_buffer_bytes = listener.set_receive_buffer(receive_buffer_bytes)
        self.losses = Losses()
        self._events_seen = 0
        self._event_slots_used = 0
        self.records_seen = 0
        self.no_taskstats_because = REFUSED if "taskstats" in refused else ""
        self._buffer_bytes = receive_buffer_bytes
        self._refused = refused
        self._sequence = SequenceTracker()
        self._request: Request | None = None
        self._features = Features()
        self._overruns_before = 0
        self._listener_overruns = 0  # at the last drain
        self._overran = False  # events of the last drain, or after them, were lost
        self._recorded = EVERY_STATUS.wait_statuses()  # the wait statuses of which records come
        self._asks_for: AsksFor | None = None
        self._record_losses = select.epoll()
        self._ahead: set[int] = set()  # threads whose record was read before the batch that has their exit
        self._events_ahead: list[Row] = []  # read by `look_ahead`, for the next drain
        self._slots_ahead = 0  # behind those of the last batch
        self._more_ahead = False
        self._closed_taskstats_drops = 0
        self._drops_at_adoption = listener.drops()

    def subscribe(self, timeout_s: float = 1.0) -> Features:
        """Subscribe to everything and detect the features of this kernel. Raises the errors of Listener.subscribe."""
        self.listener.subscribe(timeout_s)
        self.listener.receive_into(self._in_flight.events)
        self._event_slots_used, _ = self._in_flight.leftover_slots
        if "event_mask" in self._refused:
            self.listener.takes_mask = False
        self._features = Features(
            event_mask=self.listener.takes_mask,
            taskstats=self._register_taskstats(),
            socket_filter="socket_filter" not in self._refused,
        )
        return self._features

    def resize(self, receive_buffer_bytes: int) -> None:
        """Set the receive buffer of both sockets. A smaller one keeps what is queued."""
        self._buffer_bytes = receive_buffer_bytes
        self.granted_buffer_bytes = self.listener.set_receive_buffer(receive_buffer_bytes)
        if self.taskstats is not None:
            self.taskstats.set_receive_buffer(receive_buffer_bytes * _RECORD_IN_EVENTS)

    def pass_over(self, asks_for: AsksFor | None) -> None:
        """Pass over the records of whole processes for which this returns False. None: read every record."""
        self._asks_for = asks_for
        if self.taskstats is not None:
            self.taskstats.reader.pass_over(asks_for)

    def shed(self, sheds: Sheds | None) -> None:
        """Pass over the records of whole processes as well for which this returns something. None: of none."""
        if self.taskstats is not None:
            self.taskstats.reader.sheds = sheds

    def decode(self, message: bytes) -> TaskRecord:
        """Decode an exit record that was read."""
        assert self.taskstats is not None
        return self.taskstats.reader.decode_one(message)

    @property
    def wanted_exits(self) -> StatusSet:
        """The statuses of the exits that the filter passes."""
        return self._request.connector.exits if self._request is not None else EVERY_STATUS

    @property
    def events_seen(self) -> int:
        """Events delivered, without the kernel's acknowledgements."""
        return self._events_seen - self.rejects.acknowledgements

    @property
    def rejects(self) -> Rejects:
        return self.listener.rejects

    def filenos(self) -> tuple[int, int]:
        """Return the descriptors that become readable when there is an event to drain, or records were lost.

        A record alone does not wake the daemon. If it matters, its event follows at once; the records of leaders that
        ended early wait for the next drain.
        """
        return self.listener.fileno(), self._record_losses.fileno()

    def ask(self, request: Request) -> bool:
        """Change what the kernel is asked for, live. Return False if exit records are wanted and are not available."""
        if request == self._request:
            return True
        if request.taskstats is None and self.taskstats is not None:
            self._closed_taskstats_drops += self.taskstats.drops()
            self._keep_taskstats(None)
            self._record_losses.unregister(self.taskstats.fileno())
            self.taskstats.close()
            self.taskstats = None
        elif request.taskstats is not None:
            if self.taskstats is None and not self._register_taskstats():
                return False
            assert self.taskstats is not None
            self.taskstats.attach(taskstats_program(request.taskstats))
            self._recorded = request.taskstats.exits.wait_statuses()
        # Also if no filter is wanted: the last daemon's filter may still be attached to an adopted socket.
        self.listener.attach(connector_program(request.connector) if self._features.socket_filter else ())
        self.listener.narrow(request.mask)
        self._sequence.reset()
        self._request = request
        return True

    def drain(self, most: int = EVENT_SLOTS, all_records: bool = False) -> Batch:
        """Return one batch of at most so many events, and the records that belong to it.

        If the batch is the last one, or with `all_records`, these are all that are queued. Else they are read until
        each exit of the batch has its record, if it makes one, and a few more: it is queued before its event, and tens
        of thousands may follow it. They wait in the socket, not here.
        """
        leftover, self._leftover = self._leftover, None
        self.listener.slots.most = most
        if leftover is not None:
            more = True
            events = rows(memoryview(leftover.events), self.listener.rejects)
            self._events_seen += len(events)
        elif self._slots_ahead:
            events, more = self._events_ahead, self._more_ahead
            self._event_slots_used += self._slots_ahead
            self._events_ahead, self._slots_ahead, self._more_ahead = [], 0, False
        else:
            events, slots = self._receive()
            more = self.listener.slots.filled
            if slots:
                self._event_slots_used = self.listener.slots.first + slots
        records = ReadRecords()
        if self.taskstats is not None:
            if leftover is not None:
                records = self.taskstats.reader.decode(leftover.records)
            everything = all_records or not more or leftover is not None
            records.add(self._drain_records(events, more, everything))
        self.records_seen += len(records)
        events_lost = self.listener.overruns > self._listener_overruns
        self._listener_overruns = self.listener.overruns
        overruns = self._listener_overruns + (self.taskstats.overruns if self.taskstats else 0)
        self._overran, self._overruns_before = overruns > self._overruns_before, overruns
        self.losses.overruns = overruns
        return Batch(events, records, more, self._overran, events_lost)

    def look_ahead(self) -> Ahead:
        """Return the events that came since the last drain, for a look. The next drain returns them as its batch.

        They are not all if there is no room for more, or if some were lost.
        """
        slots = self.listener.slots
        slots.first = self._event_slots_used
        if self._slots_ahead or slots.first == EVENT_SLOTS:
            return Ahead([], is_all=False)
        try:
            self._events_ahead, self._slots_ahead = self._receive()
        except OSError:  # raised again by the next drain, if it lasts
            return Ahead([], is_all=False)
        self._more_ahead = slots.filled
        is_complete = not self._overran and self.listener.overruns == self._listener_overruns
        return Ahead(self._events_ahead, is_complete and not slots.filled)

    @property
    def looked_ahead(self) -> bool:
        """Whether the next drain has events, or an overrun to report, that will not wake the loop."""
        return self._slots_ahead > 0 or self.listener.overruns > self._listener_overruns

    def _receive(self) -> tuple[list[Row], int]:
        """Receive events once. Return them, and how many slots they take."""
        slots = self.listener.receive()
        if slots is None:
            return [], 0
        events = rows(slots, self.listener.rejects)
        self._events_seen += len(events)
        # Not of a leftover: the request of its time is unknown, so gaps in its numbers may not be losses.
        if self._request is not None and self._request.sequence:
            self.losses.missing += self._sequence.note(sequences(slots))
        return events, len(slots) // SLOT_SIZE

    def _drain_records(self, events: list[Row], more: bool, everything: bool) -> ReadRecords:
        assert self.taskstats is not None
        exited = {row[3] for row in events if row[0] == PROC_EVENT_EXIT}
        if everything:
            records = self.taskstats.drain()
        else:  # `_ahead` can have tens of thousands of threads: a copy of it for each batch would take milliseconds
            awaited = {tid for tid in exited if tid not in self._ahead}
            ahead = len(self._ahead) - (len(exited) - len(awaited))
            # Exits of other statuses come for the hooks or the table. All that is queued would be read for one.
            recorded = {row[3] for row in events if row[0] == PROC_EVENT_EXIT and row[5] in self._recorded}
            missing = awaited & recorded
            records = self.taskstats.drain(missing, max(0, MOST_AHEAD - ahead))
        if not more:
            self._ahead.clear()  # the others may have been of leaders that ended early: their event was not asked for
        self._ahead.update(records.passed, [record.pid for record in records.records])
        self._ahead.difference_update(exited)
        return records

    def blank_slots(self, needed: Needed) -> None:
        """Blank the slots of what was drained, except for what is needed: the rest is durable or needs no action."""
        used, ahead, taskstats = self._event_slots_used, self._slots_ahead, self.taskstats
        records_used = taskstats.used if taskstats is not None else 0
        self._event_slots_used, kept_records = self._in_flight.blank(used, records_used, needed, ahead)
        self.listener.slots.first = self._event_slots_used + ahead
        if taskstats is not None:
            taskstats.first = taskstats.used = kept_records

    def count_losses(self) -> None:
        """Read the kernel's own counters into `losses`."""
        self.losses.connector_drops = self.listener.drops() - self._drops_at_adoption
        if self.taskstats is not None:
            self.losses.taskstats_drops = self._closed_taskstats_drops + self.taskstats.drops()

    def take_lost_records(self) -> int:
        """Return how many exit records the last daemons had read and could not keep, once."""
        return self._in_flight.take_lost()

    def refuse_events(self) -> None:
        """Let nothing more into the queue, so that it can be read empty. Needs socket filters."""
        if self._features.socket_filter:
            self.listener.attach(NOTHING)

    def discard(self) -> int:
        """Read what is queued without evaluating it; return how many events that were."""
        count = len(self._events_ahead)
        while (slots := self.listener.receive()) is not None:
            count += len(slots) // SLOT_SIZE
            if not self.listener.slots.filled:
                break
        return count

    def close(self) -> None:
        """Unsubscribe. No later daemon will read these sockets, so nothing stays in flight."""
        self._in_flight.blank(EVENT_SLOTS, RECORD_SLOTS)
        self._record_losses.close()
        if self.taskstats is not None:
            self.taskstats.close()
        self.listener.unsubscribe()

    def _register_taskstats(self) -> bool:
        if "taskstats" in self._refused:
            return False
        adopted, self._adopted_taskstats = self._adopted_taskstats, None
        slots = self._in_flight
        try:
            self.taskstats = Taskstats(self._buffer_bytes * _RECORD_IN_EVENTS, adopted, slots.records, slots.make_room)
        except TaskstatsAbsent as reason:
            self.no_taskstats_because = str(reason)
            return False
        self.taskstats.reader.pass_over(self._asks_for)
        if self._leftover is not None:
            self.taskstats.first = self.taskstats.used = self._in_flight.leftover_slots[1]
        self._record_losses.register(self.taskstats.fileno(), 0)  # EPOLLERR is always reported (epoll_ctl(2))
        self._keep_taskstats(self.taskstats.fileno())
        return True
