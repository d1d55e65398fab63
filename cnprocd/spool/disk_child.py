"""The process that holds the spool's file: a script, started by disk_worker.py with the directory of the package.

It answers one request after the other on its standard input, a socket, and ends at EOF. It ignores SIGTERM and SIGINT:
the service manager and a terminal send them to all processes of the daemon, which still has requests then.

Its second thread makes the commits survive a power cut: one fsync of the WAL within SYNC_S of a commit. So no commit
waits for an fsync, except while a long WAL is moved into the file.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

SYNC_S = 0.5


class Syncer:
    """Syncs the WAL in a thread, some time after `note`. An error of fsync(2) is that of the next request."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self._path = ""
        self._wanted = threading.Event()
        threading.Thread(target=self._work, name="sync", daemon=True).start()

    def note(self, path: str) -> None:
        """Sync the WAL of this database soon."""
        self._path = path
        self._wanted.set()

    def _work(self) -> None:
        while self._wanted.wait():
            time.sleep(SYNC_S)
            self._wanted.clear()
            try:
                fd = os.open(f"{self._path}-wal", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                self.error = error


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.path.insert(0, sys.argv[1])
    from cnprocd.spool.disk_messages import Close, Failed, Open, Write
    from cnprocd.spool.disk_wire import receive_message, send_message
    from cnprocd.spool.spool_file import SpoolFile

    daemon, file, syncer = socket.socket(fileno=0), SpoolFile(), Syncer()
    daemon.setblocking(True)
    send_message(daemon, None)
    while True:
        try:
            found, request = receive_message(daemon)
        except ConnectionResetError:  # the daemon closed the socket without reading the last answer
            continue
        if not found:
            break
        if syncer.error is not None:
            file.handle(Close())
            answer: object = Failed(f"cannot sync the spool: {syncer.error.strerror}")
            syncer.error = None
        else:
            answer = file.handle(request)  # type: ignore[arg-type]
        try:
            send_message(daemon, answer)
        except OSError:  # the daemon is gone; what it sent before is still done
            continue
        if isinstance(request, Open | Write):
            syncer.note(str(file.path))
            file.upkeep()
    os._exit(0)  # without closing the file: the kernel releases the lock at once, and the WAL is kept


if __name__ == "__main__":
    main()
