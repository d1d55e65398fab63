"""Count events with pyroute2's connector socket: `python pyroute2_listener.py`, in a virtual environment that has it.

It has the receive buffer of listener.c. An overrun raises OSError out of get(); the loop continues with the next event,
and the kernel counts the lost ones.
"""

import errno
import socket

from pyroute2.netlink.connector.cn_proc import ProcEventSocket

SO_RCVBUFFORCE = 33


def main() -> None:
    counts: dict[str, int] = {}
    with ProcEventSocket() as sock:
        sock.bind()
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
        sock.control(listen=True)
        print("ready", flush=True)
        while True:
            try:
                for event in sock.get(msg_seq=-1):
                    counts[event["event"]] = counts.get(event["event"], 0) + 1
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise


main()
