"""One exception family for everything a person must hear about.

Each error carries two sentences and a status: what failed (on what object, and why), what to do about it, and the
exit status a process should end with when nothing can be done. Nothing here prints or exits: `cli/` does both.
Exit statuses are those of sysexits.h, which systemd names in its logs.
"""

from __future__ import annotations

EX_OK = 0
EX_UNAVAILABLE = 69  # the kernel has no proc connector, or it does not answer us
EX_SOFTWARE = 70  # a bug in cnprocd
EX_OSERR = 71  # the system refused something it normally grants
EX_NOPERM = 77  # CAP_NET_ADMIN is missing
EX_CONFIG = 78  # a rule file or an option is wrong


class CnprocdError(Exception):
    """A failure told as a fact plus a hint.

    `what` names the object and the reason in one line; `hint` says what the reader can do. Both end without a full
    stop, so that they can be joined.
    """

    exit_status = EX_OSERR

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}: {self.hint}" if self.hint else self.what


class ConfigError(CnprocdError):
    """A rule file, drop-in or option cannot be used. `problems` lists every mistake found, not only the first."""

    exit_status = EX_CONFIG


class PrivilegeError(CnprocdError):
    """The process lacks a capability (CAP_NET_ADMIN)."""

    exit_status = EX_NOPERM


class ConnectorUnavailableError(CnprocdError):
    """The kernel lacks CONFIG_PROC_EVENTS, or ignores us because of our PID or user namespace."""

    exit_status = EX_UNAVAILABLE


class StateError(CnprocdError):
    """The state or runtime directory, or the spool inside it, cannot be used."""

    exit_status = EX_OSERR
