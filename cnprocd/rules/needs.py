"""What a rule needs to know of a process, and which of its lines ask for it. PURE.

An attribute is needed if a match key, the message, an argument or variable of the hook, `record:` or a `by:` names it.
The plan pays for exactly these (rules/plan.py), `explain` shows the price and the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from cnprocd.rules.ruleset import Condition, ProcessCondition, Rule
from cnprocd.rules.values import Template

Need = Literal["comm", "ids", "exe", "cmdline", "cgroup", "ancestors", "usage", "lifetime"]

NEED_OF_KEY: Mapping[str, Need] = {
    "comm": "comm",
    "user": "ids",
    "group": "ids",
    "exe": "exe",
    "cmdline": "cmdline",
    "cgroup": "cgroup",
    "unit": "cgroup",
    "user_unit": "cgroup",
    "container": "cgroup",
    "pod_uid": "cgroup",
    "parent": "ancestors",
    "ancestor": "ancestors",
    "lifetime": "lifetime",
    "max_rss": "usage",
    "cpu_time": "usage",
}
"""Match keys whose attribute must be gathered. The others come with the event."""

NEED_OF_FIELD: Mapping[str, Need] = {
    "comm": "comm",
    "uid": "ids",
    "gid": "ids",
    "user": "ids",
    "exe": "exe",
    "cmdline": "cmdline",
    "cgroup": "cgroup",
    "unit": "cgroup",
    "user_unit": "cgroup",
    "container": "cgroup",
    "containers": "cgroup",
    "runtime": "cgroup",
    "pod_uid": "cgroup",
}
"""Fields of a record whose attribute must be gathered. parent_comm is looked up for a match only."""

_DEFAULT_MESSAGE_FIELDS = ("comm",)
_BY_FIELDS = ("comm", "user", "unit")

Needs = Mapping[Need, tuple[str, ...]]
"""Each need, and the lines of the rule that ask for it, as paths (`match.exe`, `run.command[2]`)."""


def needs_of(rule: Rule) -> Needs:
    """Return what a rule needs to know."""
    found: dict[Need, list[str]] = {}
    for need, line in (*_of_condition(rule.match, "match"), *_of_fields(named_fields(rule))):
        lines = found.setdefault(need, [])
        if line not in lines:
            lines.append(line)
    return {need: tuple(lines) for need, lines in found.items()}


def named_fields(rule: Rule) -> Iterator[tuple[str, str]]:
    """Return each field of the record that a rule names, with the line that names it."""
    if rule.log is not None:
        line = "log.message"
        names = _DEFAULT_MESSAGE_FIELDS if rule.log.message is None else sorted(rule.log.message.fields)
        yield from ((name, line if rule.log.message is not None else "the default message") for name in names)
    if rule.run is not None:
        yield from _of_templates(enumerate(rule.run.command), "run.command[{}]")
        yield from _of_templates(rule.run.env.items(), "run.env.{}")
        failure = rule.run.on_failure
        if failure is not None and failure.message is not None:
            yield from ((name, "run.on_failure.message") for name in sorted(failure.message.fields))
        if rule.run.serialize == "comm":
            yield "comm", "run.serialize"
    if rule.rate_limit is not None and rule.rate_limit.by in _BY_FIELDS:
        yield rule.rate_limit.by, "rate_limit.by"


def _of_templates(templates: Iterable[tuple[object, Template]], line: str) -> Iterator[tuple[str, str]]:
    for place, template in templates:
        yield from ((name, line.format(place)) for name in sorted(template.fields))


def _of_fields(named: Iterable[tuple[str, str]]) -> Iterator[tuple[Need, str]]:
    return ((NEED_OF_FIELD[name], line) for name, line in named if name in NEED_OF_FIELD)


def _of_condition(condition: Condition | ProcessCondition | None, line: str) -> Iterator[tuple[Need, str]]:
    if condition is None:
        return
    for key, need in NEED_OF_KEY.items():
        if getattr(condition, key, None) is not None:
            yield need, f"{line}.{key}"
    for name in ("not_", "any", "all"):
        for part in getattr(condition, name):
            yield from _of_condition(part, f"{line}.{name.rstrip('_')}")
    for name in ("parent", "ancestor"):
        yield from _of_condition(getattr(condition, name), f"{line}.{name}")
