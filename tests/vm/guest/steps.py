"""Run one step in the guest: `python3 steps.py NAME` prints one line of detail, or the failure, and exits with 1 then.

Steps run in the order of LIFE or UPGRADE. Each uses the state that the steps before have left, as for an administrator.
`--list` prints the names of LIFE.
"""

from __future__ import annotations

import sys

import crashes
import hooks
import identity
import life
import matching
import moved
import upgrade
from probe import run_step

LIFE = (
    life.boot,
    life.kernel_suite,
    life.install,
    life.enable,
    life.sandbox,
    matching.failing_process,
    matching.good_reload,
    matching.bad_reload,
    identity.units_and_oom_kills,
    identity.user_manager,
    moved.moved_units,
    matching.varlink,
    matching.clock_steps,
    hooks.hook_as_user,
    crashes.kill_daemon,
    crashes.kill_and_forget,
    crashes.kill_runner,
    crashes.restart_under_load,
    crashes.upgrade_under_load,
    crashes.watchdog,
    moved.replaced_program,
    life.stop_start,
    hooks.queue_jobs,
    life.reboot,
    hooks.jobs_after_reboot,
    life.remove,
    life.purge,
)
UPGRADE = (  # `make test-upgrade`
    upgrade.install_0_1_0,
    upgrade.upgrade_from_0_1_0,
    upgrade.downgrade_to_0_1_0,
    upgrade.purge_0_1_0,
)
STEPS = {step.__name__: step for step in (*LIFE, *UPGRADE)}

if __name__ == "__main__":
    if sys.argv[1] == "--list":
        print("\n".join(step.__name__ for step in LIFE))
    else:
        sys.exit(run_step(STEPS, sys.argv[1]))
