"""What a rule needs to know of a process, and which of its lines ask for it. PURE.

An attribute is needed if a match key, the message, an argument or variable of the hook, `record:` or a `by:` names it.
The plan pays for exactly these (rules/plan.py), `explain` shows the price and the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from cnprocd.process.model import Occurrence
from cnprocd.rules.ruleset import EXIT_EVENTS, Condition, ProcessCondition, Rule
from cnprocd.rules.values import Template

Need = Literal[
    "comm", "ids", "euid", "loginuid", "exe", "exe_file", "exe_claimed", "cmdline", "cgroup", "ancestors", "usage",
    "lifetime", "oom",
]  # fmt: skip
"""`exe`: the path of any program. `exe_file`: which of the paths that rules name literally it is, if any."""

NEED_OF_KEY: Mapping[str, Need] = {
    "comm": "comm",
    "user": "ids",
    "group": "ids",
    "exe": "exe",
    "exe_claimed": "exe_claimed",
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
    "oom_killed": "oom",
    "euid": "euid",
    "loginuid": "loginuid",
}
"""Match keys whose attribute must be gathered. The others come with the event."""

NEED_OF_FIELD: Mapping[str, Need] = {
    "comm": "comm",
    "uid": "ids",
    "gid": "ids",
    "user": "ids",
    "exe": "exe",
    "exe_claimed": "exe_claimed",
    "exe_deleted": "exe",
    "cmdline": "cmdline",
    "cgroup": "cgroup",
    "unit": "cgroup",
    "user_unit": "cgroup",
    "container": "cgroup",
    "containers": "cgroup",
    "runtime": "cgroup",
    "pod_uid": "cgroup",
    "oom_killed": "oom",
    "euid": "euid",
    "loginuid": "loginuid",
    "ancestors": "ancestors",
}
"""Fields of a record whose attribute must be gathered. parent_comm is looked up for a match only."""

_DEFAULT_MESSAGE_FIELDS = ("comm",)

Needs = Mapping[Need, tuple[str, ...]]
"""Each need, and the lines of the rule that ask for it, as paths (`match.exe`, `run.command[2]`)."""


def needs_of(rule: Rule) -> Needs:
    """Return what a rule needs to know."""
    found: dict[Need, list[str]] = {}
    demands_literal, exits = _demands_literal_exe(rule.match), not EXIT_EVENTS.isdisjoint(rule.events)
    for need, line in (*_of_condition(rule.match, "match"), *_of_fields(named_fields(rule))):
        if need == "exe" and demands_literal and not line.startswith("match."):
            need = "exe_file"  # of a match the path is one that the rule names
        if need == "oom" and not exits:
            continue  # no other event has it: the kernel log is not asked
        lines = found.setdefault(need, [])
        if line not in lines:
            lines.append(line)
    return {need: tuple(lines) for need, lines in found.items()}


_UNKNOWN: Mapping[Need, tuple[str, Callable[[Occurrence], bool]]] = {
    "comm": ("comm", lambda one: one.process.comm is None),
    "ids": ("user", lambda one: one.process.uid is None),
    "exe": ("exe", lambda one: one.process.exe is None),
    "exe_file": ("exe", lambda one: one.process.exe is None and not one.process.exe_is_unnamed),
    "exe_claimed": ("exe_claimed", lambda one: one.process.exe_claimed is None),
    "cmdline": ("cmdline", lambda one: one.process.cmdline is None or one.process.cmdline_is_cut),
    "cgroup": ("cgroup", lambda one: one.process.placement is None),
    "ancestors": ("parent", lambda one: not one.ancestors),
    "usage": ("usage", lambda one: one.usage is None),
    "lifetime": ("lifetime", lambda one: one.lifetime_s is None),
    "euid": ("euid", lambda one: one.process.euid is None),
    "loginuid": ("loginuid", lambda one: one.process.loginuid is None),
    "oom": ("oom_killed", lambda one: one.kind == "exit" and one.oom_killed is None),
}
"""The attribute of each need, and whether it is unknown."""


def unknown_attributes(needs: Iterable[Need], occurrence: Occurrence) -> Iterator[tuple[str, str]]:
    """Return each attribute of these needs that is unknown of an occurrence, and why.

    The reasons: `gone` before it could be read, `lost` with its event, `unverified` (see exe_claimed), `truncated`,
    `unreadable` (the kernel log).
    """
    for need in needs:
        attribute, is_unknown = _UNKNOWN[need]
        if is_unknown(occurrence):
            yield attribute, _why_unknown(attribute, occurrence)


def _why_unknown(attribute: str, occurrence: Occurrence) -> str:
    process = occurrence.process
    if attribute == "exe" and process.exe_claimed is not None:
        return "unverified"
    if attribute == "cmdline" and process.cmdline is not None:
        return "truncated"
    if attribute == "oom_killed":
        return str(occurrence.oom or "lost")
    return "lost" if occurrence.recovered else "gone"


def literal_exe_paths(condition: Condition | ProcessCondition | None) -> frozenset[str]:
    """Return the paths that a rule compares the executable of the event's process with."""
    if condition is None:
        return frozenset()
    own = frozenset(pattern.text for pattern in condition.exe or () if pattern.kind == "literal")
    return own.union(*map(literal_exe_paths, (*condition.not_, *condition.any, *condition.all)))


def exe_directories(condition: Condition | ProcessCondition | None) -> frozenset[str]:
    """Return the directories in which the glob patterns on `exe` begin."""
    if condition is None:
        return frozenset()
    globs = (
        re.split(r"[*?\[]", pattern.text, maxsplit=1)[0] for pattern in condition.exe or () if pattern.kind == "glob"
    )
    own = frozenset(start.rpartition("/")[0] for start in globs if start.startswith("/") and start.count("/") > 1)
    return own.union(*map(exe_directories, (*condition.not_, *condition.any, *condition.all)))


def _demands_literal_exe(condition: Condition | None) -> bool:
    """Whether every process that satisfies a condition runs one of the paths that it names literally."""
    if condition is None:
        return False
    own = condition.exe is not None and all(pattern.kind == "literal" for pattern in condition.exe)
    return own or any(map(_demands_literal_exe, condition.all))


def named_fields(rule: Rule) -> Iterator[tuple[str, str]]:
    """Return each field of the record that a rule names, with the line that names it."""
    yield from ((name, "record") for name in rule.record)
    yield from ((name, "settings.record") for name in rule.record_by_settings if name not in rule.record)
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
    for key in ("rate_limit", "cooldown", "after", "coalesce"):
        limit = getattr(rule, key)
        if limit is not None and limit.by != "rule":
            yield limit.by, f"{key}.by"


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
            yield ("exe_file" if need == "exe" and _is_literal(condition) else need), f"{line}.{key}"
    for name in ("not_", "any", "all"):
        for part in getattr(condition, name):
            yield from _of_condition(part, f"{line}.{name.rstrip('_')}")
    for name in ("parent", "ancestor"):
        for need, below in _of_condition(getattr(condition, name), f"{line}.{name}"):
            yield ("exe" if need == "exe_file" else need), below  # no exit record shows the file of a relative


def _is_literal(condition: Condition | ProcessCondition) -> bool:
    return all(pattern.kind == "literal" for pattern in condition.exe or ())
