"""An option or argument of a verb, and the options that describe an event: for explain and test."""

from __future__ import annotations

from dataclasses import dataclass

from cnprocd.cli.quantities import number, octets, seconds

KINDS = ("exit", "nonzero_exit", "fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "coredump")


@dataclass(frozen=True)
class Argument:
    """One option or argument: what add_argument() takes. The last name is the long one."""

    names: tuple[str, ...]
    options: dict[str, object]


def arg(*names: str, **options: object) -> Argument:
    """Return a row of the table."""
    return Argument(names, options)


EVENT = (
    arg("--pid", type=number, metavar="PID", help="Process ID; alone it names a process that runs now"),
    arg("--kind", choices=KINDS, metavar="KIND", help="Kind of the event (exit)"),
    arg("--comm", metavar="NAME", help="Command name of the process"),
    arg("--exit-code", type=int, metavar="N", help="Exit code of the process"),
    arg("--signal", metavar="NAME", help="Signal that killed the process: SIGKILL, KILL or 9"),
    arg(
        "--status",
        type=int,
        metavar="N",
        help="Wait status as waitpid(2) returns it: 256 times the exit code, or the number of the signal",
    ),
    arg("--core", action="store_true", help="The process dumped core"),
    arg("--oom-killed", action="store_true", help="The kernel's OOM killer ended the process (with SIGKILL)"),
    arg("--lost", action="store_true", help="The exit event was lost, so the status is unknown (recovered)"),
    arg("--user", metavar="NAME", help="User of the process: name or uid"),
    arg("--euid", metavar="NAME", help="Effective user of the process: name or uid"),
    arg("--loginuid", metavar="NAME", help="User of the login session: name, uid, or unset"),
    arg("--group", metavar="NAME", help="Group of the process: name or gid"),
    arg("--exe", metavar="PATH", help="Executable of the process"),
    arg("--exe-claimed", metavar="PATH", help="Executable as the process sees it, for example in its container"),
    arg("--cmdline", metavar="TEXT", help="Arguments of the process, joined by spaces"),
    arg("--unit", metavar="UNIT", help="systemd unit of the process"),
    arg("--user-unit", metavar="UNIT", help="Unit of the user's own service manager"),
    arg("--container", metavar="NAME", help="Container of the process: name or id"),
    arg("--pod-uid", metavar="UID", help="Kubernetes pod of the process"),
    arg("--cgroup", metavar="PATH", help="Control group of the process"),
    arg("--parent", metavar="NAME", help="Command name of the parent process"),
    arg("--ancestor", action="append", default=[], metavar="NAME", help="Command name of the next process upwards"),
    arg("--lifetime", type=seconds, metavar="TIME", help="Time from start to end of the process: 300ms, 5s, 2h"),
    arg("--max-rss", type=octets, metavar="SIZE", help="Peak resident memory of the process: 500M"),
    arg("--cpu-time", type=seconds, metavar="TIME", help="CPU time of the process"),
    arg("--from-hook", action="store_true", help="A hook started the process"),
    arg("--thread", action="store_true", help="The event is about a thread, not a process"),
    arg("--event", metavar="JSON", help="The event as a log record in JSON; @FILE or - reads it"),
)
