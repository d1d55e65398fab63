"""crash_at.py FILE MODULE OPTION...: run the daemon, and kill it (SIGKILL) at the point that a file names.

A point is before or after a call of a function on the way of a job. The file is read at each of them.
"""

import functools
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnprocd.dispatch import Dispatcher
from cnprocd.launch.attempt import LocalLauncher
from cnprocd.runner.client import RunnerClient
from cnprocd.spool.outcomes import Outcomes
from cnprocd.spool.spool import Spool
from cnprocd.spool.store import Store

POINTS: dict[str, tuple[str, str, tuple[type, ...]]] = {
    "match decided": ("before", "enqueue", (Spool,)),
    "job in memory": ("after", "enqueue", (Store,)),
    "job committed": ("after", "enqueue", (Spool,)),
    "match logged": ("after", "_log_match", (Dispatcher,)),
    "start stored": ("after", "start", (Spool,)),
    "attempt handed over": ("after", "launch", (LocalLauncher, RunnerClient)),
    "hook runs": ("after", "launched", (Spool,)),
    "hook ended": ("before", "apply", (Outcomes,)),
    "end committed": ("after", "finish", (Spool,)),
    "end logged": ("after", "_record", (Outcomes,)),
}


def killing(file: Path, name: str, when: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def kill_if_wanted() -> None:
        if file.read_text() == name:
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(function)
    def call(*arguments: Any, **more: Any) -> Any:
        if when == "before":
            kill_if_wanted()
        result = function(*arguments, **more)
        if when == "after":
            kill_if_wanted()
        return result

    return call


def main() -> None:
    file = Path(sys.argv[1])
    sys.argv = sys.argv[2:]
    for name, (when, function, owners) in POINTS.items():
        for owner in owners:
            setattr(owner, function, killing(file, name, when, getattr(owner, function)))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
