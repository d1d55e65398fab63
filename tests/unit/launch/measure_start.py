"""Print the cost of starting a hook in each possible way, interleaved in one run. Not a test; run it by hand.

PYTHONPATH=tests .venv/bin/python tests/unit/launch/measure_start.py [rounds]    (on a busy machine: chrt -r 50)

    fork    os.fork in the daemon, which has 35 MB and a hundred thousand objects
    asked   a spare is made on request
    spare   a spare is ready
"""

from __future__ import annotations

import os
import sys
import time

import pydantic  # noqa: F401 (a daemon's memory)
import yaml  # noqa: F401
from unit.hookkit import hook, launch_request

from cnprocd.launch.spawn import Starter


def median(values: list[float]) -> str:
    ordered = sorted(values)
    return f"p10 {ordered[len(ordered) // 10]:.2f}  p50 {ordered[len(ordered) // 2]:.2f} ms"


def main(rounds: int) -> None:
    ballast = [str(number) * 3 for number in range(100_000)]
    starters = {name: Starter(lambda *_, **__: None) for name in ("fork", "asked", "spare")}
    starters["fork"]._forks = True
    running: dict[str, list[float]] = {name: [] for name in starters}
    held: dict[str, list[float]] = {name: [] for name in starters}
    starters["spare"].prepare()
    for _ in range(rounds):
        for name, starter in starters.items():
            time.sleep(0.01)
            begin = time.perf_counter()
            child = starter.spawn(launch_request(hook("/bin/true", user="nobody")), lambda pid: None)
            held[name].append((time.perf_counter() - begin) * 1e3)
            os.set_blocking(child.report_fd, True)
            assert os.read(child.report_fd, 100) == b""
            running[name].append((time.perf_counter() - begin) * 1e3)
            os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
            if name == "spare":
                starter.prepare()
            child.close()
    for name, starter in starters.items():
        starter.close()
        print(f"{name:6} runs after {median(running[name])}   daemon held {median(held[name])}")
    del ballast


main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
