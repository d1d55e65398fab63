"""The exceptions that are reported to the user. PURE.

Each error has a message, a hint, and the exit status of the process if the error ends it. Nothing here prints or exits:
`cli/` does both. Exit statuses are those of sysexits.h, which systemd names in its logs.
"""

from __future__ import annotations

EX_OK = 0
EX_NO = 1  # cnprocctl: the answer is no, or there is no such thing
EX_UNAVAILABLE = 69  # the kernel has no proc connector, or it sends no acknowledgement
EX_SOFTWARE = 70  # a bug in cnprocd
EX_OSERR = 71  # the system refused something it normally grants
EX_TEMPFAIL = 75  # another cnprocd holds the state or runtime directory
EX_NOPERM = 77  # a capability or permission is missing
EX_CONFIG = 78  # a rule file or an option is wrong


class CnprocdError(Exception):
    """A failure, with a hint.

    `what` is one line: "cannot VERB OBJECT: CAUSE". `hint` states what the user can do. Neither ends with a full stop.
    """

    exit_status = EX_OSERR

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}: {self.hint}" if self.hint else self.what

    def render(self, prefix: str = "") -> str:
        """Return the error as text for a terminal. `prefix` names the program, such as "cnprocctl: "."""
        return f"{prefix}{self}"


class NotFoundError(CnprocdError):
    """There is no rule, job or process of this name or number."""

    exit_status = EX_NO


class ConfigError(CnprocdError):
    """A rule file, drop-in or option cannot be used."""

    exit_status = EX_CONFIG


class PrivilegeError(CnprocdError):
    """The process lacks a capability (CAP_NET_ADMIN) or the permission for a file."""

    exit_status = EX_NOPERM


class ConnectorUnavailableError(CnprocdError):
    """The kernel lacks CONFIG_PROC_EVENTS, or ignores requests from this PID or user namespace."""

    exit_status = EX_UNAVAILABLE


class StateError(CnprocdError):
    """The state or runtime directory, or the spool inside it, cannot be used."""

    exit_status = EX_OSERR
