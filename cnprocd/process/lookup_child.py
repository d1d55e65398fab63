"""The worker process that reads /proc. Run as a script of its own, it imports nothing of cnprocd.

A read of these files can wait for as long as the process that is read wishes (see lookups.py). This process waits, not
the daemon, which kills it after the deadline: every one of these waits in the kernel is killable.

A request is a byte of FILES bits and native 32-bit PIDs. The answer has for each PID and each file of FILES, asked for
or not: a native 16-bit length and the bytes, ABSENT if it was not asked for or cannot be read.
"""

import os
import struct

FILES = ("stat", "status", "exe", "cmdline", "cgroup", "environ")
MOST_PIDS = 8  # of one request: the answer must be shorter than worker.MOST_MESSAGE_BYTES
LONGEST = 4096
ABSENT = 0xFFFF
JOB_ID = b"\0CNPROCD_JOB_ID="
_LENGTH = struct.Struct("=H")


def read(pid: int, name: str) -> bytes | None:
    """Return the content of a file of a process, or None. Of the environment, whether it has a job id."""
    path = f"/proc/{pid}/{name}"
    try:
        if name == "exe":
            return os.readlink(path.encode())
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if name != "environ":
                return os.read(fd, LONGEST)
            content = b"\0"
            while chunk := os.read(fd, 1 << 16):
                content += chunk
            return b"1" if JOB_ID in content else b"0"
        finally:
            os.close(fd)
    except OSError:  # gone, or not permitted
        return None


def answer(request: bytes) -> bytes:
    parts = []
    wanted = request[0]
    for (pid,) in struct.iter_unpack("=I", request[1:]):
        gone = False
        for bit, name in enumerate(FILES):
            content = read(pid, name) if wanted >> bit & 1 and not gone else None
            gone = gone or (content is None and bit == 0)  # without its stat file a process is gone
            parts += [_LENGTH.pack(ABSENT if content is None else len(content)), content or b""]
    return b"".join(parts)


def main() -> None:
    os.write(0, b"ready")
    while request := os.read(0, 1 << 10):
        os.write(0, answer(request))


if __name__ == "__main__":
    main()
