"""The reasons for and against a match, key by key, in the three-valued logic of the matcher. PURE.

Strategy: evaluate nothing in a second way. The verdict of a key comes from the predicate that the daemon uses, compiled
from a condition with this key alone (rules/predicate.py). The verdict of the rule comes from the matcher. So an
explanation cannot differ from the daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cnprocd.connector.filter import describe as describe_statuses
from cnprocd.connector.status import StatusSet, describe
from cnprocd.escape import printable
from cnprocd.process.cgroup_path import Placement
from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.compile import CompiledRule, Match, evaluate
from cnprocd.rules.predicate import Verdict, compile_condition, compile_process
from cnprocd.rules.ruleset import Condition, ProcessCondition, given_keys
from cnprocd.rules.values import Comparison, IntSet, Pattern

_ENDINGS = ("status", "core_dumped", "exit_status", "lifetime", "max_rss", "cpu_time", "oom_killed")
_AFTERWARDS = ("rate_limit", "cooldown", "after", "coalesce")


@dataclass(frozen=True, slots=True)
class Reason:
    """One key: the wanted and the actual value, and whether they fit (None: unknown). `depth` is its indentation."""

    depth: int
    key: str
    wanted: str
    actual: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Explained:
    """The reasons of one rule for one event, and the match if there is one."""

    compiled: CompiledRule
    match: Match | None
    reasons: tuple[Reason, ...]


def explain_all(compiled: CompiledRule, occurrence: Occurrence) -> Explained:
    """Return every reason for or against, including those after the first no."""
    reasons = (*_gates(compiled, occurrence), *_condition_reasons(compiled.rule.match, occurrence, 0))
    return Explained(compiled, fires(compiled, occurrence), reasons)


def fires(compiled: CompiledRule, occurrence: Occurrence) -> Match | None:
    """Return the match that the matcher would make of this rule, or None."""
    if occurrence.kind not in compiled.kinds or compiled.rule.threads is not occurrence.of_thread:
        return None
    if occurrence.from_hook and not compiled.rule.include_hooks:
        return None
    return evaluate(compiled, occurrence) or None


def afterwards(compiled: CompiledRule) -> dict[str, str]:
    """Return the keys of the rule that may still hold a match back, and what each counts by."""
    given = ((name, getattr(compiled.rule, name)) for name in _AFTERWARDS)
    return {name: limit.by for name, limit in given if limit is not None}


def _gates(compiled: CompiledRule, occurrence: Occurrence) -> Iterator[Reason]:
    rule = compiled.rule
    ended = f" ({describe(occurrence.status)})" if occurrence.kind == "exit" else ""
    kind_fits = occurrence.kind in compiled.kinds
    if kind_fits and occurrence.kind == "exit" and occurrence.status == 0:
        kind_fits = compiled.any_exit
    verdict: Verdict = kind_fits
    if kind_fits and occurrence.kind == "exit" and occurrence.status is None and not compiled.any_exit:
        verdict = None  # on_unknown_exit decides
    yield Reason(0, "events", " ".join(rule.events), f"{occurrence.kind}{ended}", verdict)
    if verdict is None:
        yield Reason(
            0, "on_unknown_exit", rule.on_unknown_exit, "unknown exit status", rule.on_unknown_exit != "ignore"
        )
    if rule.threads or occurrence.of_thread:
        actual = "a thread" if occurrence.of_thread else "a process"
        yield Reason(0, "threads", str(rule.threads).lower(), actual, rule.threads is occurrence.of_thread)
    if occurrence.from_hook:
        yield Reason(0, "include_hooks", str(rule.include_hooks).lower(), "started by a hook", rule.include_hooks)


def _condition_reasons(condition: Condition | None, occurrence: Occurrence, depth: int) -> Iterator[Reason]:
    if condition is None:
        return
    given = given_keys(condition)
    ending = [key for key in given if key in ("exit_code", "signal")]
    for key in given:
        if key in ("parent", "ancestor"):
            yield from _related(key, getattr(condition, key), occurrence, depth)
        elif key in ("not_", "any", "all"):
            yield from _branches(key, getattr(condition, key), occurrence, depth)
        elif key not in ending:
            alone = _only({key: getattr(condition, key)})
            verdict = compile_condition(alone)(occurrence)
            yield Reason(depth, key, wanted_text(key, getattr(condition, key)), _actual(key, occurrence), verdict)
        elif key == ending[0]:
            both = {name: getattr(condition, name) for name in ending}
            wanted = " or ".join(wanted_text(name, value) for name, value in both.items())
            verdict = compile_condition(_only(both))(occurrence)
            yield Reason(depth, " or ".join(ending), wanted, _actual("status", occurrence), verdict)


def _only(keys: dict[str, Any]) -> Condition:
    """Return a condition of these keys and no others."""
    return Condition(**keys)


def _branches(key: str, parts: tuple[Condition, ...], occurrence: Occurrence, depth: int) -> Iterator[Reason]:
    alone = _only({key: parts})
    branch = {"not_": "none of", "any": "at least one of", "all": "every one of"}[key]
    yield Reason(depth, key.rstrip("_"), branch, "", compile_condition(alone)(occurrence))
    for part in parts:
        yield from _condition_reasons(part, occurrence, depth + 1)


def _related(key: str, wanted: ProcessCondition, occurrence: Occurrence, depth: int) -> Iterator[Reason]:
    above = occurrence.ancestors
    alone = _only({key: wanted})
    names = " < ".join(_shown(one.comm) for one in above or ()) or "unknown"
    yield Reason(
        depth, key, "", names if key == "ancestor" else names.split(" < ")[0], compile_condition(alone)(occurrence)
    )
    relatives = (above or ())[:1] if key == "parent" else above or ()
    for field in given_keys(wanted):
        one = ProcessCondition(**{field: getattr(wanted, field)})
        test = compile_process(one)
        verdicts = [test(relative, (above or ())[i + 1 :]) for i, relative in enumerate(relatives)]
        verdict: Verdict = True if True in verdicts else None if None in verdicts or not verdicts else False
        actual = ", ".join(_process_value(field, relative) for relative in relatives) or "unknown"
        yield Reason(depth + 1, field.rstrip("_"), wanted_text(field, getattr(wanted, field)), actual, verdict)


def wanted_text(key: str, value: Any) -> str:  # noqa: ANN401  # any value of the rule language
    """Return a parsed value as in a rule file."""
    if isinstance(value, IntSet):
        return describe_statuses(StatusSet.of(value.ranges, ()))
    if isinstance(value, Comparison):
        return f"{value.op} {_bytes(value.value) if key == 'max_rss' else f'{value.value:g}s'}"
    if isinstance(value, frozenset):
        return describe_statuses(StatusSet.of((), value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(_item(one) for one in value)
    return str(value)


def _item(value: object) -> str:
    if isinstance(value, Pattern):
        return f"/{printable(value.text)}/" if value.kind == "regex" else printable(value.text)
    return str(value) if isinstance(value, int | str) else "..."


def _bytes(value: float) -> str:
    return f"{value / (1 << 20):g}M" if value >= 1 << 20 else f"{value:g}B"


def _actual(key: str, occurrence: Occurrence) -> str:
    """Return the actual value of a key as text; `unknown` if it is not known."""
    usage, status = occurrence.usage, occurrence.status
    if occurrence.kind != "exit" and key in _ENDINGS:
        return f"not an exit ({occurrence.kind})"
    endings: dict[str, Callable[[], str]] = {
        "status": lambda: describe(status),
        "core_dumped": lambda: "unknown" if status is None else str("core" in describe(status)).lower(),
        "exit_status": lambda: "unknown" if status is None else "known",
        "lifetime": lambda: "unknown" if occurrence.lifetime_s is None else f"{occurrence.lifetime_s:.3g}s",
        "max_rss": lambda: _bytes(usage.max_rss_kib * 1024) if usage else "unknown",
        "oom_killed": lambda: _shown(occurrence.oom_killed).lower(),
        "cpu_time": lambda: f"{usage.cpu_time_us / 1e6:.3g}s" if usage else "unknown",
    }
    return endings[key]() if key in endings else _process_value(key, occurrence.process)


_PLACEMENT_VALUES: Mapping[str, Callable[[Placement], str | None]] = {
    "unit": lambda placement: placement.unit,
    "user_unit": lambda placement: placement.user_unit,
    "container": lambda placement: placement.container.id if placement.container is not None else None,
    "pod_uid": lambda placement: placement.pod_uid,
}


def _process_value(key: str, process: Process) -> str:
    value: object
    if key in _PLACEMENT_VALUES:
        value = None if process.placement is None else _PLACEMENT_VALUES[key](process.placement) or f"no {key}"
    else:
        value = getattr(process, {"user": "uid", "group": "gid"}.get(key, key), None)
    return _shown(value)


def _shown(value: object) -> str:
    return "unknown" if value is None else printable(value) if isinstance(value, str) else str(value)
