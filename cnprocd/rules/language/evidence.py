"""Whether a process of any user could satisfy a match: one whose user and group the match does not name. PURE.

A user chooses the name, arguments and end of its processes, and the programs below its own directories. It does not
choose its user and group, and not the unit and control group: login sessions, service managers of users and crontabs
have their own. Its related processes are its own or, as the parent of an orphan and as an ancestor of each process,
root's init. The login uid is no proof: a process of any user that is outside a login session can set its own, without
privilege, to any value (kernel/audit.c audit_set_loginuid_perm). So for every condition two questions are answered: can
such a process satisfy it, and can it fail it?

There are no false warnings: if it is not certain that a pattern accepts what a user can have, it counts as evidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from cnprocd.rules.predicate import text_test
from cnprocd.rules.ruleset import Condition, ProcessCondition, given_keys
from cnprocd.rules.values import Pattern

AnyCondition = Condition | ProcessCondition

PROVING_KEYS = ("user", "group", "unit", "cgroup", "exe")
_ANY_UID = 1729401  # that no rule names: patterns with this number accept the processes of any user
_OWN_DIRECTORIES = ("/tmp/", "/var/tmp/", "/dev/shm/", f"/home/u{_ANY_UID}/", f"/run/user/{_ANY_UID}/")  # noqa: S108  # no file is made


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A process that any user can have, or that can be above it. None: the user chooses it, or it is unknown."""

    unit: str
    cgroup: str
    chooses_below: bool = False  # the control group is delegated: the user makes others below it
    is_init: bool = False


_SLICE = f"/user.slice/user-{_ANY_UID}.slice"
_OWN = (
    _Suspect(f"user@{_ANY_UID}.service", f"{_SLICE}/user@{_ANY_UID}.service/", chooses_below=True),
    _Suspect(f"session-{_ANY_UID}.scope", f"{_SLICE}/session-{_ANY_UID}.scope"),
    *(_Suspect(name, f"/system.slice/{name}") for name in ("cron.service", "crond.service", "atd.service")),
)
_INIT = _Suspect("init.scope", "/init.scope", is_init=True)
_INIT_NAMES = ("systemd", "init")
_INIT_FILES = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/usr/sbin/init", "/sbin/init")


def any_user_can_satisfy(condition: AnyCondition) -> bool:
    """Return whether it is certain that a process of any user can satisfy `condition`."""
    return any(_can_satisfy(condition, suspect) for suspect in _OWN)


def _can_satisfy(condition: AnyCondition, suspect: _Suspect) -> bool:
    return (
        all(_key_can_hold(condition, key, suspect) for key in given_keys(condition))
        and all(_can_satisfy(part, suspect) for part in condition.all)
        and (not condition.any or any(_can_satisfy(part, suspect) for part in condition.any))
        and all(_can_fail(part, suspect) for part in condition.not_)
    )


def _can_fail(condition: AnyCondition, suspect: _Suspect) -> bool:
    return (
        any(_key_can_fail(condition, key, suspect) for key in given_keys(condition))
        or any(_can_fail(part, suspect) for part in condition.all)
        or (bool(condition.any) and all(_can_fail(part, suspect) for part in condition.any))
        or any(_can_satisfy(part, suspect) for part in condition.not_)
    )


def _key_can_hold(condition: AnyCondition, key: str, suspect: _Suspect) -> bool:
    if key == "parent":
        assert condition.parent is not None
        return not suspect.is_init and any(_can_satisfy(condition.parent, one) for one in (suspect, _INIT))
    if key == "ancestor":
        assert condition.ancestor is not None
        return not suspect.is_init and any(_can_satisfy(condition.ancestor, one) for one in (*_OWN, _INIT))
    if key in ("user", "group"):
        return suspect.is_init and 0 in getattr(condition, key)
    if key in ("unit", "cgroup", "exe", "comm"):
        return _text_can_match(getattr(condition, key), key, suspect)
    return True


def _key_can_fail(condition: AnyCondition, key: str, suspect: _Suspect) -> bool:
    if key in ("unit", "cgroup"):
        return not text_test(getattr(condition, key))(getattr(suspect, key))
    return key not in ("not_", "any", "all")


def _text_can_match(patterns: tuple[Pattern, ...], key: str, suspect: _Suspect) -> bool:
    if suspect.is_init:
        texts = {"exe": _INIT_FILES, "comm": _INIT_NAMES, "unit": (suspect.unit,), "cgroup": (suspect.cgroup,)}[key]
        return any(map(text_test(patterns), texts))
    if key == "exe":
        return any(_accepts_below(pattern, above) for pattern in patterns for above in _OWN_DIRECTORIES)
    if key == "cgroup" and suspect.chooses_below:
        return any(_accepts_below(pattern, suspect.cgroup) for pattern in patterns)
    return key == "comm" or text_test(patterns)(getattr(suspect, key))


def _accepts_below(pattern: Pattern, directory: str) -> bool:
    """Return whether a pattern accepts a text that begins with `directory`. A literal names one file: no."""
    if pattern.kind == "glob":
        return any(fnmatchcase(directory, pattern.text[:end]) for end in range(1, len(pattern.text) + 1))
    if pattern.kind == "regex":  # one that is not anchored is found anywhere
        is_anchored = any(mark in pattern.text for mark in ("^", "\\A", "(?<"))
        return not is_anchored or text_test((pattern,))(f"{directory}x")
    return False
