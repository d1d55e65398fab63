"""Check rules against this machine: the programs that they name, and whether the daemon can read the rule files.

launch/program.py decides about a program, as for the runner. Whether the daemon's user can read a file is tried in a
child process with that user's ids, so that modes, access lists and mount options all count.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cnprocd.errors import CnprocdError
from cnprocd.json_value import as_list, as_str, parse_json
from cnprocd.launch.program import HookRefusedError, open_program
from cnprocd.process.kernel_log import DEVICE
from cnprocd.rules.language.impossible import without_values
from cnprocd.rules.language.lint import LintWarning, patterns_of, place_of
from cnprocd.rules.needs import Need, needs_of
from cnprocd.rules.rule_files import DROPIN_DIRS, rule_files
from cnprocd.rules.ruleset import Rule

SERVICE_USER = "cnprocd"
_SYSTEM = ("/etc/", "/run/", "/usr/")


class BadHook(NamedTuple):
    """A rule whose hook cannot run here, and why."""

    rule: Rule
    error: CnprocdError


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file or directory of the rules that the daemon's user cannot read. `at` is the part of its path that denies."""

    path: Path
    at: Path

    @property
    def message(self) -> str:
        """Return the problem as text."""
        denied = f" because of {self.at}" if self.at != self.path else ""
        return f"the user {SERVICE_USER} cannot read {self.path}{denied}"

    @property
    def hint(self) -> str:
        """Return how to fix it. The modes of a user's directory must not change for that."""
        if self.at.is_dir() and not f"{self.at}/".startswith(_SYSTEM):
            return "move the rule files to /etc/cnprocd"
        return f"chgrp {SERVICE_USER} {self.at} && chmod {'g+rx' if self.at.is_dir() else 'g+r'} {self.at}"


def unavailable_here(rules: Iterable[Rule]) -> list[LintWarning]:
    """Return warnings of enabled rules about programs and attributes that they name and that this machine has not."""
    return [warning for rule in rules if rule.enabled for warning in (*_not_executed(rule), *_not_of_kernel(rule))]


def _not_executed(rule: Rule) -> Iterator[LintWarning]:
    """Yield the literal paths that are no process's executable: symbolic links and scripts."""
    for at, pattern in patterns_of(rule.match, ("exe",)):
        path = pattern.text
        if without_values("exe", pattern) is not None:
            continue  # lint warns about it
        real = os.path.realpath(path) if pattern.kind == "literal" and os.path.exists(path) else path
        if real != path:
            message = f"exe {path} never matches: it goes over a symbolic link"
            yield LintWarning(rule.name, at, "symlink", message, f'write "{real}"')
        elif pattern.kind == "literal" and _is_script(path):
            message = f"exe {path} never matches: it is a script, and the process executes its interpreter"
            yield LintWarning(
                rule.name, at, "script", message, f'match on cmdline: "*{path}*", or on comm, and on user'
            )


def _is_script(path: str) -> bool:
    with contextlib.suppress(OSError), open(path, "rb", opener=_without_waiting) as file:
        return file.read(2) == b"#!"
    return False


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _not_of_kernel(rule: Rule) -> Iterator[LintWarning]:
    for need, lines in needs_of(rule).items():
        reason = _MISSING_HERE[need]() if need in _MISSING_HERE else None
        if reason is not None:
            places = (at for line in lines if (at := place_of(line)) is not None)
            hint = "use another machine for this rule, or remove it"
            yield LintWarning(rule.name, next(places, ("name",)), "unavailable", reason, hint)


def _no_exit_records() -> str | None:
    release = os.uname().release
    version = tuple(int(part) for part in re.findall("[0-9]+", release)[:2])
    if version >= (5, 19):
        return None
    return f"Linux {release} accounts no memory and CPU time of whole processes (5.19 does)"


def _no_kernel_log() -> str | None:
    return None if os.path.exists(DEVICE) else f"oom_killed is unknown here: there is no {DEVICE}"


def _no_loginuid() -> str | None:
    found = os.path.exists("/proc/self/loginuid")
    return None if found else "loginuid is unknown here: the kernel is built without CONFIG_AUDIT"


_MISSING_HERE: Mapping[Need, Callable[[], str | None]] = {
    "usage": _no_exit_records,
    "oom": _no_kernel_log,
    "loginuid": _no_loginuid,
}


def program_path(rule: Rule) -> str | None:
    """Return the path of the program of a rule's hook, or None without a hook."""
    return None if rule.run is None else "".join(str(part) for part in rule.run.command[0].parts)


def bad_hooks(rules: Iterable[Rule]) -> list[BadHook]:
    """Return the enabled rules whose hook cannot run on this machine."""
    return [BadHook(rule, error) for rule in rules if rule.enabled for error in _refusal(program_path(rule))]


def _refusal(path: str | None) -> list[CnprocdError]:
    if path is None:
        return []
    try:
        fd = open_program(path).fd
        with contextlib.closing(os.fdopen(fd, "rb")) as program:
            if not program.read(4).startswith((b"#!", b"\x7fELF")) and not _has_other_formats():
                what = f"{path} is neither a program nor a script with a #! line"
                return [HookRefusedError(what, "begin a script with a line such as #!/bin/sh")]
    except HookRefusedError as error:
        if os.geteuid() != 0 and isinstance(error.__cause__, PermissionError):
            return []  # only root can check
        error.hint = error.hint or "install the program, or fix the rule"
        return [error]
    except OSError:
        return []  # no descriptor or memory is left: nothing is known about the program
    return []


def _has_other_formats() -> bool:
    """Whether the kernel may run files that are neither ELF nor scripts (binfmt_misc)."""
    try:
        return bool(set(os.listdir("/proc/sys/fs/binfmt_misc")) - {"register", "status"})
    except OSError:
        return False


def unreadable_rule_files(rules: Path | None) -> list[Unreadable]:
    """Return the rule files that the daemon's user cannot read; none if that user does not exist here.

    Only root can find out: without root the result is empty. Raises CnprocdError if root may not change its ids here.
    """
    directories = DROPIN_DIRS if rules is None else ()  # the daemon lists them
    paths = [path for path in (*rule_files(rules), *directories) if os.path.lexists(path)]
    try:
        entry = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return []
    if os.geteuid() != 0 or entry.pw_uid == 0:
        return []
    return [Unreadable(path, at) for path, at in zip(paths, _denials(paths, entry), strict=True) if at is not None]


def _denials(paths: Sequence[Path], user: pwd.struct_passwd) -> list[Path | None]:
    """Return for each path the part of it that denies access to `user`, or None. Raises CnprocdError."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.close(reading)
            os.setgroups(os.getgrouplist(user.pw_name, user.pw_gid))
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            with os.fdopen(writing, "w") as pipe:
                json.dump([_denial(path) for path in paths], pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    if not answer:
        raise CnprocdError(f"cannot check the rule files as the user {user.pw_name}", "run it as root on the host")
    return [None if one is None else Path(as_str(one)) for one in as_list(parse_json(answer))]


def _denial(path: Path) -> str | None:
    """Return the first part of a path that this process cannot search, or the path if it cannot be read."""
    whole = path.absolute()
    for directory in reversed(whole.parents):
        if not os.access(directory, os.X_OK):
            return str(directory)
    return None if os.access(whole, os.R_OK | (os.X_OK if whole.is_dir() else 0)) else str(whole)
