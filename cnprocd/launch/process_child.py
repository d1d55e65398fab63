"""The worker process that reads /proc to find the processes of hooks. A script that imports nothing of cnprocd.

A process can make a read of its `stat` and `environ` wait for as long as it wishes (process/lookups.py). This process
waits, not the one that starts hooks.

A request is a mark, the start time from which on processes can carry it, and PIDs. The answer has a row for each PID.
"""

import os
import struct

REQUEST = struct.Struct("=QH")  # start time in clock ticks since boot, and the length of the mark that follows
ROW = struct.Struct("=ciiiQ?")  # state, parent, process group, session, start time, whether it carries the mark
GONE = ROW.pack(b"\0", 0, 0, 0, 0, False)
MOST_PIDS = 64
DEAD = b"ZXx"


def environment(pid: int) -> list[bytes]:
    """Return the environment of a process; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def row_of(pid: int, mark: bytes, oldest: int) -> bytes:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            raw = file.read()
        fields = raw[raw.rindex(b")") + 2 :].split()  # comm may hold anything, including brackets and blanks
        state, ticks = fields[0], int(fields[19])
        marked = bool(mark) and ticks >= oldest and state not in DEAD and mark in environment(pid)
        return ROW.pack(state, int(fields[1]), int(fields[2]), int(fields[3]), ticks, marked)
    except (OSError, ValueError, IndexError):
        return GONE


def answer(request: bytes) -> bytes:
    oldest, length = REQUEST.unpack_from(request)
    mark, pids = request[REQUEST.size : REQUEST.size + length], request[REQUEST.size + length :]
    return b"".join(row_of(pid, mark, oldest) for (pid,) in struct.iter_unpack("=I", pids))


def main() -> None:
    os.write(0, b"ready")
    while request := os.read(0, 1 << 17):
        os.write(0, answer(request))


if __name__ == "__main__":
    main()
