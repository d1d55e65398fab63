"""The verdict of the random runs finds each kind of broken guarantee, and excepts what the documents except."""

from __future__ import annotations

import pytest
from kernel.jobs import verdict


def problems(journal: str, states: dict[str, int] | None = None) -> list[str]:
    lines = [line.strip() for line in journal.strip().split("/")]
    return verdict.of(lines, states or {"done": 1}).problems


FINE = "> started daemon 7 / F 1 keyed cnpj-k0 / S a 1 keyed 1 7 / E a / F 2 keyed cnpj-k0 / S b 2 keyed 2 7 / E b"


def test_a_run_without_problems_has_none():
    assert problems(FINE) == []


@pytest.mark.parametrize(
    ("journal", "problem"),
    [
        (FINE.replace("/ S b 2 keyed 2 7 / E b", ""), "promised and not run: serial 2"),
        (FINE.replace("/ E b", ""), "promised and not run: serial 2"),
        (f"{FINE} / > finished 1 / > killed daemon 7 / > started daemon 8 / S c 1 keyed 1 8", "finished and run again"),
        (f"{FINE} / S c 1 keyed 1 7 / E c", "run again without an interruption: serial 1"),
        ("F 1 whole cnpj-w0 / F 2 whole cnpj-w1 / S a 1 whole 1 7 / S b 2 whole 2 7 / E b / E a", "overlap of whole"),
        ("F 1 keyed cnpj-k0 / F 2 keyed cnpj-k0 / S b 2 keyed 2 7 / E b / S a 1 keyed 1 7 / E a", "order of keyed/"),
        ("> drops 0 / F 1 slow cnpj-slow / F 2 slow cnpj-slow / > drops 1", "2 events are missing"),
    ],
)  # fmt: skip
def test_a_broken_guarantee_is_found(journal, problem):
    found = problems(journal)
    assert any(one.startswith(problem) for one in found), found


def test_jobs_that_are_not_done_at_the_end_are_found():
    assert problems(FINE, states={"done": 1, "dead exit code 1": 1}) == ["jobs at the end: {'dead exit code 1': 1}"]
    assert problems(FINE, states={"done": 1, "dead dropped (queue_limit)": 1}) == []


@pytest.mark.parametrize(
    "journal",
    [
        f"{FINE} / > killed daemon 7 / > started daemon 8 / S c 1 keyed 1 8 / E c",
        f"{FINE.replace(' 7', ' 1')} / S c 1 keyed 1 8 / E c".replace("daemon 1", "daemon 7"),
        "> step x / > volatile / F 1 slow cnpj-slow / > killed daemon 7 / > started daemon 8 / > durable",
        "> drops 0 / F 1 slow cnpj-slow / > drops 7",
        "> started daemon 7 / F 1 slow cnpj-slow / > volatile / > killed daemon 7 / S a 1 slow 1 6 / E a"
        " / S b 1 slow 1 6 / E b / > started daemon 8 / > durable",
        "> started daemon 7 / F 1 again cnpj-again / S a 1 again 1 7 / X a / S b 1 again 1 7 / E b",
    ],
)
def test_what_the_documents_except_is_no_problem(journal):
    assert problems(journal) == []


def test_a_killed_daemon_interrupts_no_runners_hook():
    """The hook's parent is the runner, 7."""
    journal = f"{FINE} / > started daemon 5 / > killed daemon 5 / > started daemon 8 / S c 1 keyed 1 7 / E c"
    assert problems(journal) == ["run again without an interruption: serial 1 of keyed at line 11"]
