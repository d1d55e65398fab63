"""The rules that are in force in the daemon, and the rule files that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cnprocd.cli.grammar import Options
from cnprocd.control.client import Client
from cnprocd.errors import CnprocdError
from cnprocd.json_value import (
    JsonValue,
    as_dict,
    as_str,
    get_bool,
    get_int,
    get_int_or_none,
    get_list,
    get_map,
    get_str,
)
from cnprocd.rules.problems import LoadedRules
from cnprocd.rules.rule_files import MAIN_FILE


@dataclass(frozen=True, slots=True)
class RuleInForce:
    """A rule as the daemon reports it. `digest` is that of rules/written.py."""

    name: str
    description: str
    enabled: bool
    disabled_until_ns: int | None
    digest: str
    events: tuple[str, ...]
    hook: bool
    hits: int


@dataclass(frozen=True, slots=True)
class InForce:
    """The daemon's rules, and its main rule file."""

    main_file: Path
    rules: Mapping[str, RuleInForce]

    def differences(self, loaded: LoadedRules) -> dict[str, str]:
        """Return for each rule of the daemon or of the files: `same`, `changed`, `removed` or `new` in the files."""
        found = dict.fromkeys(self.rules, "removed")
        for rule in loaded.rules:
            ours = self.rules.get(rule.name)
            same = ours is not None and (ours.digest, ours.enabled) == (loaded.digests[rule.name], rule.enabled)
            found[rule.name] = "new" if ours is None else "same" if same else "changed"
        return found


def ask(options: Options) -> InForce:
    """Ask the daemon for its rules. Raises CnprocdError."""
    with Client(options.runtime_dir) as client:
        status, digests = client.ask("status"), get_map(client.ask("digests"), "digests", as_str)
    rules = get_list(status, "rules", lambda value: _rule(value, digests))
    return InForce(Path(get_list(status, "files", as_str)[0]), {rule.name: rule for rule in rules})


def ask_if_possible(options: Options) -> tuple[InForce | None, str]:
    """Return the daemon's rules, or None and the reason why they are not known."""
    try:
        found = ask(options)
    except CnprocdError as error:
        return None, error.what
    if options.rules is not None and options.rules.absolute() != found.main_file.absolute():
        return None, f"cnprocd uses other files ({found.main_file})"
    return found, ""


def files_of(options: Options, found: InForce | None) -> Path | None:
    """Return what `--rules` is for the files of the daemon, so that they can be loaded as it would load them."""
    if options.rules is not None or found is None or found.main_file.absolute() == MAIN_FILE:
        rules: Path | None = options.rules
        return rules
    return found.main_file


def _rule(value: JsonValue, digests: Mapping[str, str]) -> RuleInForce:
    rule = as_dict(value)
    return RuleInForce(
        name=get_str(rule, "name"),
        description=get_str(rule, "description"),
        enabled=get_bool(rule, "enabled"),
        disabled_until_ns=get_int_or_none(rule, "disabled_until_ns"),
        digest=digests.get(get_str(rule, "name"), ""),  # "": a reload came between the two answers
        events=tuple(get_list(rule, "events", as_str)),
        hook=get_bool(rule, "hook"),
        hits=get_int(rule, "hits"),
    )
