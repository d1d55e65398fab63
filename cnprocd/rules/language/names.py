"""Values that refer to something outside themselves: named lists, users and groups; and the patterns lists are made of.

Strategy: what a name means comes from a Context that the loader fills, so this stays pure. `$name` is expanded in place
and each entry is judged again where it is used, for what is right for an exe may be too long for a comm: the
kernel cuts comm at 15 bytes (TASK_COMM_LEN is 16 with its NUL). uid 4294967295 means "no user", so ids end before it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from cnprocd.rules.language.mistakes import MistakeError, mistake, nearest, shown
from cnprocd.rules.language.regex_cost import MOST_WAYS, ways
from cnprocd.rules.language.syntax import each, text
from cnprocd.rules.values import Pattern

COMM_BYTES = 15
# Entries that all uses of all lists may add up to: else a megabyte of rules, each with a list of a hundred thousand
# names, would be billions of patterns.
MOST_EXPANDED = 200_000
LONGEST_TEXT = 4096  # of a path (PATH_MAX), and of a command line as stat.py cuts it
HIGHEST_ID = 2**32 - 2
ACCEPT_PATTERN = 'text, a glob "ora_*", a regular expression "/^ora_/", "$list_name", or a list of these'


@dataclass(frozen=True, slots=True)
class Context:
    """What a value may refer to outside itself: the lists of all rule files, and the machine's users and groups.

    `lists` holds the texts of each list; `user` and `group` turn a name into an id, or None when it does not exist.
    """

    lists: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    user: Callable[[str], int | None] = lambda name: None
    group: Callable[[str], int | None] = lambda name: None
    expanded: list[int] = field(default_factory=lambda: [0], compare=False)  # one number: the entries used so far


def _listed(reference: str, context: Context) -> tuple[str, ...]:
    name = reference[1:]
    if name not in context.lists:
        known = ", ".join(f"${known}" for known in sorted(context.lists)) or "none is defined under lists:"
        raise mistake(f'there is no list named "{name}"', f"one of the lists: {known}", nearest(name, context.lists))
    context.expanded[0] += len(context.lists[name])
    if context.expanded[0] > MOST_EXPANDED:
        raise mistake(
            f"with {reference} the lists that are used have more than {MOST_EXPANDED} entries in all",
            "shorter lists, used less often",
            "write globs, or one rule with the list in place of many",
        )
    return context.lists[name]


# --- patterns

_GLOB_TOKEN = re.compile(r"\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)
AttributeKind = Literal["comm", "path", "text"]


def pattern(value: object, kind: AttributeKind = "text") -> Pattern:
    """One pattern. `kind` adds what is known of the attribute: a comm has at most 15 bytes, a path starts with "/"."""
    raw = text(value, ACCEPT_PATTERN)
    ends = ("/",) if kind != "path" else ("/", "/i")
    if len(raw) > 2 and raw.startswith("/") and raw.endswith(("/", "/i")) and raw != "//i":
        if kind == "path" and not raw.endswith(ends[0]):
            raise mistake(
                f"{shown(raw)} may be a path or a regular expression with the flag i",
                ACCEPT_PATTERN,
                f'write "/(?i){raw[1:-2]}/" for the expression, or "[/]{raw[1:]}" for the path',
            )
        return _regex(raw, COMM_BYTES if kind == "comm" else LONGEST_TEXT)
    if raw.startswith("$"):
        raise mistake(
            f"{shown(raw)}: a list cannot be used here", ACCEPT_PATTERN, 'a text that starts with $: "[$]..."'
        )
    parsed = Pattern("glob", _checked_glob(raw)) if re.search(r"[*?\[]", raw) else Pattern("literal", raw)
    if kind == "comm":
        _refuse_long_comm(parsed)
    return parsed


def _regex(raw: str, longest: int) -> Pattern:
    source = "(?i)" + raw[1:-2] if raw.endswith("/i") else raw[1:-1]
    try:
        with warnings.catch_warnings():
            # "Possible nested set" and the like: a pattern that Python reads otherwise than most people do.
            warnings.simplefilter("error")
            re.compile(source)
            re.compile(source.encode())  # comm is bytes to the kernel; the matcher may work on either
    except (re.error, Warning, OverflowError, RecursionError, ValueError) as error:
        raise mistake(f"the regular expression {shown(raw)} does not compile: {error}", ACCEPT_PATTERN) from error
    if ways(source, longest) > MOST_WAYS:
        raise mistake(
            f"the regular expression {shown(raw)} could hold the daemon for minutes: there are too many ways"
            f" to read a text of {longest} characters with it",
            "few repeats, none within another",
            'begin it with ^, or write a glob, which is always cheap: "*java*server*"',
        )
    return Pattern("regex", source)


def _checked_glob(raw: str) -> str:
    if "[" in _GLOB_TOKEN.findall(raw):
        raise mistake(f'{shown(raw)} has a "[" without its "]"', ACCEPT_PATTERN, 'write "[[]" for the character itself')
    return raw


def _refuse_long_comm(parsed: Pattern) -> None:
    """The kernel cuts comm at 15 bytes, so a pattern that needs more can never match."""
    tokens = _GLOB_TOKEN.findall(parsed.text) if parsed.kind == "glob" else [parsed.text]
    shortest = sum(len(t.encode()) if len(t) == 1 or parsed.kind == "literal" else 1 for t in tokens if t != "*")
    if shortest <= COMM_BYTES:
        return
    raise mistake(
        f"{shown(parsed.text)} can never match: it needs {shortest} bytes, comm is cut at {COMM_BYTES} (TASK_COMM_LEN)",
        f"at most {COMM_BYTES} bytes",
        _short_comm_advice(parsed),
    )


def _short_comm_advice(parsed: Pattern) -> str:
    if parsed.kind == "literal":
        return f'write "{_cut(parsed.text)}", or match on exe or cmdline'
    start = re.split(r"[*?\[]", parsed.text, maxsplit=1)[0]
    if not start:
        return "match on exe or cmdline"
    return f'write "{_cut(start) if len(start.encode()) >= COMM_BYTES else start + "*"}", or match on exe or cmdline'


def _cut(name: str) -> str:
    return name.encode()[:COMM_BYTES].decode(errors="ignore")


def patterns(value: object, context: Context, kind: AttributeKind) -> tuple[Pattern, ...]:
    """A pattern, a list of them, or `$name` for a named list, expanded in place; duplicates are dropped."""

    def one(item: object) -> tuple[Pattern, ...]:
        if not (isinstance(item, str) and item.startswith("$")):
            return (pattern(item, kind),)
        return tuple(_of_list(item, entry, kind) for entry in _listed(item, context))

    found = [p for group in each(value, one, ACCEPT_PATTERN) for p in group]
    return tuple(dict.fromkeys(found))


def _of_list(name: str, entry: str, kind: AttributeKind) -> Pattern:
    try:
        return pattern(entry, kind)
    except MistakeError as error:
        said = (replace(m, message=f"in list {name}: {m.message}") for m in error.mistakes)
        raise MistakeError(*said) from error


# --- people


def ids(value: object, context: Context, sort: Literal["user", "group"]) -> tuple[int, ...]:
    """User or group ids from ids, names, `$list` or a list of these; names are looked up through the context."""
    accepted = f"a {sort} name, a number, or a list of these"

    def one(item: object) -> tuple[int, ...]:
        if isinstance(item, str) and item.startswith("$"):
            return tuple(_identity(entry, context, sort, accepted) for entry in _listed(item, context))
        return (_identity(item, context, sort, accepted),)

    return tuple(dict.fromkeys(number for group in each(value, one, accepted) for number in group))


def principal(value: object, context: Context, sort: Literal["user", "group"]) -> str | int:
    """The user or group that a hook runs as: kept as written, but it must exist when the rules are loaded."""
    number = _identity(value, context, sort, f"a {sort} name or a number")
    return value if isinstance(value, str) and not value.isdecimal() else number


def _identity(value: object, context: Context, sort: Literal["user", "group"], accepted: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value, re.ASCII):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value <= HIGHEST_ID:
            return int(value)
        raise mistake(f"{value} is not a {sort} id: they are 0 to {HIGHEST_ID}", accepted)
    if not isinstance(value, str) or not value or "\0" in value:
        raise mistake(f"{shown(value)} is not a {sort}", accepted)
    lookup = context.user if sort == "user" else context.group
    number = lookup(value)
    if number is None:
        table = "passwd" if sort == "user" else "group"
        hint = f'create it, or write its number; "getent {table}" shows those that exist'
        raise mistake(f'there is no {sort} named "{value}" on this machine', accepted, hint)
    return number
