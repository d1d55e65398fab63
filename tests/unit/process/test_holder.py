"""The number of held pidfds before a check for exited processes. tests/kernel/test_loss.py tests the exit status."""

import os

from cnprocd.process.holder import Holder
from cnprocd.process.model import Process


def test_it_is_crowded_when_there_are_twice_as_many_as_were_left():
    children = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(130)]
    holder = Holder(limit=1000)
    try:
        crowded = []
        for pid in children:
            holder.hold(Process(pid))
            crowded.append(holder.crowded)
        assert crowded.index(True) == 63
        for pid in children[40:]:
            holder.release(pid)
        holder.thinned()
        assert not holder.crowded
    finally:
        holder.close()
        for pid in children:
            os.waitpid(pid, 0)
