"""Verbs that work on rule files: check, schema, rules enable and rules disable. No daemon is needed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cnprocd.cli.drafts import draft_of
from cnprocd.cli.grammar import Options
from cnprocd.cli.problem_text import painted
from cnprocd.cli.quantities import NS
from cnprocd.cli.rule_names import no_such_rule
from cnprocd.cli.ruleset import check as check_files
from cnprocd.cli.ruleset import loaded_rules
from cnprocd.cli.terminal import Style, clock, counted, print_json
from cnprocd.control.client import Client, NotRunningError
from cnprocd.control.problems import problem_value
from cnprocd.errors import EX_CONFIG, EX_NOPERM, EX_OK, CnprocdError, NotFoundError
from cnprocd.json_value import as_str, get_list
from cnprocd.rules.language import disabled
from cnprocd.rules.language.schema import json_schema
from cnprocd.rules.rule_files import MAIN_FILE, disabled_path


def check(options: Options) -> int:
    """Show every error, then every warning. The exit status is 78 with an error, or if `strict` with a warning."""
    found = check_files(
        options.rules,
        options.files,
        other_host=options.other_host,
        observe_only=options.observe_only,
        draft=draft_of(options),
    )
    ok = not found.problems and not (found.warnings and options.strict)
    if options.json:
        print_json(
            {
                "ok": ok,
                "files": [str(file) for file in found.files],
                "rules": found.rules,
                "rules_hash": found.rules_hash,
                "problems": [problem_value(problem) for problem in found.problems],
                "warnings": [{"kind": kind, **problem_value(problem)} for kind, problem in found.warnings],
            }
        )
        return EX_OK if ok else EX_CONFIG
    style = Style(sys.stderr)
    for problem in found.problems:
        print(painted(problem, "red", "", style), file=sys.stderr)
    for kind, problem in found.warnings:
        print(painted(problem, "yellow", f"warning ({kind})", style), file=sys.stderr)
    if found.problems:
        print(f"{counted(len(found.problems), 'error')}: the daemon would reject these files", file=sys.stderr)
        return EX_CONFIG
    warned = f", {counted(len(found.warnings), 'warning')}" if found.warnings else ""
    rejected = "" if ok else ", which --strict treats as errors"
    print(f"{', '.join(map(str, found.files))}: {counted(found.rules, 'rule')}, no errors{warned}{rejected}")
    return EX_OK if ok else EX_CONFIG


def schema(options: Options) -> int:
    """Print the JSON schema, as installed in /usr/share/cnprocd/rules.schema.json."""
    print_json(json_schema())
    return EX_OK


def enable(options: Options) -> int:
    """Remove names from the file of disabled rules, and reload."""
    entries = _read(options, enabling=True)
    return _write(options, {name: end for name, end in entries.items() if name not in options.names}, "enabled")


def disable(options: Options) -> int:
    """Add names to the file of disabled rules, and reload. With --for they are enabled again after that time."""
    entries = _read(options, enabling=False)
    until_ns = None if options.duration is None else math.ceil(time.time() + options.duration) * NS  # as it is written
    state = "disabled" if until_ns is None else f"disabled until {clock(until_ns)}"
    path = disabled_path(options.rules)
    return _write(options, entries | dict.fromkeys(options.names, until_ns), f"{state} (in {path})")


def _read(options: Options, *, enabling: bool) -> dict[str, int | None]:
    """Return what the file of disabled rules holds. Raises NotFoundError if a name cannot be enabled or disabled."""
    rules = {rule.name: rule.enabled for rule in loaded_rules(options.rules).rules}
    entries = disabled.in_effect_of(disabled.read(disabled_path(options.rules)))
    for name in options.names:
        if name not in rules and not (enabling and name in entries):
            raise no_such_rule(name, rules)
        if enabling and name not in entries and not rules[name]:
            raise NotFoundError(f'the rule "{name}" is disabled in its own file', "remove `enabled: false` from it")
    return {name: entry.until_ns for name, entry in entries.items()}


def _write(options: Options, entries: Mapping[str, int | None], state: str) -> int:
    path = disabled_path(options.rules)
    try:
        disabled.write(path, entries)
    except PermissionError as error:
        refused = CnprocdError(f"cannot write {path}: {error.strerror}", "run it as root")
        refused.exit_status = EX_NOPERM
        raise refused from error
    reloaded = _reload(options)
    if options.json:
        ends = [{"name": name, "until_ns": end} for name, end in sorted(entries.items())]
        print_json({"file": str(path), "disabled": sorted(entries), "ends": ends, "reloaded": reloaded})
        return EX_OK
    after = (
        "; the daemon reloaded the rules"
        if reloaded
        else ", from the next start of cnprocd: no daemon runs with these rules"
    )
    print(f"{', '.join(dict.fromkeys(options.names))}: {state}{after}")
    return EX_OK


def _reload(options: Options) -> bool:
    """Whether a daemon runs with these rule files, and has loaded them again."""
    main_file = (options.rules or MAIN_FILE).absolute()
    try:
        with Client(options.runtime_dir) as client:
            status = client.ask("status")
            if Path(get_list(status, "files", as_str)[0]).absolute() != main_file:
                return False
            client.ask("reload")
    except NotRunningError:
        return False
    return True
