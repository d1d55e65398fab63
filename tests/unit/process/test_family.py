"""Which processes belong to hooks after a restart: what root alone can arrange decides."""

from cnprocd.process.family import HookFamily, left_by_hooks
from cnprocd.process.handed_on import FormerHooks, Started
from cnprocd.process.model import Process

SECOND = 1_000_000_000
RUNNER = "/system.slice/cnprocd-runner.service"


def process(tgid, ppid=1, start_s=100, cgroup="/user.slice/session-1.scope"):
    return Process(tgid, ppid, start_s * SECOND, cgroup=cgroup)


def former(*hooks, runners=()):
    return FormerHooks(frozenset(hooks), frozenset(runners))


def test_a_hook_is_recognized_by_its_pid_and_start_time():
    scan = [process(10), process(11, start_s=200)]
    known = former(Started(10, 100 * SECOND + 7), Started(11, 100 * SECOND))
    assert left_by_hooks(known, scan) == {10}, "PID 11 has another owner"


def test_a_hook_that_ended_is_known_until_its_pid_is_reused():
    """Its exit may be queued in the socket that the service manager kept."""
    assert left_by_hooks(former(Started(10, 100 * SECOND)), [process(11)]) == {10}


def test_children_of_hooks_are_hooks():
    scan = [process(13, ppid=12), process(10), process(12, ppid=10), process(14, ppid=11), process(11)]
    assert left_by_hooks(former(Started(10, 100 * SECOND)), scan) == {10, 12, 13}


def test_the_runners_cgroup_has_hooks_and_the_runner():
    scan = [
        process(10, cgroup=f"{RUNNER}/job-7"),
        process(11, cgroup=f"{RUNNER}/runner"),
        process(12, cgroup=RUNNER),
        process(13, cgroup=RUNNER),
        process(14, cgroup=f"/user.slice/user-7.slice/user@7.service{RUNNER}/job-1"),
        process(15, cgroup=f"/system.slice/x.service{RUNNER}"),
    ]
    known = former(runners=[Started(12, 100 * SECOND)])
    assert left_by_hooks(known, scan) == {10, 13}, "a user's own unit of that name is none"


def test_a_runner_that_was_taken_for_a_hook_is_its_root():
    family = HookFamily(1)
    family.add(10)
    family.add_root(10, lambda: True)
    assert 10 not in family and family.is_root(10)
