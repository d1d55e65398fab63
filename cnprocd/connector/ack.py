"""Receive the kernel's acknowledgement of a request on a second socket of the group.

The kernel multicasts the acknowledgement to the whole group (drivers/connector/cn_proc.c cn_proc_ack). A member that
never sent LISTEN has no event mask that could drop it. So a socket that exists only for one request, with a filter that
passes acknowledgements alone, receives the answer whatever the state of the asking socket: queued events, a full
buffer, a narrow mask, a filter. The events queued in the asking socket stay in the kernel, where kill -9 loses none.

The request runs inside sendto(), so the acknowledgement is queued when that returns. Waiting is a safety margin.
"""

from __future__ import annotations

import os
import select
import time

from cnprocd.connector.decode import Rejects, decode
from cnprocd.connector.event import Ack
from cnprocd.connector.eventslots import EventSlots
from cnprocd.connector.filter import ConnectorFilter, connector_program
from cnprocd.connector.netlink import open_member

_SLOTS = 8


class AckWatch:
    """The second socket. Open it (`with`) before the request is sent. Raises OSError if there can be none."""

    def __init__(self) -> None:
        self.socket = open_member(program=connector_program(ConnectorFilter(0)))
        self._slots = EventSlots(_SLOTS)

    def __enter__(self) -> AckWatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    @staticmethod
    def ticket() -> int:
        """Return a number for a request, by which its acknowledgement differs from those of other programs."""
        return int.from_bytes(os.urandom(3), "little")

    def wait(self, ticket: int, timeout_s: float) -> Ack | None:
        """Return the acknowledgement of the request with this ticket, or None if none comes in time."""
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        rejects = Rejects()
        while True:
            while (slots := self._slots.receive(self.socket.fileno(), rejects)) is not None:
                for event in decode(slots, rejects):
                    if isinstance(event, Ack) and event.ack == ticket + 1:
                        return event
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                return None
