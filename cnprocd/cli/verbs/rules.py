"""What is asked of the rule files: check, schema, and rules list, enable and disable. No daemon needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cnprocd.cli.grammar import Options
from cnprocd.cli.rule_names import no_such_rule
from cnprocd.cli.ruleset import check as check_files
from cnprocd.cli.ruleset import loaded_rules, places
from cnprocd.cli.terminal import Style, columns, print_json
from cnprocd.control.client import Client, NotRunningError
from cnprocd.control.problems import problem_value
from cnprocd.errors import EX_CONFIG, EX_NOPERM, EX_OK, CnprocdError, NotFoundError
from cnprocd.rules.language import disabled
from cnprocd.rules.language.schema import json_schema
from cnprocd.rules.problems import Problem


def check(options: Options) -> int:
    """Show every error, then every warning. The exit status is 78 with an error, or if `strict` with a warning."""
    found = check_files(options.rules, options.files)
    ok = not found.problems and not (found.warnings and options.strict)
    if options.json:
        print_json(
            {
                "ok": ok,
                "files": [str(file) for file in found.files],
                "rules": found.rules,
                "problems": [problem_value(problem) for problem in found.problems],
                "warnings": [{"kind": kind, **problem_value(problem)} for kind, problem in found.warnings],
            }
        )
        return EX_OK if ok else EX_CONFIG
    style = Style(sys.stderr)
    for problem in found.problems:
        print(_painted(problem, "red", "", style), file=sys.stderr)
    for kind, problem in found.warnings:
        print(_painted(problem, "yellow", f"warning ({kind})", style), file=sys.stderr)
    if found.problems:
        print(f"{_count(len(found.problems), 'error')}: the daemon would reject these files", file=sys.stderr)
        return EX_CONFIG
    warned = f", {_count(len(found.warnings), 'warning')}" if found.warnings else ""
    print(f"{', '.join(map(str, found.files))}: {_count(found.rules, 'rule')}, no errors{warned}")
    return EX_OK if ok else EX_CONFIG


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _painted(problem: Problem, colour: str, label: str, style: Style) -> str:
    """Return a problem as it renders, its place in bold and its caret in colour."""
    first, *rest = problem.render().split("\n")
    where, message = problem.position, first[len(problem.position) :]
    if label:
        message = f": {style(colour, label)}{message}"
    marked = [style(colour, line) if line.strip() == "^" else line for line in rest]
    return "\n".join([f"{style('bold', where)}{message}", *marked])


def schema(options: Options) -> int:
    """The JSON schema, as installed in /usr/share/cnprocd/rules.schema.json."""
    print_json(json_schema())
    return EX_OK


def listed(options: Options) -> int:
    """All rules with their place."""
    loaded = loaded_rules(options.rules)
    where = places(loaded)
    found = [
        {
            "name": rule.name,
            "enabled": rule.enabled,
            "events": list(rule.events),
            "hook": rule.run is not None,
            "file": str(where[rule.name].file),
            "description": rule.description,
        }
        for rule in loaded.rules
    ]
    if options.json:
        print_json(found)
        return EX_OK
    rows = [
        [
            rule.name,
            "enabled" if rule.enabled else "DISABLED",
            " ".join(rule.events),
            "hook" if rule.run is not None else "-",
            str(where[rule.name].file),
            rule.description,
        ]
        for rule in loaded.rules
    ]
    for line in (
        columns(rows, ["RULE", "STATE", "EVENTS", "HOOK", "FILE", "DESCRIPTION"], Style()) if rows else ["no rules"]
    ):
        print(line)
    return EX_OK


def enable(options: Options) -> int:
    """Take names out of the file of disabled rules; then reload."""
    return _switch(options, on=True)


def disable(options: Options) -> int:
    """Add names to the file of disabled rules; then reload."""
    return _switch(options, on=False)


def _switch(options: Options, *, on: bool) -> int:
    path = disabled.path_beside(options.rules)
    loaded = loaded_rules(options.rules)
    off = set(disabled.read(path))
    for name in options.names:
        _check_name(name, {rule.name: rule.enabled for rule in loaded.rules}, off, on)
    before, off = off, off - set(options.names) if on else off | set(options.names)
    try:
        if off != before:
            disabled.write(path, off)
    except PermissionError as error:
        refused = CnprocdError(f"{path} cannot be written: {error.strerror}", "run it as root")
        refused.exit_status = EX_NOPERM
        raise refused from error
    told = _tell_daemon(options, loaded.files[0])
    if options.json:
        print_json({"file": str(path), "disabled": sorted(off), "reloaded": told})
        return EX_OK
    state = "enabled" if on else f"disabled (in {path})"
    after = "and in force" if told else "from the next start of cnprocd: none runs with these rules"
    print(f"{', '.join(options.names)}: {state}, {after}")
    return EX_OK


def _check_name(name: str, rules: dict[str, bool], off: set[str], on: bool) -> None:
    if name not in rules and not (on and name in off):
        raise no_such_rule(name, rules)
    if on and name not in off and not rules[name]:
        raise NotFoundError(f'the rule "{name}" is disabled in its own file', "remove `enabled: false` from it")


def _tell_daemon(options: Options, main_file: Path) -> bool:
    """Whether a daemon runs with this rule file, and has taken the change."""
    try:
        with Client(options.runtime_dir) as client:
            status: Any = client.ask("status")
            if Path(status["files"][0]).absolute() != main_file.absolute():
                return False
            client.ask("reload")
    except NotRunningError:
        return False
    return True
