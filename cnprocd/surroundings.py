"""What this machine or container withholds from the daemon, in words for the log and for `cnprocctl doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from cnprocd.process.host_view import HOST_CGROUP, cgroup_roots, sees_host_files


@dataclass(frozen=True, slots=True)
class Missing:
    """`feature` is a stable word, `what` states what is missing and its consequence, `fix` what to do."""

    feature: str
    what: str
    fix: str = ""

    @property
    def sentence(self) -> str:
        """Return both as one line."""
        return f"{self.what}; {self.fix}" if self.fix else self.what


def missing_records(reason: str) -> Missing:
    """Return that there are no exit records. `reason` is that of taskstats."""
    consequence = "rules need more events, and memory, CPU time and the names of short-lived processes can be unknown"
    fix = "mount the host's /sys at /sys, read-only" if "/sys" in reason else ""
    return Missing("exit_records", f"no exit records: {reason}: {consequence}", fix)


def missing_of_host() -> list[Missing]:
    """Return what the namespaces of a container hide. Nothing on the host."""
    found = []
    if any(root.own is None for root in cgroup_roots()):
        what = "the cgroup paths of neighbouring containers are unknown: the host's cgroup hierarchy is not mounted"
        found.append(Missing("cgroup_paths", what, f"mount the host's /sys/fs/cgroup at {HOST_CGROUP}, read-only"))
    if not sees_host_files():
        what = "in a container: `exe` is read from /proc when a process starts, and is unknown if it ended by then"
        fix = "name other keys in rules about short-lived programs: comm, container, unit, user"
        found.append(Missing("host_files", what, fix))
    return found
