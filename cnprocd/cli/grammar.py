"""Every verb of cnprocctl with its options: the one table that the parser, the manual page and the completions come of.

One grammar: `cnprocctl [options] VERB [SUBVERB] [options] [arguments]`. The options of all verbs may stand before or
after the verb. A verb names its function as `module:function` below cli/verbs, so that naming it imports nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cnprocd import __version__

Options = argparse.Namespace
RUNTIME_DIR = Path("/run/cnprocd")
STATE_DIR = Path("/var/lib/cnprocd")
FEATURES = ("event_mask", "taskstats", "socket_filter")
KINDS = ("exit", "nonzero_exit", "fork", "exec", "uid", "gid", "sid", "ptrace", "comm", "coredump")
STATES = ("waiting", "running", "done", "dead")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Argument:
    """One option or argument: what add_argument() takes."""

    names: tuple[str, ...]
    options: dict[str, object]


def arg(*names: str, **options: object) -> Argument:
    return Argument(names, options)


@dataclass(frozen=True)
class Verb:
    """`name` is one word, or two (`jobs list`)."""

    name: str
    run: str
    help: str
    arguments: tuple[Argument, ...] = ()
    description: str = ""
    examples: tuple[str, ...] = field(default=())


def seconds(value: str) -> float:
    """`30s`, `5m`, `2h`, `1d`, `250ms`; a bare number is seconds."""
    for unit in ("ms", "s", "m", "h", "d"):
        number = value.removesuffix(unit)
        if number != value and number.replace(".", "", 1).isdigit():
            return float(number) * _SECONDS[unit]
    if value.replace(".", "", 1).isdigit():
        return float(value)
    raise argparse.ArgumentTypeError(f"{value!r} is no time: 30s, 5m, 2h, 1d or 250ms")


def octets(value: str) -> int:
    """`512K`, `16M`, `1G`, or a bare number of bytes."""
    unit = value[-1:].upper() if value[-1:].upper() in ("K", "M", "G") else ""
    number = value[: len(value) - len(unit)]
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"{value!r} is no size: 512K, 16M or 1G")
    return int(number) * _BYTES[unit]


COMMON = (
    arg(
        "--rules", type=Path, metavar="FILE", help="only this rule file (default: /etc/cnprocd/rules.yaml and rules.d)"
    ),
    arg("--runtime-dir", type=Path, default=RUNTIME_DIR, metavar="DIR", help="where the daemon's control socket is"),
    arg("--state-dir", type=Path, default=STATE_DIR, metavar="DIR", help="where the daemon keeps its jobs"),
    arg("--json", action="store_true", help="print data as JSON; streams as one object a line"),
)

_RULE = arg("--rule", metavar="NAME", help="only this rule")
_LIMIT = arg("--limit", type=int, default=50, metavar="N", help="at most so many (default: 50, at most 1000)")
_WITHOUT = arg(
    "--without",
    action="append",
    default=[],
    choices=FEATURES,
    metavar="FEATURE",
    help="as on a kernel that lacks event_mask, taskstats or socket_filter; may be repeated",
)

EVENT = (
    arg("--pid", type=int, metavar="PID", help="this process; with `test` and `explain`, one that runs now"),
    arg("--kind", choices=KINDS, metavar="KIND", help="what happened: exit (default), fork, exec, comm, ..."),
    arg("--comm", metavar="NAME", help="its command name"),
    arg("--exit-code", type=int, metavar="N", help="it called exit(N)"),
    arg("--signal", metavar="NAME", help="it was killed by this signal: SIGKILL, KILL or 9"),
    arg(
        "--status",
        type=int,
        metavar="N",
        help="its wait status as waitpid() gives it: code*256, or the signal's number",
    ),
    arg("--core", action="store_true", help="it dumped core"),
    arg("--lost", action="store_true", help="its exit was lost and its status is unknown (recovered)"),
    arg("--user", metavar="NAME", help="its user: name or uid"),
    arg("--group", metavar="NAME", help="its group: name or gid"),
    arg("--exe", metavar="PATH", help="its executable"),
    arg("--cmdline", metavar="TEXT", help="its arguments, joined by spaces"),
    arg("--unit", metavar="UNIT", help="its systemd unit"),
    arg("--cgroup", metavar="PATH", help="its control group"),
    arg("--parent", metavar="NAME", help="the command name of its parent"),
    arg("--ancestor", action="append", default=[], metavar="NAME", help="and of the parent's parent, and so on up"),
    arg("--lifetime", type=seconds, metavar="TIME", help="how long it lived: 300ms, 5s, 2h"),
    arg("--max-rss", type=octets, metavar="SIZE", help="its peak memory: 500M"),
    arg("--cpu-time", type=seconds, metavar="TIME", help="its CPU time"),
    arg("--from-hook", action="store_true", help="it came of a hook"),
    arg("--thread", action="store_true", help="it is a thread, not a process"),
    arg("--event", metavar="JSON", help="a record with the fields of the log instead; @FILE or - reads one"),
)

_MATCH = arg(
    "--match", metavar="YAML", help="only what this match of the rule language fits: '{comm: \"ora_*\", user: oracle}'"
)
_FOR = arg("--for", dest="duration", type=seconds, metavar="TIME", help="end after this time")
_COUNT = arg("--count", type=int, metavar="N", help="end after so many")

VERBS = (
    Verb("status", "daemon:status", "how the daemon is, and how often each rule matched"),
    Verb(
        "reload",
        "daemon:reload",
        "put the rule files in force",
        description="Returns when the new rules are in force. If they are wrong, the mistakes are shown, the exit "
        "status is 78, and the rules in force stay in force.",
    ),
    Verb(
        "check",
        "rules:check",
        "say what is wrong with the rule files",
        (arg("--strict", action="store_true", help="warnings count as mistakes"),),
        description="Shows every mistake of every file with its line and column, and warns of rules that are allowed "
        "but probably not meant. Needs no daemon.",
    ),
    Verb(
        "explain",
        "explain:explain",
        "what the rules cost, and why a rule fires or does not",
        (
            arg("rule", nargs="?", metavar="RULE", help="only this rule"),
            arg("--job", type=int, metavar="ID", help="the event of this job"),
            _WITHOUT,
            *EVENT,
        ),
        description="Without an event: what is asked of the kernel for these rules, and at what cost. With an event "
        "(described by options, as JSON, of a running process or of a job): per rule whether it fires, and why, key by "
        "key: yes, no, or unknown.",
        examples=("cnprocctl explain", "cnprocctl explain --comm ora_pmon_X --signal KILL --user oracle"),
    ),
    Verb(
        "test",
        "trial:test",
        "which rules would fire on a described event",
        EVENT,
        description="Shows for each rule that fires the record it would write and the hook it would run. Exit status 0 "
        "if at least one fires, 1 if none. Runs nothing, and needs no daemon. A PID stands for a running process as if "
        "it ended now.",
        examples=(
            "cnprocctl test --comm ora_pmon_X --exit-code 3 --user oracle",
            "cnprocctl test --pid 1234 --status 9",
        ),
    ),
    Verb("schema", "rules:schema", "the JSON schema of rule files, for editors"),
    Verb("rules list", "rules:listed", "the rules, and which are disabled"),
    Verb(
        "rules enable",
        "rules:enable",
        "undo `rules disable`",
        (arg("names", nargs="+", metavar="NAME", help="rules"),),
    ),
    Verb(
        "rules disable",
        "rules:disable",
        "switch rules off without editing their file",
        (arg("names", nargs="+", metavar="NAME", help="rules"),),
        description="Writes the names to the file `disabled` beside the rule file (/etc/cnprocd/disabled), and reloads "
        "a running daemon. It lasts until `rules enable`.",
    ),
    Verb("jobs list", "jobs:listed", "the newest hooks", (
        arg("--state", choices=STATES, metavar="STATE", help="only jobs in this state: " + ", ".join(STATES)),
        _RULE,
        _LIMIT,
    )),
    Verb("jobs show", "jobs:show", "one hook, with its events", (
        arg("job", type=int, metavar="ID", help="its job id"),
    )),
    Verb("jobs retry", "jobs:retry", "run dead hooks again", (
        arg("jobs", type=int, nargs="+", metavar="ID", help="job ids"),
    )),
    Verb("jobs drop", "jobs:drop", "do not run waiting hooks", (
        arg("jobs", type=int, nargs="+", metavar="ID", help="job ids"),
    )),
    Verb("history", "jobs:history", "past matches", (
        _RULE,
        arg("--comm", metavar="NAME", help="only of this command name"),
        arg("--since", type=seconds, metavar="TIME", help="only of the last 5m, 2h, 1d"),
        _LIMIT,
    )),
    Verb(
        "watch",
        "live:watch",
        "matches as they happen; with --events, everything that happens",
        (
            arg("--events", action="store_true", help="every event of every process; needs root, no daemon"),
            arg("--kinds", metavar="LIST", help="with --events: only these, as exit,exec"),
            _RULE,
            _MATCH,
            arg("--rate", type=int, metavar="N", help="at most so many lines a second (50 on a terminal; 0: all)"),
            _COUNT,
            _FOR,
        ),
        description="Matches come from the daemon. Events are listened to with a socket of its own, so that the daemon "
        "need not ask the kernel for more than its rules need. When more happens than a person can read, lines are "
        "left out, and how many is said; with --json nothing is left out but what the reader does not take in time.",
        examples=("cnprocctl watch", "cnprocctl watch --events --kinds exit --match '{exit_code: \"!= 0\"}'"),
    ),
    Verb(
        "top",
        "live:top",
        "who forks, fails and dies most",
        (
            arg("--by", choices=("comm", "unit", "user"), default="comm", metavar="KEY", help="comm, unit or user"),
            arg("--interval", type=seconds, default=2.0, metavar="TIME", help="how often the screen is drawn (2s)"),
            arg("--lines", type=int, default=20, metavar="N", help="how many lines (20)"),
            _FOR,
        ),
    ),
    Verb("metrics", "daemon:metrics", "the daemon's counters as Prometheus text"),
    Verb(
        "doctor",
        "doctor:doctor",
        "what keeps cnprocd from working on this machine, and how to mend it",
        description="Each line says pass, warn or fail. Exit status 0 if nothing failed, else 1. Needs no daemon; run "
        "it as root to have everything looked at.",
    ),
    Verb(
        "record",
        "recording:record",
        "write what happens to a file, for replay",
        (
            arg("file", type=Path, metavar="FILE", help="a new file"),
            arg("--for", dest="duration", type=seconds, default=60.0, metavar="TIME", help="how long (60s)"),
            arg("--max-size", type=octets, default=64 << 20, metavar="SIZE", help="how large the file may grow (64M)"),
        ),
        description="Needs root. The file holds every event and exit record as the kernel sent them, and what /proc "
        "said: names, arguments and users of every process. It is readable by you only.",
    ),
    Verb(
        "replay",
        "recording:replay",
        "which rules would have fired on a recording",
        (
            arg("file", type=Path, metavar="FILE", help="what `record` wrote"),
            _RULE,
        ),
        description="The same file and the same rules give the same matches, on any machine. Runs nothing.",
    ),
)  # fmt: skip

GROUPS = {"rules": "list, enable and disable rules", "jobs": "look at hooks, and retry or drop them"}


def parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The whole command line; or, where the words typed are known, only what they can need.

    Half of a quick command's start would go into making the parsers of all the others. Their names are only wanted for
    help and for a verb that does not exist.
    """
    verbs = [verb for verb in VERBS if verb.name.split()[0] in (words or ())]
    if not verbs or "-h" in (words or ()) or "--help" in (words or ()):
        verbs = list(VERBS)
    top = argparse.ArgumentParser(
        prog="cnprocctl",
        description="See, try and steer cnprocd, which acts on the death and birth of processes.",
        epilog="Exit statuses: 0 done, 1 the answer is no, 2 wrong usage, 69 not running, 71 refused by the system, "
        "77 not permitted, 78 the rules are wrong. See cnprocctl(1).",
    )
    top.add_argument("--version", action="version", version=f"cnprocctl {__version__}")
    add(top, COMMON)
    below = top.add_subparsers(metavar="VERB", required=True)
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for verb in verbs:
        group, _, name = verb.name.rpartition(" ")
        if group and group not in groups:
            one = below.add_parser(group, help=GROUPS[group], description=GROUPS[group].capitalize() + ".")
            groups[group] = one.add_subparsers(metavar="VERB", required=True)
        where = groups[group] if group else below
        made = where.add_parser(
            name, help=verb.help, description=verb.description or f"{verb.help[0].upper()}{verb.help[1:]}."
        )
        made.set_defaults(run=verb.run)
        add(made, verb.arguments)
        add(made.add_argument_group("options of every verb"), COMMON, suppress=True)
    return top


def add(
    to: argparse.ArgumentParser | argparse._ArgumentGroup, arguments: tuple[Argument, ...], *, suppress: bool = False
) -> None:
    """Add arguments; with `suppress` an option that is not given leaves what stood before the verb."""
    taken: set[str] = set()
    for one in arguments:
        if one.names[0] in taken:
            continue
        taken.add(one.names[0])
        options = one.options | ({"default": argparse.SUPPRESS} if suppress else {})
        to.add_argument(*one.names, **options)  # type: ignore[arg-type]  # a table cannot know each parameter's type
