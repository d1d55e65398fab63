"""The process that discards the output of programs that hooks left behind. A script: it imports nothing of cnprocd.

Its arguments are descriptors of pipes. It ends when the last of them is closed, and so may outlive the daemon.
"""

import os
import select
import sys

CHUNK = 1 << 20


def main() -> None:
    fds = list(map(int, sys.argv[1:]))
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    with open("/proc/self/comm", "w") as comm:
        comm.write("cnprocd-drain")  # for `ps`, after the daemon has ended
    kept = sorted({0, 1, 2, *fds, null})
    for below, above in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(below + 1, above)
    poll = select.poll()
    left = set(fds)
    for fd in left:
        poll.register(fd, select.POLLIN)
    while left:
        for fd, _ in poll.poll():
            if os.splice(fd, null, CHUNK) == 0:
                poll.unregister(fd)
                left.discard(fd)


if __name__ == "__main__":
    main()
