"""pyroute2's own connector socket, counting: `python pyroute2_listener.py`, in a virtual environment that has it.

It is given the receive buffer that cnprocd has, and is kept alive over an overrun, which it raises as an OSError out of
get(): what it then goes on with is the next event, the lost ones are counted by the kernel.
"""

import errno
import socket

from pyroute2.netlink.connector.cn_proc import ProcEventSocket

SO_RCVBUFFORCE = 33


def main() -> None:
    counts = {}
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
