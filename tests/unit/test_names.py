"""Names, with resolvers that wait on a pipe until the test writes to it."""

from __future__ import annotations

import asyncio
import os
import pwd

import pytest

from cnprocd import names as names_module
from cnprocd.launch.program import HookRefusedError
from cnprocd.names import Names, NameServiceSilentError

LONG_S = 30.0


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Records(list):
    def __call__(self, level, event, **fields):
        self.append(event)


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def names(loop, records):
    names = Names(loop, records)
    yield names
    names.close()


@pytest.fixture
def silent():
    """A resolver that does not answer before `answer()`."""
    reader, writer = os.pipe()

    class Resolver:
        def __call__(self):
            os.read(reader, 1)
            return "late"

        def answer(self):
            os.write(writer, b"x")

    yield Resolver()
    os.write(writer, b"x" * 100)


def until(loop, condition):
    async def wait():
        while not condition():
            await asyncio.sleep(0.001)

    loop.run_until_complete(asyncio.wait_for(wait(), LONG_S))


def answer_of(names, key, resolve):
    try:
        return names.resolve(key, resolve)
    except NameServiceSilentError:
        return None


def test_a_user_has_its_name_and_one_without_its_number(names):
    assert names.user_name(0) == pwd.getpwuid(0).pw_name
    assert names.user_name(54321) == "54321"
    assert names.user_name(0) == pwd.getpwuid(0).pw_name
    assert names.counters.done == 2  # the third was remembered


def test_a_silent_service_is_reported_and_waited_for_once(names, silent, records):
    for _ in range(5):
        assert answer_of(names, "a", silent) is None
    assert names.counters.late == 1
    assert records == ["names_unavailable"]


def test_a_late_answer_is_learned(loop, names, silent):
    assert answer_of(names, "a", silent) is None
    silent.answer()
    until(loop, lambda: answer_of(names, "a", silent) == "late")


def test_other_names_are_resolved_meanwhile(names, silent):
    assert answer_of(names, "a", silent) is None
    assert names.resolve("b", lambda: "B") == "B"


def test_waiting_has_a_bound_however_many_names_are_asked(names, silent):
    """After the patience is used up, questions are asked without waiting, and refused when all threads are stuck."""
    for number in range(50):
        assert answer_of(names, number, silent) is None
    assert names.counters.late <= 5


def test_an_error_of_the_resolver_is_raised_and_not_remembered(names):
    answers = [HookRefusedError("unknown user"), "known"]

    def resolve():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(HookRefusedError):
        names.resolve("a", resolve)
    assert names.resolve("a", resolve) == "known"
    with pytest.raises(HookRefusedError):
        names.hook_user("cnptest-nobody", None)
    assert names.hook_user("root", None).uid == 0


def test_an_expired_answer_serves_if_the_new_one_is_late(names, silent):
    assert names.resolve("a", lambda: "old") == "old"
    names.expire()
    assert names.resolve("a", lambda: "new") == "new"
    names.expire()
    assert names.resolve("a", silent) == "new"


def test_what_is_remembered_is_bounded(names, monkeypatch):
    monkeypatch.setattr(names_module, "MOST_KNOWN", 10)
    for number in range(100):
        assert names.resolve(number, lambda: "x") == "x"
    assert len(names._known) == 10
