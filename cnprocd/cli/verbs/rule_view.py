"""`cnprocctl rules list` and `rules show`: the rules in force, and what the files say."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cnprocd.cli.grammar import Options
from cnprocd.cli.in_force import InForce, ask_if_possible, files_of
from cnprocd.cli.plans import RulePlan
from cnprocd.cli.rule_names import no_such_rule
from cnprocd.cli.rule_text import rule_lines
from cnprocd.cli.ruleset import Place, loaded_rules, overridden, places
from cnprocd.cli.terminal import Style, columns, print_json, state_text
from cnprocd.cli.verbs.explain import prices
from cnprocd.control.client import Client
from cnprocd.errors import EX_OK
from cnprocd.json_value import JsonDict, JsonObject, get_dict
from cnprocd.rules.compile import Matcher
from cnprocd.rules.problems import LoadedRules, RulesError
from cnprocd.rules.ruleset import Rule
from cnprocd.rules.written import written_rule


@dataclass(frozen=True, slots=True)
class _Row:
    """A rule in the list. `files` compares the files with what is in force; None if either is not known."""

    name: str
    description: str
    enabled: bool
    disabled_until_ns: int | None
    in_force: bool | None
    files: str | None
    events: tuple[str, ...]
    hook: bool
    hits: int | None
    place: Place | None
    plan: RulePlan | None = None  # the price of the rule in the files; with --json only


def listed(options: Options) -> int:
    """List the rules in force; without a daemon those in the files."""
    found, reason = ask_if_possible(options)
    try:
        loaded = loaded_rules(files_of(options, found))
    except RulesError as error:
        if found is None:
            raise
        loaded, reason = None, f"cannot compare with the rule files: {error.what}; see `cnprocctl check`"
    rows = list(_rows(found, loaded))
    if options.json:
        plans = _plans(loaded.rules, options) if loaded is not None else {}
        print_json([_value(replace(row, plan=plans.get(row.name))) for row in rows])
        return EX_OK
    _print_table(rows, with_daemon=found is not None)
    if loaded is None:
        _note(reason)
    elif found is None:
        _note(f"these are the rules in the files: {reason}")
    elif any(row.files not in ("same", None) for row in rows):
        _note("the files differ from the rules in force: `cnprocctl reload` loads them")
    return EX_OK


def _rows(found: InForce | None, loaded: LoadedRules | None) -> Iterator[_Row]:
    where = places(loaded) if loaded is not None else {}
    differences = found.differences(loaded) if found is not None and loaded is not None else {}
    for rule in found.rules.values() if found is not None else ():
        yield _Row(
            rule.name, rule.description, rule.enabled, rule.disabled_until_ns, True, differences.get(rule.name),
            rule.events, rule.hook, rule.hits, where.get(rule.name),
        )  # fmt: skip
    for each in loaded.rules if loaded is not None else ():
        if found is None or each.name not in found.rules:
            assert loaded is not None
            yield _Row(
                each.name, each.description, each.enabled, loaded.disabled.get(each.name),
                None if found is None else False, differences.get(each.name), tuple(each.events), each.run is not None,
                None, where[each.name],
            )  # fmt: skip


def _plans(rules: Sequence[Rule], options: Options) -> dict[str, RulePlan]:
    """Return what each rule costs, also if it is disabled."""
    matcher = Matcher(replace(rule, enabled=True) for rule in rules)
    return {plan.rule: plan for plan in prices(matcher.rules, matcher, options)}


def _value(row: _Row) -> JsonDict:
    return {
        "name": row.name,
        "enabled": row.enabled,
        "disabled_until_ns": row.disabled_until_ns,
        "in_force": row.in_force,
        "files": row.files,
        "events": list(row.events),
        "hook": row.hook,
        "hits": row.hits,
        "file": str(row.place.file) if row.place is not None else None,
        "line": row.place.line if row.place is not None else None,
        "description": row.description,
        "cost": row.plan.cost if row.plan is not None else None,
        "cost_means": row.plan.cost_means if row.plan is not None else None,
    }


def _print_table(rows: list[_Row], *, with_daemon: bool) -> None:
    heads = ["RULE", "STATE", *(["HITS", "FILES"] if with_daemon else []), "EVENTS", "HOOK", "FILE", "DESCRIPTION"]
    table = [
        [
            row.name,
            state_text(row.enabled, row.disabled_until_ns) if row.in_force is not False else "not in force",
            *([str(row.hits) if row.hits is not None else "-", row.files or "-"] if with_daemon else []),
            " ".join(row.events),
            "hook" if row.hook else "-",
            row.place.text if row.place is not None else "-",
            row.description,
        ]
        for row in rows
    ]
    for line in columns(table, heads, Style()) if table else ["no rules"]:
        print(line)


def _note(text: str) -> None:
    print(f"cnprocctl: {text}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A rule of the files or of the daemon. `in_force` is same, differs, absent, or None if it is not known."""

    name: str
    rule: JsonObject
    place: Place | None
    overrides: tuple[tuple[Path, int | None], ...]
    until_ns: int | None
    in_force: str | None
    rule_in_force: JsonObject | None


def show(options: Options) -> int:
    """Show one rule with its defaults, where it is written, and whether it is what is in force."""
    found, reason = ask_if_possible(options)
    loaded = loaded_rules(files_of(options, found))
    shown = _shown(options, found, loaded)
    if options.json:
        print_json(
            {
                "name": shown.name,
                "file": str(shown.place.file) if shown.place is not None else None,
                "line": shown.place.line if shown.place is not None else None,
                "overrides": [{"file": str(file), "line": line} for file, line in shown.overrides],
                "disabled_until_ns": shown.until_ns,
                "in_force": shown.in_force,
                "rule": shown.rule,
                "rule_in_force": shown.rule_in_force,
                "text": "\n".join(_text(shown, reason)),
                "plan": asdict(_plans(loaded.rules, options)[shown.name]) if shown.place is not None else None,
            }
        )
        return EX_OK
    style = Style()
    for line in _text(shown, reason):
        print(style("dim", line) if line.startswith("#") else line)
    return EX_OK


def _text(shown: _Shown, reason: str) -> Iterator[str]:
    """Yield the rule as YAML, with what is known of it as comments."""
    for line in _head(shown, reason):
        yield f"# {line}"
    lines = rule_lines(shown.rule)
    yield from lines
    if shown.in_force == "differs" and shown.rule_in_force is not None:
        yield "# from the rule in force (-) to the files (+):"
        for line in difflib.unified_diff(rule_lines(shown.rule_in_force), lines, n=0, lineterm=""):
            if not line.startswith(("---", "+++", "@@")):
                yield f"# {line}"


def _shown(options: Options, found: InForce | None, loaded: LoadedRules) -> _Shown:
    """Return what is known of the rule that the options name. Raises NotFoundError."""
    name: str = options.rule
    rule = next((one for one in loaded.rules if one.name == name), None)
    if rule is None:
        if found is None or name not in found.rules:
            raise no_such_rule(name, [*(one.name for one in loaded.rules), *(found.rules if found is not None else ())])
        removed = _ask_rule(options, name)
        return _Shown(name, removed, None, (), found.rules[name].disabled_until_ns, "removed", removed)
    place = places(loaded)[name]
    state: str | None = None
    ours: JsonObject | None = None
    if found is not None:
        state = {"new": "absent", "changed": "differs"}.get(found.differences(loaded)[name], "same")
        ours = _ask_rule(options, name) if state != "absent" else None
    overrides = tuple(overridden(place.file, name))
    return _Shown(name, written_rule(rule), place, overrides, loaded.disabled.get(name), state, ours)


def _ask_rule(options: Options, name: str) -> JsonObject:
    with Client(options.runtime_dir) as client:
        return get_dict(client.ask("rule", name=name), "rule")


def _head(shown: _Shown, reason: str) -> Iterator[str]:
    if shown.place is not None:
        yield shown.place.text
    for file, line in shown.overrides:
        yield f"overrides {file}:{line}" if line is not None else f"overrides {file}, which has no such rule"
    if not shown.rule["enabled"]:
        yield state_text(False, shown.until_ns)
    yield {
        "same": "in force as written here",
        "differs": "the rule in force differs from this one: `cnprocctl reload` loads the files",
        "absent": "not in force: `cnprocctl reload` loads the files",
        "removed": "in force, but no longer in the files: `cnprocctl reload` loads them",
        None: f"not compared with what is in force: {reason}",
    }[shown.in_force]
