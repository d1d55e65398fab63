"""Compare the journal of a run with the guarantees (docs/guarantees.md). PURE.

Promised: a process failed while its rule was in force, and the kernel did not drop its event. Its hook must have run to
its end with 0. Excepted are matches that the documents except: what was in memory only when the daemon was killed, and
what a rule that floods drops.

Finished: the spool's file has the job as ended, as it was read after the daemon and its process for the spool had
ended. No hook may start for it afterwards. Besides, a hook that ended with 0 may start again only if its parent process
(the daemon, or the runner where it is apart) has ended since, or if a daemon was killed whose jobs were in memory only.

Order: two attempts with one serialisation key never overlap, and the hooks of a key start in the order in which the
processes died. Excepted are processes around an overrun, and jobs of a file that the daemon could not read.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kernel.jobs.schedule import FLOOD, MARK

NOT_CHECKED = (MARK,)


@dataclass(slots=True)
class Verdict:
    """What was wrong, and the figures of a run."""

    problems: list[str]
    figures: dict[str, int]


@dataclass(slots=True)
class _Process:
    """A process that failed. `at` and all other positions are lines of the journal."""

    serial: int
    rule: str
    comm: str
    at: int
    key: str | None
    starts: list[int] = field(default_factory=list)
    attempts: list[str] = field(default_factory=list)
    done_at: int | None = None
    finished_at: int | None = None  # seen in the file


@dataclass(slots=True)
class _Run:
    """The journal, parsed."""

    processes: dict[int, _Process] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)  # attempt -> line of its end with 0
    on_purpose: dict[str, int] = field(default_factory=dict)  # likewise, with 1
    starts: list[tuple[int, str, int, str, list[int]]] = field(
        default_factory=list
    )  # line, attempt, job, rule, serials
    parents: dict[str, int] = field(default_factory=dict)  # attempt -> the process that started its hook
    began_at: dict[int, int] = field(default_factory=dict)  # daemon or runner -> line of its start
    ended_at: dict[int, int] = field(default_factory=dict)  # likewise, of its end
    volatile: list[tuple[int, int]] = field(default_factory=list)  # from a step to the line `durable`
    lost: list[tuple[int, int]] = field(default_factory=list)  # likewise, ended by a kill: what was not on the disk
    drops: list[tuple[int, int, int]] = field(default_factory=list)  # between two lines, the number
    steps: Counter[str] = field(default_factory=Counter)


def key_of(rule: str, comm: str) -> str | None:
    """Return the serialisation key of a match by the rules of schedule.rules()."""
    return {"keyed": f"{rule}/{comm}", "whole": rule}.get(rule)


def of(lines: Sequence[str], states: Mapping[str, int]) -> Verdict:
    """Return the verdict on a journal. `states`: the jobs in the file at the end, by state and reason."""
    run = _parsed(lines)
    problems = [*_promises(run), *_repetitions(run), *_overlaps(run), *_order(run)]
    # "done" has a reason if the job ended while the disk had failed, or if another job has its event.
    unexpected = {state: n for state, n in states.items() if state.split()[0] != "done" and "queue_limit" not in state}
    if unexpected:
        problems.append(f"jobs at the end: {unexpected}")
    processes = run.processes.values()
    figures = {
        "failed": len(processes),
        "hooks": len(run.starts),
        "again": sum(max(0, len(one.starts) - 1) for one in processes if one.rule != "again"),
        "in_memory_only": sum(_within(one.at, run.lost) for one in processes),
        "dropped": sum(number for _, _, number in run.drops),
        "shed": sum(count for state, count in states.items() if "queue_limit" in state),
        **{f"step {name}": count for name, count in run.steps.items()},
    }
    return Verdict(problems, figures)


def _parsed(lines: Sequence[str]) -> _Run:
    run = _Run()
    step = volatile_since = last_drops_at = last_drops = -1
    for at, line in enumerate(lines):
        kind, *words = line.split(" ", 1)[0], *line.split(" ")[1:]
        rest = " ".join(words)
        match kind:
            case "F":
                serial, rule, comm = int(words[0]), words[1], words[2]
                run.processes[serial] = _Process(serial, rule, comm, at, key_of(rule, comm))
            case "S":
                serials = [int(one) for one in words[3].split(",")]
                run.starts.append((at, words[0], int(words[1]), words[2], serials))
                run.parents[words[0]] = int(words[4])
            case "E":
                run.ends[words[0]] = at
            case "X":
                run.on_purpose[words[0]] = at
            case ">":
                if words[0] == "step":
                    step, run.steps = at, run.steps + Counter([words[1]])
                elif rest == "volatile" and volatile_since < 0:
                    volatile_since = max(step, 0)
                elif rest == "durable" and volatile_since >= 0:
                    run.volatile.append((volatile_since, at))
                    volatile_since = -1
                elif words[:2] == ["killed", "daemon"] and volatile_since >= 0:
                    run.lost.append((volatile_since, at))
                elif words[0] == "finished":
                    for serial in map(int, words[1].split(",")):
                        process = run.processes.get(serial)
                        if process is not None and process.finished_at is None:
                            process.finished_at = at
                elif words[0] == "drops":
                    number = int(words[1])
                    if number > last_drops >= 0:
                        run.drops.append((last_drops_at, at, number - last_drops))
                    last_drops, last_drops_at = number, at
                elif words[0] == "started":
                    run.began_at[int(words[2])] = at
                if words[0] in ("killed", "stopped"):
                    run.ended_at[int(words[2])] = at
    if volatile_since >= 0:
        run.volatile.append((volatile_since, len(lines)))
    _join(run)
    return run


def _join(run: _Run) -> None:
    """Give each process the starts and the end of its hook. A hook may start before waitpid(2) has returned."""
    for at, attempt, _, rule, serials in run.starts:
        for serial in serials:
            process = run.processes.get(serial)
            if process is None or process.rule != rule:
                continue
            process.starts.append(at)
            process.attempts.append(attempt)
            if attempt in run.ends and process.done_at is None:
                process.done_at = run.ends[attempt]


def _next_start(run: _Run, at: int) -> float:
    """Return the line at which the next daemon or runner was started. Hooks of the runner may begin until then."""
    return min((began for began in run.began_at.values() if began > at), default=float("inf"))


def _within(at: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(begin <= at <= end for begin, end in spans)


def _promises(run: _Run) -> list[str]:
    """Return the processes whose hook did not run to its end."""
    problems = []
    missing_by_drop: Counter[int] = Counter()
    for one in run.processes.values():
        if one.rule in (*NOT_CHECKED, FLOOD) or one.done_at is not None or _within(one.at, run.lost):
            continue
        span = next((n for n, (begin, end, _) in enumerate(run.drops) if begin <= one.at <= end), None)
        if span is not None and not one.starts:
            missing_by_drop[span] += 1
        else:
            problems.append(f"promised and not run: serial {one.serial} of {one.rule}, failed at line {one.at + 1}")
    for span, count in missing_by_drop.items():
        if count > run.drops[span][2]:
            problems.append(f"{count} events are missing, but the kernel dropped only {run.drops[span][2]}")
    return problems


def _repetitions(run: _Run) -> list[str]:
    """Return the hooks that ran again although their job was finished, or although nothing interrupted them."""
    problems = []
    for one in run.processes.values():
        who = f"serial {one.serial} of {one.rule}"
        late = [at for at in one.starts if one.finished_at is not None and at > one.finished_at]
        problems += [f"finished and run again: {who} at line {at + 1}" for at in late]
        for (first, second), attempt in zip(itertools.pairwise(one.starts), one.attempts, strict=False):
            # A hook whose parent was killed before the hook had begun shows another parent.
            parent = run.parents[attempt]
            interrupted = parent not in run.began_at or run.ended_at.get(parent, second) < second
            lost = any(killed_at < second and first < _next_start(run, killed_at) for _, killed_at in run.lost)
            if attempt not in run.on_purpose and not interrupted and not lost:
                problems.append(f"run again without an interruption: {who} at line {second + 1}")
    return problems


def _overlaps(run: _Run) -> list[str]:
    """Return the attempts that started before another attempt with their key had ended."""
    problems = []
    open_by_key: dict[str, dict[str, int]] = defaultdict(dict)  # key -> attempt -> its start
    ends = sorted((at, attempt) for found in (run.ends, run.on_purpose) for attempt, at in found.items())
    events = [(at, "E", attempt, "") for at, attempt in ends]
    for at, attempt, job, rule, serials in run.starts:
        process = run.processes.get(serials[0])
        key = f"job {job}" if process is None or process.key is None else process.key
        events.append((at, "S", attempt, key if rule not in NOT_CHECKED else f"job {job}"))
    keys: dict[str, str] = {}
    for at, kind, attempt, key in sorted(events):
        if kind == "S":
            if not _within(at, run.volatile):
                within = [began for other, began in open_by_key[key].items() if run.ends.get(other, 0) > at]
                problems += [f"overlap of {key}: line {at + 1}, within that of line {began + 1}" for began in within]
            open_by_key[key][attempt] = at
            keys[attempt] = key
        else:
            open_by_key[keys.get(attempt, "")].pop(attempt, None)
    return problems


def _order(run: _Run) -> list[str]:
    """Return the hooks that started before the hook of an earlier death with the same key."""
    problems = []
    by_key: dict[str, list[_Process]] = defaultdict(list)
    for one in run.processes.values():
        excepted = _within(one.at, run.volatile) or any(begin <= one.at <= end for begin, end, _ in run.drops)
        if one.key is not None and one.starts and not excepted:
            by_key[one.key].append(one)
    for key, processes in by_key.items():
        processes.sort(key=lambda one: one.serial)
        for earlier, later in itertools.pairwise(processes):
            last = max((at for at in earlier.starts if at < (earlier.done_at or 0)), default=earlier.starts[0])
            first = later.starts[0]
            if first < last and not _within(first, run.volatile):
                both = f"serial {later.serial} at line {first + 1} before serial {earlier.serial} at line {last + 1}"
                problems.append(f"order of {key}: {both}")
    return problems
