"""A storm of short processes, as a program of its own: a small process forks ten times faster than a test runner.

    python -IS storm.py COUNT FAILING_EVERY NAME...

forks COUNT processes one after the other, reaping each at once. Process i is called NAME[i % len(NAME)]; of each name
every FAILING_EVERY-th exits with 1, the first one included, the others with 0. Prints, per name, the PIDs that
waitpid() told to have failed.
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
