"""A storm of short processes, as a program of its own: a small process forks ten times faster than a test runner.

    python -IS storm.py COUNT FAILING_EVERY NAME...

Fork COUNT processes one after the other and reap each at once. Process i has the name NAME[i % len(NAME)]. Of each
name, every FAILING_EVERY-th exits with 1, starting with the first, the others with 0. Print, for each name, the PIDs of
the failures by waitpid().
"""

import os
import sys


def main() -> None:
    count, failing_every, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    encoded = [name.encode() for name in names]
    failed: dict[str, list[int]] = {name: [] for name in names}
    for i in range(count):
        which, round_ = i % len(names), i // len(names)
        pid = os.fork()
        if pid == 0:
            fd = os.open("/proc/self/comm", os.O_WRONLY)
            os.write(fd, encoded[which])
            os._exit(0 if round_ % failing_every else 1)
        if os.waitpid(pid, 0)[1]:
            failed[names[which]].append(pid)
    for name, pids in failed.items():
        print(name, *pids)


main()
