"""The base of all fuzz targets.

A target states its invariant in its docstring and checks it in `check`, which raises on a finding: an AssertionError,
or an exception of the product that is not allowed. `run` makes inputs by mutation and returns the number of executions.
One execution is one input that was mutated and checked on its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from fuzz.mutate import Mutator

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
CORPUS = Path(__file__).parent / "corpus"


class Target:
    """One parser of foreign data."""

    name: str
    executions: int  # what `make fuzz` runs
    most_cpu_s = 2.0  # of one call of `run`; a longer call is interrupted
    tokens: Sequence[bytes] = ()

    def __init__(self) -> None:
        self.kept = [file.read_bytes() for file in sorted((CORPUS / self.name).glob("*")) if file.is_file()]
        self.seeds = [*self.made(), *self.kept]
        self.last: bytes = b""  # the current input, kept on a finding
        self._mutator: Mutator | None = None

    def made(self) -> list[bytes]:
        """Return valid inputs that are made by code. The corpus has inputs that are worth keeping as files."""
        return []

    def check(self, data: bytes) -> None:
        """Execute one input. Raise on a finding."""
        raise NotImplementedError

    def mutated(self, rng: random.Random) -> bytes:
        """Return the next input."""
        return self.mutator(rng).damaged(self.seeds[int(rng.random() * len(self.seeds))], self.seeds)

    def mutator(self, rng: random.Random) -> Mutator:
        if self._mutator is None or self._mutator.rng is not rng:
            self._mutator = Mutator(rng, self.tokens)
        return self._mutator

    def run(self, rng: random.Random) -> int:
        """Run some executions and return their number. Most targets run one at a time."""
        self.last = self.mutated(rng)
        self.check(self.last)
        return 1

    def close(self) -> None:
        """Release the resources of the target."""


def many(target: Target, rng: random.Random, count: int) -> int:
    """Return a `run` of `count` executions, for targets that are too fast to be timed one by one."""
    mutated, check = target.mutated, target.check
    for _ in range(count):
        target.last = mutated(rng)
        check(target.last)
    return count


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    """Cut a stream at random places, as sockets do."""
    cuts = sorted(int(rng.random() * (len(data) + 1)) for _ in range(int(rng.random() * 4)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def outcome(work: Callable[[], T], *allowed: type[E]) -> tuple[T | None, E | None]:
    """Return the result of `work` or its allowed exception. Other exceptions are findings."""
    try:
        return work(), None
    except allowed as error:
        return None, error
