"""From the words of a command line to options, or to the usage of the verb that was meant.

argparse does the reading. What it says of mistakes is replaced: an error shows the usage of the verb and, for an
unknown verb or option, the nearest name. The exit status is 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from cnprocd import __version__
from cnprocd.cli.arguments import Argument
from cnprocd.cli.grammar import COMMON, GROUPS, VERBS, Options
from cnprocd.cli.quantities import moment

WRONG_USAGE = 2
_MOMENTS = {name for verb in VERBS for one in verb.arguments if one.options.get("type") is moment for name in one.names}


class Parser(argparse.ArgumentParser):
    """A parser of one verb, of a group of verbs, or of the whole command line."""

    verbs: Sequence[str] = ()  # the words that may follow
    _words: Sequence[str] = ()  # of the command line

    def parse_known_args(  # type: ignore[override]  # argparse overloads it by the type of the namespace
        self, args: Sequence[str] | None = None, namespace: Options | None = None
    ) -> tuple[Options, list[str]]:
        words = self._words = list(sys.argv[1:] if args is None else args)
        if not self.verbs:
            self._refuse_unknown(words)
        options, rest = super().parse_known_args(words, namespace)
        if rest:
            self._refuse_unknown(rest)
            extra = next((word for word in rest if not word.startswith("-")), None)
            self.error(f"unknown option {rest[0]}" if extra is None else f'unexpected argument "{extra}"')
        return options, rest

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Report the first unknown option. Before argparse does anything else: it would name what is missing."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            if word.startswith("--") and " " not in name and not any(option.startswith(name) for option in known):
                self.error(f"unknown option {name}{_did_you_mean(name, known)}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            self.error(f'unknown verb "{value}"{_did_you_mean(str(value), self.verbs)}{self._shown_verbs()}')
        choices = list(map(str, action.choices))
        name = "/".join(action.option_strings)
        expected = f"expected {', '.join(choices)}{_did_you_mean(str(value), choices)}"
        self.error(f'invalid value "{value}" for {name}: {expected}')

    def _shown_verbs(self) -> str:
        return f"\nverbs: {', '.join(self.verbs)}"

    def error(self, message: str) -> NoReturn:
        """Print the usage and the mistake, and exit."""
        if message == "the following arguments are required: VERB":
            self._words, words = (), self._words
            self._refuse_unknown(words)
            message = f"missing verb{self._shown_verbs()}"
        first, *more = re.sub(r"^argument ([^:]+): ", r"\1: ", message).split("\n")
        self.print_usage(sys.stderr)
        self.exit(WRONG_USAGE, "\n".join([f"cnprocctl: {first}", *more]) + "\n")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    from cnprocd.rules.language.value_problem import did_you_mean  # not above: only a mistake needs it

    hint = did_you_mean(word, known)
    return f": {hint}" if hint else ""


def parse(words: Sequence[str]) -> Options:
    """Return the options of a command line. Exits if it has a mistake, or asks for help."""
    options = parser(words).parse_args(_joined(words))
    options.json = options.output == "json"
    return options


def _joined(words: Sequence[str]) -> list[str]:
    """Join `--since -2h` to `--since=-2h`: argparse would take -2h for an option."""
    found: list[str] = []
    for word in words:
        if found and found[-1] in _MOMENTS and re.match(r"-[0-9]", word):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def parser(words: Sequence[str] | None = None) -> Parser:
    """Return the parser of the whole command line, or of only the verbs that are named in `words`.

    Making the parsers of all verbs would take half of a quick command's start. Only help and mistakes need their names.
    """
    verbs = [verb for verb in VERBS if verb.name.split()[0] in (words or ())]
    if not verbs or {"-h", "--help", "help"} & set(words or ()):
        verbs = list(VERBS)
    top = Parser(
        prog="cnprocctl",
        description="Inspect, test and control cnprocd, which runs hooks when processes end or start.",
        epilog="Exit status: 0 done, 1 no match or no such thing, 2 wrong usage, 69 the daemon does not run, 71 a "
        "system call failed, 77 not permitted, 78 the rules are invalid, 255 ssh failed. See cnprocctl(1).",
        allow_abbrev=False,  # `--rule NAME history` must not mean --rules
    )
    top.verbs = list(dict.fromkeys(verb.name.split()[0] for verb in VERBS))
    top.add_argument("--version", action="version", version=f"cnprocctl {__version__}")
    add(top, COMMON)
    below = top.add_subparsers(metavar="VERB", required=True)
    groups: dict[str, argparse._SubParsersAction[Parser]] = {}
    for verb in verbs:
        group, _, name = verb.name.rpartition(" ")
        if group and group not in groups:
            one = below.add_parser(group, help=GROUPS[group], description=f"{GROUPS[group]}.")
            one.verbs = [each.name.split()[1] for each in VERBS if each.name.startswith(f"{group} ")]
            groups[group] = one.add_subparsers(metavar="VERB", required=True)
        made = (groups[group] if group else below).add_parser(
            name, help=verb.help, description=verb.description or f"{verb.help}."
        )
        made.set_defaults(run=verb.run)
        add(made, verb.arguments)
        add(made.add_argument_group("options of every verb"), COMMON, suppress=True)
    return top


def parser_of(top: Parser, words: Sequence[str]) -> Parser:
    """Return the parser of a verb that `words` name. Exits with the usage of what is above it if there is none."""
    found = top
    for word in words:
        actions = [one for one in found._actions if isinstance(one, argparse._SubParsersAction)]
        if not actions:
            found.error(f'unexpected argument "{word}"')
        found._check_value(actions[0], word)
        found = actions[0].choices[word]
    return found


def add(
    to: argparse.ArgumentParser | argparse._ArgumentGroup, arguments: tuple[Argument, ...], *, suppress: bool = False
) -> None:
    """Add arguments. With `suppress` an option that is not given leaves the value that stood before the verb."""
    taken: set[str] = set()
    for one in arguments:
        if one.names[0] in taken:
            continue
        taken.add(one.names[0])
        options = one.options | ({"default": argparse.SUPPRESS} if suppress else {})
        to.add_argument(*one.names, **options)  # type: ignore[arg-type]  # a table cannot know each parameter's type
