"""End what is left of an attempt whose daemon was killed, so that two attempts of one job never run at once."""

from __future__ import annotations

import contextlib
import os

from cnprocd.launch import group
from cnprocd.launch.attempt import Launcher
from cnprocd.log import Log
from cnprocd.spool.rows import Leftover


async def end_leftover(left: Leftover, log: Log, launcher: Launcher) -> None:
    """End the processes of an attempt of this boot, if any are alive."""
    if left.attempt_id is None:
        return
    verified = left.hook_pid if left.hook_start_ticks is not None else None
    root = group.Root(verified, left.hook_start_ticks, left.attempt_id)
    job = left.job
    await launcher.end_leftover(root, lambda: log("warning", "hook_leftover", job_id=job.job_id, rule=job.rule))


def reaped(pid: int) -> bool:
    """Reap a child if it has ended. Return whether it is gone."""
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
    return True
