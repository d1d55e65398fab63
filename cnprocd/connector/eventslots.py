"""The receive slots of a connector socket: one memcmp checks the sender and the length of a whole batch.

After a clean batch the kernel has written the same headers again (address length 12, no flags, length 76, sender 0,
group 1). Comparing them with the expected bytes checks every datagram's sender, length and truncation at once. Only a
batch that differs is checked slot by slot. (Measured on 6.18, read in net/netlink/af_netlink.c.)
"""

from __future__ import annotations

import socket

from cnprocd.connector import uapi
from cnprocd.connector.decode import SLOT_SIZE, Rejects
from cnprocd.connector.inflight import EVENT_SLOTS
from cnprocd.connector.recvmmsg import HEADER_SIZE, SOCKADDR_NL, Slots


class EventSlots:
    """Slots to receive into, and the bytes of their headers after a clean batch."""

    def __init__(self, slots: int = EVENT_SLOTS, data: memoryview | None = None) -> None:
        self._slots = Slots(slots, SLOT_SIZE, data)
        self._slots.set_lengths(uapi.DATAGRAM_SIZE)
        self._clean_headers = bytes(self._slots.headers)
        self._clean_names = SOCKADDR_NL.pack(socket.AF_NETLINK, 0, 0, 1 << (uapi.CN_IDX_PROC - 1)) * slots
        self.first = 0  # where the next batch goes: behind slots that are still needed
        self.most = slots  # of one batch
        self.filled = False  # the last batch took every slot, or as many as it might: there may be more

    def receive(self, fd: int, rejects: Rejects) -> memoryview | None:
        """Call recvmmsg() once. Return the slots with kernel datagrams of the right length; None: the queue is empty.

        Raises OSError; ENOBUFS means that the socket was overrun and that more can be read.
        """
        slots, first = self._slots, self.first
        self.filled = False
        count = slots.receive(fd, first, self.most)
        self.filled = count == min(self.most, slots.count - first)
        if count == 0:
            return None
        headers = slice(first * HEADER_SIZE, (first + count) * HEADER_SIZE)
        names = slice(first * SOCKADDR_NL.size, (first + count) * SOCKADDR_NL.size)
        if (
            bytes(slots.headers[headers]) == self._clean_headers[headers]
            and slots.names[names] == self._clean_names[names]
        ):
            return slots.view[first * SLOT_SIZE : (first + count) * SLOT_SIZE]
        return self._pick_clean(first, count, rejects)

    def _pick_clean(self, first: int, count: int, rejects: Rejects) -> memoryview:
        """Move the valid slots of a mixed batch together, count the others, and restore the headers."""
        slots, good = self._slots, first
        for i in range(first, first + count):
            if slots.sender(i) != 0:
                rejects.foreign_sender += 1
            elif slots.truncated(i):
                rejects.truncated += 1
            elif slots.length(i) != uapi.DATAGRAM_SIZE:
                rejects.wrong_length += 1
            else:
                if good != i:
                    slots.view[good * SLOT_SIZE : (good + 1) * SLOT_SIZE] = slots.slot(i)
                good += 1
        # Blanked, so that the next daemon does not take a rejected datagram for one that was in flight (inflight.py).
        slots.view[good * SLOT_SIZE : (first + count) * SLOT_SIZE] = bytes((first + count - good) * SLOT_SIZE)
        slots.headers[:] = self._clean_headers
        return slots.view[first * SLOT_SIZE : good * SLOT_SIZE]
