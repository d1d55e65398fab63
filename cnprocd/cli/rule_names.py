"""The names of rules on a command line: globs, and names that no rule has.

A glob may match nothing. A literal name that no rule has is a mistake, which an empty answer would hide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase

from cnprocd.cli.grammar import Options
from cnprocd.control.client import Client
from cnprocd.errors import CnprocdError, NotFoundError
from cnprocd.json_value import as_dict, get_list, get_str


def is_glob(name: str) -> bool:
    """Whether a name has a wildcard of the rule language: `*`, `?` or `[`."""
    return re.search(r"[*?\[]", name) is not None


def wanted(rule: str, name: str | None) -> bool:
    """Whether `rule` is what the option `--rule` asks for; without the option every rule is."""
    return name is None or fnmatchcase(rule, name)


def require_rule(name: str | None, names: Callable[[], Collection[str] | None]) -> None:
    """Raise NotFoundError if no rule has the literal `name`. `names` returns those of the rules, if they are known."""
    if name is None or is_glob(name):
        return
    known = names()
    if known is not None and name not in known:
        raise no_such_rule(name, known)


def known_names(options: Options) -> list[str] | None:
    """Return the names of the rules in force, without a daemon those in the files, and None if neither can be read."""
    try:
        return in_force(options)
    except CnprocdError:
        return in_files(options)


def no_such_rule(name: str, known: Iterable[str]) -> NotFoundError:
    """Return the error for a name that is none of `known`."""
    from cnprocd.rules.language.value_problem import did_you_mean  # not above: only a mistake needs it

    return NotFoundError(
        f'no rule named "{name}"', did_you_mean(name, known) or "`cnprocctl rules list` shows the rules"
    )


def in_force(options: Options) -> list[str]:
    """Return the names of the daemon's rules. Raises CnprocdError."""
    with Client(options.runtime_dir) as client:
        status = client.ask("status")
    return get_list(status, "rules", lambda rule: get_str(as_dict(rule), "name"))


def in_files(options: Options) -> list[str] | None:
    """Return the names of the rules in the files, or None if the files cannot be used."""
    from cnprocd.cli.ruleset import loaded_rules  # brings pydantic
    from cnprocd.rules.problems import RulesError

    try:
        return [rule.name for rule in loaded_rules(options.rules).rules]
    except RulesError:
        return None
