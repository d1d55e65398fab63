"""What the kernel is asked for: the plan of the rules, without exit records if it has none, and hooks' forks."""

import subprocess

import pytest

from cnprocd.connector import uapi
from cnprocd.connector.request import Features
from cnprocd.process.family import HookFamily
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleFileModel
from cnprocd.subscription import HookFollower, Subscription

OWN = 50


class Kernel:
    """Takes requests as Source.ask does; without exit records it refuses those that want them."""

    def __init__(self, has_records=True) -> None:
        self.has_records = has_records
        self.requests = []

    def ask(self, request) -> bool:
        self.requests.append(request)
        return self.has_records or request.taskstats is None

    @property
    def asks_for_forks(self) -> bool:
        return bool(self.requests[-1].connector.events & uapi.PROC_EVENT_FORK)


def matcher(comm="java"):
    rule = {"name": "failed", "events": ["nonzero_exit"], "match": {"comm": comm}}
    return Matcher(plain(RuleFileModel.model_validate({"rules": [rule]}).rules))


class Follow:
    """A follower on a clock that the test moves."""

    def __init__(self) -> None:
        self.kernel, self.family, self.now_s, self.armed = Kernel(), HookFamily(OWN), 100.0, 0
        self.subscription = Subscription(self.kernel, Features(), matcher())
        self.follower = HookFollower(self.subscription, self.family, self._arm, lambda: self.now_s)

    def _arm(self) -> None:
        self.armed += 1

    def after(self, seconds: float, hooks_running: bool) -> bool:
        self.now_s += seconds
        self.follower.stop_if_over(hooks_running)
        return self.follower.following


def test_a_kernel_without_exit_records_is_asked_again_without():
    kernel = Kernel(has_records=False)
    subscription = Subscription(kernel, Features(), matcher())
    assert [request.taskstats is None for request in kernel.requests] == [False, True]
    assert not subscription.features.taskstats
    assert subscription.plan.tracking.table, "threads are counted instead"


def test_other_rules_are_asked_for_while_hooks_are_followed():
    it = Follow()
    it.follower.follow()
    assert it.subscription.use(matcher("python")) is it.subscription.plan
    assert it.kernel.asks_for_forks


def test_forks_are_asked_for_before_a_hook_starts():
    it = Follow()
    assert not it.kernel.asks_for_forks
    it.follower.follow()
    assert it.kernel.asks_for_forks
    assert it.armed == 1
    it.follower.follow()
    assert it.armed == 1
    assert len(it.kernel.requests) == 2


@pytest.mark.parametrize("lives", ["hook runs", "descendant"])
def test_forks_are_asked_for_while_a_hook_lives(lives):
    it = Follow()
    it.follower.follow()
    if lives == "descendant":
        it.follower.register_hook(200)
    assert it.after(60, hooks_running=lives == "hook runs")
    assert it.kernel.asks_for_forks


def test_following_ends_a_second_after_the_last_start():
    it = Follow()
    it.follower.follow()
    assert it.after(0.9, hooks_running=False)
    it.follower.follow()
    assert it.after(0.9, hooks_running=False)
    assert not it.after(0.2, hooks_running=False)
    assert not it.kernel.asks_for_forks


def test_children_of_the_runner_are_hooks_while_it_runs():
    """It ends when idle, and its PID goes to another program: the children of that one are no hooks."""
    it = Follow()
    runner = subprocess.Popen(["sleep", "600"])
    it.follower.register_runner(runner.pid)
    assert it.family.roots.keys() == {OWN, runner.pid}
    assert it.family.is_root(runner.pid)
    runner.kill()
    runner.wait()
    assert not it.family.is_root(runner.pid)
    for _ in range(2):
        it.family.sweep(lambda tgid: True)
    assert it.family.roots.keys() == {OWN}
