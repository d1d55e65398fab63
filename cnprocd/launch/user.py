"""Resolve a hook's `user:` and `group:` to numbers, with the supplementary groups that a login would have.

getpwnam(3), getgrnam(3) and getgrouplist(3) may ask LDAP and block, so the event loop asks through names.Names.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable

from cnprocd.launch.program import HookRefusedError
from cnprocd.launch.request import HookUser

# Of an attempt that has started: the runner knows its user.
UNRESOLVED = HookUser(uid=-1, gid=-1, groups=(), name="", home="", shell="", switch=False)

ResolveUser = Callable[["str | int | None", "str | int | None"], HookUser]
"""resolve_user, or what does it with a bound: then it raises OSError if there is no answer now."""


def resolve_user(user: str | int | None, group: str | int | None) -> HookUser:
    """Return the user for `user:` and `group:` of a rule. Raises HookRefusedError if one of them does not exist."""
    entry = _entry(os.geteuid() if user is None else user)
    uid = entry.pw_uid if entry is not None else int(user or 0)
    gid = _gid(group) if group is not None else None
    if gid is None:
        if entry is None:
            raise HookRefusedError(f"user {uid} is not in the user database", "set group: in the rule as well")
        gid = os.getegid() if user is None else entry.pw_gid
    switch = user is not None or group is not None
    if not switch:
        groups = tuple(os.getgroups())
    elif entry is not None:
        groups = tuple(os.getgrouplist(entry.pw_name, gid))
    else:
        groups = (gid,)
    if os.geteuid() != 0 and (uid, gid) == (os.geteuid(), os.getegid()):
        switch = False  # an ordinary user may not call setgroups(2), and does not need to
    return HookUser(
        uid=uid,
        gid=gid,
        groups=groups,
        name=entry.pw_name if entry is not None else str(uid),
        home=entry.pw_dir if entry is not None else "/",
        shell=(entry.pw_shell if entry is not None else "") or "/bin/sh",
        switch=switch,
    )


def _entry(user: str | int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError:
        if isinstance(user, int):
            return None
        raise HookRefusedError(f"unknown user {user!r}", "create the user, or correct user: in the rule") from None


def _gid(group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise HookRefusedError(f"unknown group {group!r}", "create the group, or correct group: in the rule") from None
