"""Parse patterns, users and groups: the values that depend on named lists or on the machine. PURE.

A Context, which the loader fills, resolves the names, so this module is pure. `$name` is expanded in place and each
entry is checked where it is used: a text that is valid for exe may be too long for comm, which the kernel cuts at 15
bytes (TASK_COMM_LEN is 16, with the NUL). The uid 4294967295 means "no user", so the highest id is one below it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from cnprocd.process.model import NO_LOGIN
from cnprocd.rules.language.regex_cost import MOST_WAYS, regex_cost
from cnprocd.rules.language.syntax import each, text
from cnprocd.rules.language.value_problem import InvalidValueError, did_you_mean, invalid, shown
from cnprocd.rules.ruleset import LOGIN_UNSET
from cnprocd.rules.values import Pattern

COMM_BYTES = 15
# The total of the entries of all uses of all lists. Without it, a megabyte of rules that use one list of a hundred
# thousand names would become billions of patterns.
MOST_EXPANDED = 200_000
LONGEST_TEXT = 4096  # of a path (PATH_MAX), and of a command line (stat.py cuts it there)
HIGHEST_ID = 2**32 - 2
ACCEPT_PATTERN = 'text, a glob "ora_*", a regular expression "/^ora_/", "$list_name", or a list of these'


@dataclass(frozen=True, slots=True)
class Context:
    """What names refer to: the lists of all rule files, and the users and groups of the machine.

    `lists` has the entries of each list. `user` and `group` return the id of a name, or None if it does not exist.
    """

    lists: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    user: Callable[[str], int | None] = lambda name: None
    group: Callable[[str], int | None] = lambda name: None
    expanded: list[int] = field(
        default_factory=lambda: [0], compare=False
    )  # one number: the entries of all uses so far
    missing: set[tuple[str, str]] = field(default_factory=set, compare=False)  # kind and name of those without an id


def _listed(reference: str, context: Context) -> tuple[str, ...]:
    name = reference[1:]
    if name not in context.lists:
        known = ", ".join(f"${known}" for known in sorted(context.lists)) or "(no list is defined)"
        raise invalid(
            f'there is no list named "{name}"', f"one of the lists: {known}", did_you_mean(name, context.lists)
        )
    context.expanded[0] += len(context.lists[name])
    if context.expanded[0] > MOST_EXPANDED:
        raise invalid(
            f"with {reference}, the lists in use have more than {MOST_EXPANDED} entries in total",
            "shorter lists, used less often",
            "use globs, or one rule with the list instead of many",
        )
    return context.lists[name]


# Patterns.

_GLOB_TOKEN = re.compile(r"\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)
AttributeKind = Literal["comm", "path", "text"]


def pattern(value: object, kind: AttributeKind = "text") -> Pattern:
    """Return one pattern. `kind` is that of the attribute: a comm has at most 15 bytes, a path starts with "/"."""
    raw = text(value, ACCEPT_PATTERN)
    ends = ("/",) if kind != "path" else ("/", "/i")
    if len(raw) > 2 and raw.startswith("/") and raw.endswith(("/", "/i")) and raw != "//i":
        if kind == "path" and not raw.endswith(ends[0]):
            raise invalid(
                f"{shown(raw)} is ambiguous: a path, or a regular expression with the flag i",
                ACCEPT_PATTERN,
                f'write "/(?i){raw[1:-2]}/" for the expression, or "[/]{raw[1:]}" for the path',
            )
        return _regex(raw, COMM_BYTES if kind == "comm" else LONGEST_TEXT)
    if raw.startswith("$"):
        raise invalid(
            f"a list cannot be used here: {shown(raw)}", ACCEPT_PATTERN, 'write "[$]..." for a text that starts with $'
        )
    parsed = Pattern("glob", _checked_glob(raw)) if re.search(r"[*?\[]", raw) else Pattern("literal", raw)
    if kind == "comm":
        _refuse_long_comm(parsed)
    return parsed


def _regex(raw: str, longest: int) -> Pattern:
    source = "(?i)" + raw[1:-2] if raw.endswith("/i") else raw[1:-1]
    try:
        with warnings.catch_warnings():
            # For example "Possible nested set": Python does not read such a pattern as most people do.
            warnings.simplefilter("error")
            re.compile(source)
            re.compile(source.encode())  # comm is bytes in the kernel: the matcher may use either form
    except (re.error, Warning, OverflowError, RecursionError, ValueError) as error:
        raise invalid(f"invalid regular expression {shown(raw)}: {error}", ACCEPT_PATTERN) from error
    if regex_cost(source, longest) > MOST_WAYS:
        raise invalid(
            f"the regular expression {shown(raw)} is too expensive: a text of {longest} characters can take minutes",
            "few repetitions, none nested",
            'begin it with ^, or write a glob, which is always cheap: "*java*server*"',
        )
    return Pattern("regex", source)


def _checked_glob(raw: str) -> str:
    if "[" in _GLOB_TOKEN.findall(raw):
        raise invalid(f'unmatched "[" in {shown(raw)}', ACCEPT_PATTERN, 'write "[[]" for the character itself')
    return raw


def _refuse_long_comm(parsed: Pattern) -> None:
    """Reject a pattern that needs more than 15 bytes: the kernel cuts comm there, so it never matches."""
    tokens = _GLOB_TOKEN.findall(parsed.text) if parsed.kind == "glob" else [parsed.text]
    shortest = sum(len(t.encode()) if len(t) == 1 or parsed.kind == "literal" else 1 for t in tokens if t != "*")
    if shortest <= COMM_BYTES:
        return
    raise invalid(
        f"{shown(parsed.text)} never matches: it needs {shortest} bytes, comm is cut at {COMM_BYTES} (TASK_COMM_LEN)",
        f"at most {COMM_BYTES} bytes",
        _short_comm_advice(parsed),
    )


def _short_comm_advice(parsed: Pattern) -> str:
    if parsed.kind == "literal":
        return f'write "{_cut(parsed.text)}", or exe: "*/{parsed.text}"'
    start = re.split(r"[*?\[]", parsed.text, maxsplit=1)[0]
    by_path = f'exe: "*/{parsed.text}"' if parsed.kind == "glob" else "match on exe"
    if not start:
        return by_path
    return f'write "{_cut(start) if len(start.encode()) >= COMM_BYTES else start + "*"}", or {by_path}'


def _cut(name: str) -> str:
    return name.encode()[:COMM_BYTES].decode(errors="ignore")


def patterns(value: object, context: Context, kind: AttributeKind) -> tuple[Pattern, ...]:
    """Return the patterns of one pattern, of a list, or of a named list `$name`, without duplicates."""

    def one(item: object) -> tuple[Pattern, ...]:
        if not (isinstance(item, str) and item.startswith("$")):
            return (pattern(item, kind),)
        return tuple(_of_list(item, entry, kind) for entry in _listed(item, context))

    found = [p for group in each(value, one, ACCEPT_PATTERN) for p in group]
    return tuple(dict.fromkeys(found))


def _of_list(name: str, entry: str, kind: AttributeKind) -> Pattern:
    try:
        return pattern(entry, kind)
    except InvalidValueError as error:
        raise InvalidValueError(
            *(replace(m, message=f"in list {name}: {m.message}") for m in error.problems)
        ) from error


# Users and groups.


def ids(value: object, context: Context, kind: Literal["user", "group"]) -> tuple[int | str, ...]:
    """Return user or group ids of ids, names, `$list` or a list of these. A name that has no id now stays a name."""
    accepted = f"a {kind} name, a number, or a list of these"

    def one(item: object) -> tuple[int | str, ...]:
        if isinstance(item, str) and item.startswith("$"):
            return tuple(_identity(entry, context, kind, accepted) for entry in _listed(item, context))
        return (_identity(item, context, kind, accepted),)

    return tuple(dict.fromkeys(number for group in each(value, one, accepted) for number in group))


def login_ids(value: object, context: Context) -> tuple[int | str, ...]:
    """Return login uids as `ids` does. The word `unset` stands for a process outside any login session."""
    words = [value] if not isinstance(value, list) else value
    rest = [word for word in words if word != LOGIN_UNSET]
    unset: tuple[int | str, ...] = (NO_LOGIN,) if len(rest) < len(words) else ()
    return (*unset, *(ids(rest, context, "user") if rest or not unset else ()))


def principal(value: object, context: Context, kind: Literal["user", "group"]) -> str | int:
    """Return the user or group that a hook runs as, as written."""
    number = _identity(value, context, kind, f"a {kind} name or a number")
    return value if isinstance(value, str) and not value.isdecimal() else number


def _identity(value: object, context: Context, kind: Literal["user", "group"], accepted: str) -> int | str:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value, re.ASCII):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value <= HIGHEST_ID:
            return int(value)
        raise invalid(f"invalid {kind} ID: {value} is not within 0 to {HIGHEST_ID}", accepted)
    if not isinstance(value, str) or not value or "\0" in value:
        raise invalid(f"invalid {kind}: {shown(value)}", accepted)
    number = (context.user if kind == "user" else context.group)(value)
    if number is None:
        context.missing.add((kind, value))
        return value
    return number
