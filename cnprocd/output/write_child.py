"""The worker process that writes log records to a file. Run as a script of its own, it imports nothing of cnprocd.

It writes each piece whole: on a full disk it waits and goes on where it was, so no line is cut. It ends when the daemon
has ended and everything that it was given is written.
"""

import errno
import os
import signal
import time

AGAIN_S = 0.5


def write(data: bytes) -> None:
    """Write all of `data` to standard output, however long that takes."""
    while data:
        try:
            data = data[os.write(1, data) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN):
                return
            time.sleep(AGAIN_S)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the daemon; its end is EOF here
    os.write(0, b"ready")
    while data := os.read(0, 1 << 18):
        write(data)
        os.write(0, b"done")


if __name__ == "__main__":
    main()
