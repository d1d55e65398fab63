"""Wait statuses against the C library's macros (os.W*) over all 65,536 of them; status sets against Python sets.

Statuses whose low seven bits are all set mean "stopped" or "continued" (wait(2)) and are never an exit.
"""

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.connector.filter import describe as describe_set
from cnprocd.connector.status import (
    ALL_SIGNALS,
    CORE_SIGNALS,
    EVERY_STATUS,
    FAILURES,
    NO_STATUS,
    StatusSet,
    core_dumped,
    describe,
    exit_code,
    signal_name,
    term_signal,
)

EXITS = [status for status in range(65536) if status & 0x7F != 0x7F]
REAL = [code << 8 for code in range(256)] + [s | core for s in range(1, 65) for core in (0, 0x80)]


def test_every_status_means_what_wait_says():
    for status in EXITS:
        if os.WIFEXITED(status):
            assert (exit_code(status), term_signal(status)) == (os.WEXITSTATUS(status), None)
            assert not core_dumped(status)
        else:
            assert os.WIFSIGNALED(status)
            assert (exit_code(status), term_signal(status)) == (None, os.WTERMSIG(status))
            assert core_dumped(status) == os.WCOREDUMP(status)


def test_every_status_in_words():
    assert describe(None) == "unknown exit status"
    for status in REAL:
        if os.WIFEXITED(status):
            words = f"exit code {os.WEXITSTATUS(status)}"
        else:
            words = signal_name(os.WTERMSIG(status)) + (" (core dumped)" if os.WCOREDUMP(status) else "")
        assert describe(status) == words


@pytest.mark.parametrize("number", range(1, 65))
def test_signals_are_named_as_this_machine_names_them(number):
    if number < 32:
        assert signal_name(number) == signal.Signals(number).name
    elif number < signal.SIGRTMIN:
        assert signal_name(number) == f"SIG{number}"
    elif number == signal.SIGRTMIN:
        assert signal_name(number) == "SIGRTMIN"
    else:
        assert signal_name(number) == f"SIGRTMIN+{number - signal.SIGRTMIN}"


def test_a_number_that_is_no_signal_has_a_name_too():
    assert [signal_name(n) for n in (0, 65, 127)] == ["SIG0", "SIG65", "SIG127"]


def test_core_signals_are_those_of_signal_7():
    named = "SIGABRT SIGBUS SIGFPE SIGILL SIGQUIT SIGSEGV SIGSYS SIGTRAP SIGXCPU SIGXFSZ"
    assert {getattr(signal, name) for name in named.split()} == CORE_SIGNALS


# --- sets

codes = st.integers(0, 9) | st.integers(0, 255)  # a narrow choice too, so that ranges touch
spans = st.tuples(codes, codes).map(sorted).map(tuple)
signal_sets = st.frozensets(st.integers(1, 64), max_size=6)
parts = st.tuples(st.lists(spans, max_size=6), signal_sets)


def plain(ranges, signals):
    """Return the same set, element by element: ("code", n) and ("signal", n)."""
    return {("code", n) for low, high in ranges for n in range(low, high + 1)} | {("signal", n) for n in signals}


def spelled(statuses):
    return plain(statuses.codes, statuses.signals)


def way(status):
    return ("code", os.WEXITSTATUS(status)) if os.WIFEXITED(status) else ("signal", os.WTERMSIG(status))


@given(parts)
def test_a_set_holds_what_went_into_it_in_normal_form(part):
    built = StatusSet.of(*part)
    assert spelled(built) == plain(*part)
    assert all(low <= high for low, high in built.codes)
    assert all(high + 1 < low for (_, high), (low, _) in zip(built.codes, built.codes[1:], strict=False))
    assert [status for status in REAL if status in built] == [s for s in REAL if way(s) in plain(*part)]


@given(parts, parts)
def test_union_and_intersection_are_those_of_sets(one, other):
    a, b = StatusSet.of(*one), StatusSet.of(*other)
    assert spelled(a | b) == spelled(a) | spelled(b)
    assert spelled(a & b) == spelled(a) & spelled(b)
    assert a | b == b | a
    assert a & b == b & a
    assert a | a == a == a & a


def test_the_named_sets():
    assert all(status in EVERY_STATUS for status in REAL)
    assert [status for status in REAL if status not in FAILURES] == [0]
    assert not any(status in NO_STATUS for status in REAL)
    assert frozenset(range(1, 65)) == ALL_SIGNALS
    assert EVERY_STATUS & FAILURES == FAILURES == NO_STATUS | FAILURES


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        (EVERY_STATUS, "any status"), (FAILURES, "any failure"), (NO_STATUS, "no exit"),
        (StatusSet.of([(3, 3), (7, 9)], ()), "exit code 3 7-9"),
        (StatusSet.of([], [9, 11]), "SIGKILL, SIGSEGV"),
        (StatusSet.of([(1, 1)], range(1, 65)), "exit code 1, any signal"),
    ],
)  # fmt: skip
def test_a_set_in_words(statuses, words):
    assert describe_set(statuses) == words
