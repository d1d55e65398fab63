"""Who a hook runs as: names to numbers, with the supplementary groups that a login would have.

Facts: getpwnam, getgrnam and getgrouplist may ask LDAP and take their time. The runner asks once per rule and load of
the rules, keeps the answer, and asks again after a failure.
"""

from __future__ import annotations

import grp
import os
import pwd

from cnprocd.launch.program import HookRefusedError
from cnprocd.spool.job import Identity


def resolve(user: str | int | None, group: str | int | None) -> Identity:
    """The identity for `user:` and `group:` of a rule; raises HookRefusedError when there is no such user or group."""
    entry = _entry(os.geteuid() if user is None else user)
    uid = entry.pw_uid if entry is not None else int(user or 0)
    gid = _gid(group) if group is not None else None
    if gid is None:
        if entry is None:
            raise HookRefusedError(f"user {uid} is not in the user database", "say which group: it should have, too")
        gid = os.getegid() if user is None else entry.pw_gid
    switch = user is not None or group is not None
    if not switch:
        groups = tuple(os.getgroups())
    elif entry is not None:
        groups = tuple(os.getgrouplist(entry.pw_name, gid))
    else:
        groups = (gid,)
    if os.geteuid() != 0 and (uid, gid) == (os.geteuid(), os.getegid()):
        switch = False  # an ordinary user may not call setgroups, and need not
    return Identity(
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
        raise HookRefusedError(f"there is no user {user!r}", "make the user, or correct user: in the rule") from None


def _gid(group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise HookRefusedError(f"there is no group {group!r}", "make the group, or correct group:") from None
