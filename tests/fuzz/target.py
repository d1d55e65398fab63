"""What a fuzz target is.

A target says its invariant in its docstring and checks it in `check`, which raises on a finding (an AssertionError, or
whatever the product raised and should not have). `run` makes inputs by mutation and returns how many it executed; one
execution is one input that was mutated by itself and checked by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from fuzz.mutate import Mutator

CORPUS = Path(__file__).parent / "corpus"


class Target:
    """One thing that reads what others wrote."""

    name: str
    executions: int  # what `make fuzz` runs
    most_cpu_s = 2.0  # one call of `run`; the runner interrupts what takes longer
    tokens: Sequence[bytes] = ()

    def __init__(self) -> None:
        self.kept = [file.read_bytes() for file in sorted((CORPUS / self.name).glob("*")) if file.is_file()]
        self.seeds = [*self.made(), *self.kept]
        self.last: bytes = b""  # the input being checked: what a finding keeps
        self._mutator: Mutator | None = None

    def made(self) -> list[bytes]:
        """Valid inputs, made by code; the corpus has those worth keeping as files."""
        return []

    def check(self, data: bytes) -> None:
        """One execution. Raises on a finding."""
        raise NotImplementedError

    def mutated(self, rng: random.Random) -> bytes:
        """The next input."""
        return self.mutator(rng).damaged(self.seeds[int(rng.random() * len(self.seeds))], self.seeds)

    def mutator(self, rng: random.Random) -> Mutator:
        if self._mutator is None or self._mutator.rng is not rng:
            self._mutator = Mutator(rng, self.tokens)
        return self._mutator

    def run(self, rng: random.Random) -> int:
        """Some executions; how many. Most targets do one at a time."""
        self.last = self.mutated(rng)
        self.check(self.last)
        return 1

    def close(self) -> None:
        """Give back what the target took."""


def many(target: Target, rng: random.Random, count: int) -> int:
    """A `run` of `count` executions, for targets too quick to be timed and guarded one by one."""
    mutated, check = target.mutated, target.check
    for _ in range(count):
        target.last = mutated(rng)
        check(target.last)
    return count


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    """A stream cut anywhere, as sockets do."""
    cuts = sorted(int(rng.random() * (len(data) + 1)) for _ in range(int(rng.random() * 4)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def outcome(work: Callable[[], object], *allowed: type[Exception]) -> tuple[object, Exception | None]:
    """What `work` gave, or the exception it may raise. Others go up: they are findings."""
    try:
        return work(), None
    except allowed as error:
        return None, error
