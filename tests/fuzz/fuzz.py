"""`make fuzz`: check every parser of foreign data with damaged inputs, and report the findings.

    python tests/fuzz/fuzz.py                          all targets with their own counts (over ten million)
    python tests/fuzz/fuzz.py rules --seconds 60       one target for a minute
    python tests/fuzz/fuzz.py --executions 1000 --seed 7
    python tests/fuzz/fuzz.py --guided --seconds 60    the same checks, inputs chosen by coverage (needs atheris)

A finding is an exception that a check does not allow, a check that used more CPU than its target allows, or memory
above the limit. Its input is kept in .fuzz/ and reported once for each place in the code; the exit status is 1. After
the fix, the input belongs in tests/fuzz/corpus/<target>/, which is checked first in every run, or in a unit test.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(TESTS)  # not this directory: fuzz.py must not hide the package fuzz
    sys.path.insert(1, str(TESTS.parent))

from fuzz.target import Target  # noqa: E402
from fuzz.targets import TARGETS  # noqa: E402

FOUND = TESTS.parent / ".fuzz"
MOST_MEMORY = 4 << 30
MOST_REPORTED = 20  # places in the code per target


class TooSlowError(Exception):
    """A check used more CPU time than its target allows."""


@dataclass(slots=True)
class Result:
    """The result of one target."""

    name: str
    executions: int = 0
    took_s: float = 0.0
    findings: dict[str, int] = field(default_factory=dict)  # place in the code -> how often
    skipped: str = ""


@contextmanager
def cpu_guard() -> Iterator[None]:
    """Raise TooSlowError when the timer signal arrives."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlowError("took more CPU time than its target allows")

    before = signal.signal(signal.SIGVTALRM, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def fuzz(target: Target, executions: int, seconds: float, seed: int, *, keep: Path | None = None) -> Result:
    """Run one target. Check its kept inputs first."""
    rng = random.Random(f"{target.name} {seed}")
    result = Result(target.name)
    began = told = time.monotonic()
    with cpu_guard():
        for data in target.kept:
            target.last = data
            result.executions += 1
            _guarded(target, lambda data=data: target.check(data), result, keep)
        while result.executions < executions and time.monotonic() - began < seconds:
            before = result.executions
            count = _guarded(target, lambda: target.run(rng), result, keep)
            result.executions = before + (count or 1)
            if keep is not None and time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"  {target.name}: {result.executions:,} of {executions:,}", flush=True)
    result.took_s = time.monotonic() - began
    return result


def _guarded(target: Target, work, result: Result, keep: Path | None) -> int | None:
    signal.setitimer(signal.ITIMER_VIRTUAL, target.most_cpu_s)
    try:
        return work()
    except Exception as error:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _found(target, error, result, keep)
        return None


def _found(target: Target, error: Exception, result: Result, keep: Path | None) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "cnprocd/" in frame.filename or "fuzz/targets" in frame.filename] or frames[
        -1:
    ]
    place = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    result.findings[place] = result.findings.get(place, 0) + 1
    if result.findings[place] > 1 or len(result.findings) > MOST_REPORTED:
        return
    where = ""
    if keep is not None:
        keep.mkdir(exist_ok=True)
        file = keep / f"{target.name}-{hashlib.sha256(target.last).hexdigest()[:12]}"
        file.write_bytes(target.last)
        where = f"\n  input: {file}"
    text = "".join(traceback.format_exception(error, limit=-4))[-1500:]
    print(f"FINDING in {target.name}: {place}\n{text}{where}", flush=True)


def table(results: Sequence[Result]) -> str:
    lines = [f"{'target':<12} {'executions':>12} {'per second':>11}  findings"]
    for one in results:
        rate = one.executions / one.took_s if one.took_s else 0.0
        said = one.skipped or ", ".join(f"{place} ({n})" for place, n in one.findings.items()) or "none"
        lines.append(f"{one.name:<12} {one.executions:>12,} {rate:>11,.0f}  {said}")
    lines.append(f"{'all':<12} {sum(one.executions for one in results):>12,}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz everything that reads what others wrote.")
    parser.add_argument("targets", nargs="*", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--executions", type=int, help="per target; default: each target's own number")
    parser.add_argument("--seconds", type=float, default=None, help="per target at most")
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time")
    parser.add_argument("--guided", action="store_true", help="let coverage choose the inputs (atheris)")
    chosen = parser.parse_args()
    unknown = set(chosen.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    names = chosen.targets or list(TARGETS)
    if chosen.guided:
        from fuzz.guided import guided

        return guided(names, int(chosen.seconds or 60), FOUND)
    seed = chosen.seed if chosen.seed is not None else random.randrange(1 << 32)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    results = []
    print(f"seed {seed}", flush=True)
    for name in names:
        target = TARGETS[name]()
        wanted = chosen.executions or (target.executions if chosen.seconds is None else 1 << 62)
        try:
            results.append(fuzz(target, wanted, chosen.seconds or float("inf"), seed, keep=FOUND))
        except KeyboardInterrupt:
            break
        finally:
            target.close()
    print(table(results))
    print(f"seed {seed}, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    return 1 if any(one.findings for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
