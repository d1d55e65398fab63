"""Warnings about the whole rule set: valid, but probably not intended. advice.py has those about one rule. PURE.

    never        no event can satisfy the rule: its keys contradict each other, or no value satisfies a pattern
    duplicate    another rule has the same events, the same match and the same after
    shadowed     every event that runs this rule's hook also runs another rule's hook
    fakeable     a hook runs as root, and no key proves the user, the service or the program of the process
    timeout      a hook has no timeout, so the default of 30 s applies
    claimed      a hook runs for a path that a process claims, and for nothing else
    unavailable  a message, hook or record names a field that no event of the rule has
    too_early    a rule asks for the program of a uid event, which is unknown if a set-user-ID program begins
    unit         a pattern for unit or user_unit has no suffix such as .service, so it matches no unit

PURE. There are no false warnings: if it is not certain, there is no warning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cnprocd.rules.language.evidence import PROVING_KEYS, any_user_can_satisfy
from cnprocd.rules.language.impossible import contradictions, without_values
from cnprocd.rules.language.overlap import PATTERN_KEYS, Overlaps
from cnprocd.rules.needs import named_fields
from cnprocd.rules.ruleset import EXIT_EVENTS, Condition, ProcessCondition, Rule
from cnprocd.rules.values import Pattern

_PROGRAM = ("comm", "exe", "exe_claimed", "cmdline")
_ROOT = (None, "root", 0)
# The suffixes of units that have processes, as process/stat.py finds them; systemd.unit(5).
UNIT_SUFFIXES = (
    ".service", ".scope", ".socket", ".mount", ".swap", ".timer", ".path", ".device", ".automount", ".target",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LintWarning:
    """A warning about a rule, with the path of the key below it."""

    rule: str
    at: tuple[str | int, ...]
    kind: str
    message: str
    hint: str


def lint(rules: Sequence[Rule]) -> Iterator[LintWarning]:
    """Return all warnings, in the order of the rules."""
    enabled = [rule for rule in rules if rule.enabled]
    overlaps = Overlaps(enabled)
    for rule in enabled:
        yield from _never(rule)
        yield from _covered(rule, overlaps)
        yield from _without_suffix(rule)
        yield from _unavailable(rule)
        yield from _too_early(rule)
        if rule.run is not None:
            yield from _hook(rule)


def _never(rule: Rule) -> Iterator[LintWarning]:
    for key, message, hint in contradictions(rule):
        yield LintWarning(rule.name, ("match", *(() if key is None else (key,))), "never", message, hint)
    for at, pattern in patterns_of(rule.match, PATTERN_KEYS):
        found = without_values(str(at[-1]), pattern)
        if found is not None:
            reason, hint = found
            message = f'{at[-1]} "{pattern.text}" never matches: {reason}'
            yield LintWarning(rule.name, at, "never", message, hint)


def _covered(rule: Rule, overlaps: Overlaps) -> Iterator[LintWarning]:
    twin = overlaps.twin_of(rule)
    if twin is not None:
        both = ", and both run a hook" if rule.run is not None and twin.run is not None else ""
        yield LintWarning(
            rule.name,
            ("name",),
            "duplicate",
            f'"{twin.name}" has the same events and the same match{both}',
            "every rule that matches acts: merge the two, or make them differ",
        )
        return
    wider = overlaps.wider_than(rule) if rule.run is not None else None
    if wider is not None:
        yield LintWarning(
            rule.name,
            ("name",),
            "shadowed",
            f'"{wider.name}" matches everything that this rule matches, and both hooks run',
            f"if this is not intended, add a not: to {wider.name}",
        )


def _without_suffix(rule: Rule) -> Iterator[LintWarning]:
    for at, pattern in patterns_of(rule.match, ("unit", "user_unit")):
        tail = re.split(r"[*?\]]", pattern.text)[-1] if pattern.kind == "glob" else pattern.text
        is_whole = pattern.kind == "literal"
        if pattern.kind == "regex" or any(
            tail.endswith(suffix) or (not is_whole and suffix.endswith(tail)) for suffix in UNIT_SUFFIXES
        ):
            continue
        hint = "match on cgroup for a slice" if tail.endswith(".slice") else f'write "{pattern.text}.service"'
        yield LintWarning(
            rule.name, at, "unit", f'{at[-1]} "{pattern.text}" never matches: it has no suffix such as .service', hint
        )


def patterns_of(
    condition: Condition | ProcessCondition | None, keys: Sequence[str], at: tuple[str | int, ...] = ("match",)
) -> Iterator[tuple[tuple[str | int, ...], Pattern]]:
    """Return every pattern for these keys in a condition, with the path of its key."""
    if condition is None:
        return
    for key in keys:
        yield from (((*at, key), pattern) for pattern in getattr(condition, key) or ())
    branches: tuple[tuple[str, Sequence[Condition | ProcessCondition]], ...] = (
        ("not", condition.not_), ("any", condition.any), ("all", condition.all)
    )  # fmt: skip
    for key, branch in branches:
        for index, part in enumerate(branch):
            yield from patterns_of(part, keys, (*at, key, index))
    yield from patterns_of(condition.parent, keys, (*at, "parent"))
    yield from patterns_of(condition.ancestor, keys, (*at, "ancestor"))


_FIELDS_OF_EVENTS: Mapping[str, Collection[str]] = {
    **dict.fromkeys(
        ("exit_code", "signal", "core_dumped", "status", "oom_killed", "lifetime_ms", "cpu_time_ms", "max_rss_kib",
         "read_bytes", "write_bytes"),
        EXIT_EVENTS,
    ),
    "ruid": ("uid",), "rgid": ("gid",), "egid": ("gid",), "tracer_pid": ("ptrace",), "tracer_tid": ("ptrace",),
}  # fmt: skip


def _unavailable(rule: Rule) -> Iterator[LintWarning]:
    for name, line in named_fields(rule):
        events = _FIELDS_OF_EVENTS.get(name)
        at = place_of(line)
        if at is None:
            continue
        if name == "job_id" and rule.run is None:
            message, hint = "the field job_id is always null: the rule has no hook", "remove it"
        elif events is not None and not set(events) & set(rule.events):
            message = f"the field {name} is always null: no event of the rule has it"
            hint = f"only {' and '.join(sorted(events))} events have it"
        else:
            continue
        yield LintWarning(rule.name, at, "unavailable", message, hint)


def place_of(line: str) -> tuple[str | int, ...] | None:
    """Return the path below the rule of a line that names a field; None if it is not in the rule."""
    if line == "the default message" or line.startswith("settings."):
        return None
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", line))


def _too_early(rule: Rule) -> Iterator[LintWarning]:
    """Warn of `euid` with a key about the program. setuid(2) of a running program has both, so it can match.

    begin_new_exec() of fs/exec.c commits the new credentials, and so sends the uid event, before the exec event.
    """
    if "uid" not in rule.events or rule.match is None or rule.match.euid is None:
        return
    key = next((key for key in _PROGRAM if getattr(rule.match, key) is not None), None)
    if key is not None:
        yield LintWarning(
            rule.name,
            ("match", key),
            "too_early",
            f"{key} of a uid event is null when a set-user-ID program begins: the rule does not match then",
            "match its exec event (events: [exec]), or match the ancestor: that starts it",
        )


def _hook(rule: Rule) -> Iterator[LintWarning]:
    assert rule.run is not None
    if rule.match is not None and any_user_can_satisfy(rule.match):
        if rule.match.exe_claimed is not None:
            yield LintWarning(
                rule.name,
                ("match", "exe_claimed"),
                "claimed",
                "the hook runs for a path that any user can claim, in a mount namespace of its own",
                "add user:, unit: or cgroup: to the match, or use exe: for a program of the host",
            )
        elif rule.run.user in _ROOT:
            yield LintWarning(
                rule.name,
                ("match",),
                "fakeable",
                "the hook runs as root, and no key proves the user, the service or the program of the process",
                _better_proof(rule.match),
            )
    if "timeout_s" not in rule.run.given:
        yield LintWarning(
            rule.name,
            ("run",),
            "timeout",
            f"the hook has no timeout: the default of {rule.run.timeout_s:g} s applies",
            "set one, such as timeout: 30s",
        )


def _better_proof(condition: Condition | ProcessCondition) -> str:
    """Return what to do. If the match has keys that look like a proof, say why they prove nothing."""
    add = "add user:, unit:, cgroup: or exe: to the match"
    if any(getattr(condition, key) is not None for key in PROVING_KEYS):
        return "the processes of every user satisfy these patterns: name the user:, the unit: or the path of exe:"
    for key in ("parent", "ancestor"):
        related = getattr(condition, key)
        if related is not None and any(getattr(related, one) is not None for one in PROVING_KEYS):
            above = "an orphan of any user is a child of root's init" if key == "parent" else "root's init is above all"
            return f"{above}, or a user's own process satisfies {key}: {add}"
    return f"{add}, or run the hook as another user"
