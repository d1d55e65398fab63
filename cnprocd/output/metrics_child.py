"""The worker process that replaces the metrics file. Run as a script of its own, it imports nothing of cnprocd.

A request is a path, with a descriptor of the text. The answer is `ok`, or why the file cannot be written. It replaces
the file by rename, because a collector must never read a partial file.
"""

import contextlib
import os
import signal
import socket

DONE = b"ok"
MOST_PATH_BYTES = 4096


def write(path: str, text: bytes) -> None:
    """Replace a file by one with this text, readable by all users. Raises OSError; leaves no temporary file."""
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{os.getppid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # public, whatever the umask of the daemon
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def answer(path: str, text_fd: int) -> bytes:
    try:
        with open(text_fd, "rb") as file:
            file.seek(0)
            write(path, file.read())
    except OSError as error:
        return os.strerror(error.errno or 0).encode()
    return DONE


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the daemon; its end is EOF here
    daemon = socket.socket(fileno=0)
    daemon.setblocking(True)
    daemon.send(b"ready")
    while True:
        path, fds, _, _ = socket.recv_fds(daemon, MOST_PATH_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        if not path:
            break
        daemon.send(answer(os.fsdecode(path), fds[0]))


if __name__ == "__main__":
    main()
