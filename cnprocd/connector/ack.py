"""The kernel's acknowledgement of a request, heard by a second member of the group.

The answer to a request is multicast to the whole group (drivers/connector/cn_proc.c cn_proc_ack), and a member that
never sent LISTEN has no event mask that could hold it back. So a socket that exists for the moment of asking, with a
filter that lets acknowledgements alone through, hears the answer whatever the asking socket has: events queued before
it, a full buffer, a narrow mask, a filter. What is queued in the asking socket stays where kill -9 cannot reach it.

The request runs inside sendto(), so the answer is queued when that returns; waiting is for the doubtful only.
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
    """Use it with `with`: from before a request is sent until its answer came. Raises OSError if it cannot be had."""

    def __init__(self) -> None:
        self.socket = open_member(program=connector_program(ConnectorFilter(0)))
        self._slots = EventSlots(_SLOTS)

    def __enter__(self) -> AckWatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    @staticmethod
    def ticket() -> int:
        """A number for a request, by which its answer is known among those of other programs."""
        return int.from_bytes(os.urandom(3), "little")

    def wait(self, ticket: int, timeout_s: float) -> Ack | None:
        """The answer to the request with this ticket, or None if none comes in time."""
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
