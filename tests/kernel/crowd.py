"""A crowd of processes that fail at once, as a program of its own: a small process forks faster than a test runner.

    python -IS crowd.py COUNT NAME

Fork COUNT processes named NAME, and let them all exit with 1 at the same moment. Print their PIDs by waitpid().
"""

import os
import sys


def main() -> None:
    begin, end = os.pipe()
    with open("/proc/self/comm", "w") as file:
        file.write(sys.argv[2])
    pids = []
    for _ in range(int(sys.argv[1])):
        pid = os.fork()
        if pid == 0:
            os.close(end)
            os.read(begin, 1)
            os._exit(1)
        pids.append(pid)
    os.close(end)
    print(*(pid for pid in pids if os.waitpid(pid, 0)[1] == 256))


main()
